"""The lines of a chat that begin with a slash."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .chat import ChatSession
from .settings import parse_amount


class LeaveChat(Exception):  # noqa: N818 - no error
    """Raised by /exit."""


class ChatCommands:
    """Runs commands on a session. Every method named do_X is the command /X; its docstring is its help."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self.commands: dict[str, Callable[[list[str]], list[str]]] = {
            name.removeprefix("do_"): method
            for name, method in inspect.getmembers(self, inspect.ismethod)
            if name.startswith("do_")
        }

    def run(self, line: str) -> list[str]:
        """The lines that the command "/name arguments" answers.

        Raises:
            ValueError: no such command, or wrong arguments. OSError: a file that cannot be written.
            LeaveChat.
        """
        name, *arguments = line.removeprefix("/").split() or [""]
        command = self.commands.get(name.lower())
        if command is None:
            known = ", ".join(f"/{each}" for each in self.commands)
            raise ValueError(f"/{name}: no such command; there are {known} (a message may begin with //)")
        return command(arguments)

    def do_help(self, arguments: list[str]) -> list[str]:
        """/help - this list"""
        _none("help", arguments)
        lines = [inspect.getdoc(command) or "" for command in self.commands.values()]
        return [
            *lines,
            "A line that ends in a backslash goes on in the next one. // sends a message that begins with /.",
            "Ctrl-C stops an answer, Ctrl-D leaves.",
        ]

    def do_reset(self, arguments: list[str]) -> list[str]:
        """/reset - forget the dialogue, begin with an empty cache"""
        _none("reset", arguments)
        self.session.reset()
        return ["the dialogue is forgotten"]

    def do_stats(self, arguments: list[str]) -> list[str]:
        """/stats - tokens, cache and speed so far"""
        _none("stats", arguments)
        return self.session.stats()

    def do_save(self, arguments: list[str]) -> list[str]:
        """/save FILE - write the history: JSON where FILE ends in .json, else text"""
        if not arguments:
            raise ValueError("/save: expected a file, got none")
        target = " ".join(arguments)
        self.session.save(target)
        return [f"wrote {target}"]

    def do_budget(self, arguments: list[str]) -> list[str]:
        """/budget HEAVY RECENT [SINKS] - another size of the cache (integers: entries; 0.1: a share)"""
        if not 2 <= len(arguments) <= 3:
            raise ValueError(f"/budget: expected HEAVY RECENT [SINKS], got {' '.join(arguments) or 'none'}")
        names = ("HEAVY", "RECENT", "SINKS")
        amounts = {}
        for name, text in zip(names, arguments, strict=False):
            try:
                amounts[name] = parse_amount(text)
            except ValueError as error:
                raise ValueError(f"/budget: {name}: {error}") from None
        sinks = amounts.get("SINKS", self.session.settings.num_sink_tokens)
        try:
            self.session.set_budget(
                heavy=amounts["HEAVY"], recent=amounts["RECENT"], num_sink_tokens=sinks, full=False
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"/budget: {error}") from error
        again = len(self.session.dialogue.tokens)
        lines = [f"a new cache: {self.session.settings.describe()}"]
        return [*lines, f"the next message reads the {again} tokens of history again"] if again else lines

    def do_exit(self, arguments: list[str]) -> list[str]:
        """/exit - leave"""
        _none("exit", arguments)
        raise LeaveChat


def _none(name: str, arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"/{name}: expected nothing after it, got {' '.join(arguments)}")
