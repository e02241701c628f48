"""sinklora chat"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinklora.commands import shared

if TYPE_CHECKING:
    from sinklora.generation.chat import ChatSession
    from sinklora.generation.chat_commands import ChatCommands

HISTORY_LINES = 1000


def chat(
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "auto",
    style: Annotated[
        str,
        typer.Option(
            help="template: the tokenizer's chat template; llama2: [INST] ... [/INST]; plain: the text "
            "itself; auto: what fits the tokenizer."
        ),
    ] = "auto",
    system: Annotated[
        str | None,
        typer.Option(help="Message that stands before the dialogue.", show_default="none"),
    ] = None,
    heavy: shared.HeavyOption = None,
    recent: shared.RecentOption = None,
    sinks: shared.SinksOption = None,
    positions: shared.PositionsOption = None,
    full_cache: shared.FullCacheOption = False,
    max_new_tokens: shared.MaxNewTokensOption = 512,
    temperature: shared.TemperatureOption = 0.7,
    top_p: shared.TopPOption = 0.95,
    seed: shared.SeedOption = None,
    prefill_chunk: shared.PrefillChunkOption = 2048,
    input_history: Annotated[
        bool,
        typer.Option(
            "--input-history/--no-input-history",
            help="Keep what was typed for the arrow keys of later chats, in a file that only you can read.",
        ),
    ] = True,
) -> None:
    """Talk with a model over a bounded (H2O) cache that lives through the whole dialogue.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves. Lines may also come from a file or a
    pipe: answers then go to standard output, one after another, and the first error ends the chat.
    """
    shared.prepare_libraries()
    settings = shared.cache_settings(heavy, recent, sinks, positions, full_cache)
    sampling = shared.sampling_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chunk=prefill_chunk,
    )
    opened = shared.open_for_generation(model, dtype, device, settings)
    from sinklora.generation.chat import ChatSession
    from sinklora.generation.chat_commands import ChatCommands

    with shared.option_errors():
        session = ChatSession(opened, settings, sampling, style=style, system=system)
    if session.format.note:
        shared.note(session.format.note)
    interactive = sys.stdin.isatty()
    if interactive:
        shared.note(f"{opened.name}; {settings.describe()}; /help lists commands, Ctrl-D leaves")
    typed = _typed_history(interactive and input_history)
    with shared.text_to_stdout(), shared.own_warnings_only(), typed:
        converse(session, ChatCommands(session), interactive)


def converse(session: ChatSession, commands: ChatCommands, interactive: bool) -> None:
    """Reads lines and answers them until /exit, the end of the input, or Ctrl-C twice at the prompt.

    A terminal gets errors as a line and goes on; elsewhere they are raised.
    """
    from sinklora.generation.chat_commands import LeaveChat

    answering, leaving = Answering(session), False
    while True:
        try:
            line = read_line(interactive)
            leaving = False
            if line.startswith("/") and not line.startswith("//"):
                for text in commands.run(line):
                    shared.note(text)
            elif line.strip():
                answering(line[1:] if line.startswith("//") else line)
        except (EOFError, LeaveChat):
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            if leaving:
                break
            leaving = True
            shared.note("\nCtrl-C again, Ctrl-D or /exit leaves")
        except BrokenPipeError:
            raise
        except Exception as error:
            if not interactive:
                raise
            shared.note(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    if interactive:
        shared.note("")


class Answering:
    """Answers lines on the terminal, and says once what has to be said once."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self.warned = False

    def __call__(self, message: str) -> None:
        from sinklora.generation.streaming import Interrupt

        session = self.session
        reading, interrupt = shared.ReadingLine(), Interrupt()
        try:
            with interrupt.watching():
                found = session.answer(
                    message, on_text=shared.write, on_read=reading, on_note=shared.note, interrupt=interrupt
                )
        finally:
            reading.clear()
        shared.write("\n")
        if found.interrupted:
            shared.note("stopped")
        elif not found.ended and session.format.name != "plain":
            shared.note(f"stopped after {session.sampling.max_new_tokens} tokens (--max-new-tokens)")
        warning = session.settings.beyond_context(session.model, len(session.dialogue.tokens))
        if warning and not self.warned:
            self.warned = True
            shared.note(warning)


def read_line(interactive: bool) -> str:
    """One message: a line, and the next one too where it ends in a backslash. Raises EOFError."""
    lines: list[str] = []
    while True:
        line = _read_raw("... " if lines else "> ") if interactive else sys.stdin.readline()
        if not interactive:
            if not line:
                if lines:
                    break
                raise EOFError
            line = line.rstrip("\r\n")
        if not line.endswith("\\"):
            lines.append(line)
            break
        lines.append(line[:-1])
    return "\n".join(lines)


def _read_raw(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    # The answers go into a file: the prompt must not.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def history_path() -> Path:
    """Where what was typed is kept: the user's state directory, by the XDG rules."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "sinklora" / "chat_history"


@contextlib.contextmanager
def _typed_history(on: bool) -> Iterator[None]:
    """Line editing, and the lines of earlier chats where they are to be kept."""
    try:
        import readline
    except ImportError:  # not on every platform
        readline = None  # type: ignore[assignment]
    if readline is None or not on:
        yield
        return
    path = history_path()
    try:
        with contextlib.suppress(FileNotFoundError):
            readline.read_history_file(path)
    except OSError as error:
        shared.note(f"input history: {path}: {error.strerror or error}")
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch(mode=0o600)
            readline.write_history_file(partial)
            partial.replace(path)
        except OSError as error:
            shared.note(f"input history: {path}: {error.strerror or error}")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
