"""A dialogue with a model over one cache: each turn feeds only what the cache has not seen."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..folders import write_whole
from ..loading import OpenedModel
from .formats import Dialogue, choose_format
from .generate import Continuation, cache_facts, continue_tokens
from .settings import CacheSettings, Sampling
from .streaming import Interrupt


class ChatSession:
    """One dialogue: its history, its cache, and how answers are drawn.

    The cache has always seen a beginning of the history's tokens, also after an interrupted answer. Where it
    cannot go on (a template that rewrites history, a new budget, an error in the model) it is replaced by an
    empty one, which reads the history again with the next message.

    Args:
        style: as for choose_format. system: a message that stands before the dialogue.

    Raises:
        ValueError: settings of the cache, or a style that the tokenizer does not have.
    """

    def __init__(
        self,
        opened: OpenedModel,
        settings: CacheSettings | None = None,
        sampling: Sampling | None = None,
        *,
        style: str = "auto",
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = opened
        self.settings = settings or CacheSettings()
        self.sampling = sampling or Sampling()
        self.format = choose_format(self.tokenizer, style)
        self.system = system
        self.last: Continuation | None = None
        self.sampling.begin()
        self.reset()

    def reset(self) -> None:
        """Forgets the dialogue; the system message stays."""
        self.cache: Any = self.settings.make(self.model)
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.dialogue = Dialogue(messages)
        self.last = None

    @property
    def turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.dialogue.messages)

    def answer(
        self,
        message: str,
        *,
        on_text: Callable[[str], None] = lambda text: None,
        on_read: Callable[[int, int], None] = lambda done, total: None,
        on_note: Callable[[str], None] = lambda note: None,
        interrupt: Interrupt | None = None,
    ) -> Continuation:
        """Answers one message. What an interrupt cut off stays in the history as it is.

        Args:
            on_text, on_read, interrupt: as for continue_tokens.
            on_note: gets a line where the cache had to be started anew.

        Raises:
            ValueError: nothing to answer. What the model raises; the history is then as before.
        """
        prompt = self.format.prompt(self.dialogue, message)
        if prompt.rewritten:
            on_note("the chat template writes earlier turns anew; the cache starts again and reads them all")
            self.cache = self.settings.make(self.model)
        pieces: list[str] = []

        def keep(text: str) -> None:
            pieces.append(text)
            on_text(text)

        try:
            found = continue_tokens(
                self.model,
                self.tokenizer,
                prompt.tokens,
                self.cache,
                self.settings.fit(self.model, self.sampling),
                on_text=keep,
                on_read=on_read,
                interrupt=interrupt,
            )
        except BaseException:
            # The forward may have broken off between two layers.
            self.cache = self.settings.make(self.model)
            raise
        self.dialogue.messages += [
            {"role": "user", "content": message},
            {"role": "assistant", "content": "".join(pieces)},
        ]
        self.dialogue.tokens = [*prompt.tokens, *found.tokens]
        self.dialogue.rendered = prompt.rendered
        self.last = found
        return found

    def set_budget(self, **changes: Any) -> None:
        """Other settings of the cache, by the names of CacheSettings. The history is read again with the next
        message.

        Raises:
            ValueError: what the cache refuses; the session is then as before.
        """
        settings = dataclasses.replace(self.settings, **changes)
        self.cache, self.settings = settings.make(self.model), settings

    def stats(self) -> list[str]:
        """What there is to know, in lines."""
        lines = [
            f"model {self.name}; style {self.format.name}",
            f"{self.turns} turn{'s'[: self.turns != 1]}, {len(self.dialogue.tokens)} tokens of history",
            f"budget: {self.settings.describe()}",
            str(cache_facts(self.cache)),
        ]
        return [*lines, f"last answer: {self.last.speeds()}"] if self.last is not None else lines

    def save(self, target: str | os.PathLike[str]) -> None:
        """Writes the history, whole or not at all: JSON where the name ends in .json, else text.

        Raises:
            ValueError: there is nothing yet. OSError: it cannot be written.
        """
        path = Path(target).expanduser()
        if not self.turns:
            raise ValueError("save: expected a dialogue, got none yet")
        if path.suffix.lower() == ".json":
            record = {
                "model": self.name,
                "style": self.format.name,
                "cache": dataclasses.asdict(self.settings),
                "sampling": dataclasses.asdict(self.sampling),
                "messages": self.dialogue.messages,
            }
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "\n".join(f"{m['role']}: {m['content'].strip()}\n" for m in self.dialogue.messages)
        if not path.parent.is_dir():  # not an error about the name of the partial file
            raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))
        write_whole(path, text)
