"""sinklora generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinklora.cli import INTERRUPTED_STATUS
from sinklora.commands import shared

if TYPE_CHECKING:
    from sinklora.generation.settings import CacheSettings, Sampling
    from sinklora.loading import OpenedModel


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; - reads it from standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="File with the text to go on from, in UTF-8; - reads it from standard input.",
            show_default=False,
        ),
    ] = None,
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "auto",
    heavy: shared.HeavyOption = None,
    recent: shared.RecentOption = None,
    sinks: shared.SinksOption = None,
    positions: shared.PositionsOption = None,
    full_cache: shared.FullCacheOption = False,
    max_new_tokens: shared.MaxNewTokensOption = 256,
    temperature: shared.TemperatureOption = 0.7,
    top_p: shared.TopPOption = 0.95,
    seed: shared.SeedOption = None,
    prefill_chunk: shared.PrefillChunkOption = 2048,
) -> None:
    """Continue a text with a bounded (H2O) cache.

    The text goes to standard output as it is written, figures to standard error. Ctrl-C ends it.
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
    text = read_prompt(prompt, file)
    opened = shared.open_for_generation(model, dtype, device, settings)
    with shared.option_errors(), shared.text_to_stdout(), shared.own_warnings_only():
        interrupted = _continue(opened, text, settings, sampling)
    if interrupted:
        raise typer.Exit(INTERRUPTED_STATUS)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text from wherever the user put it. Raises typer.BadParameter."""
    if prompt is not None and file is not None:
        raise shared.bad("--file", "expected either a prompt or a file, got both")
    if prompt is None and file is None and sys.stdin.isatty():
        raise shared.bad("PROMPT", "expected a text, --file FILE, or - for standard input; got none")
    if prompt is None or prompt == "-":
        place = "-" if file is None else str(file)
        try:
            raw = sys.stdin.buffer.read() if place == "-" else Path(place).read_bytes()
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or f"expected UTF-8, got {error}"
            name = "standard input" if place == "-" else place
            option = "PROMPT" if file is None else "--file"
            raise shared.bad(option, f"{name}: {what}") from error
    else:
        text = prompt
    if not text:
        raise shared.bad("PROMPT", "expected some text, got none")
    return text


def _continue(opened: OpenedModel, text: str, settings: CacheSettings, sampling: Sampling) -> bool:
    """Writes the continuation and the figures; True where Ctrl-C ended it."""
    from sinklora.generation.generate import cache_facts, continue_tokens
    from sinklora.generation.streaming import Interrupt

    tokenizer: Any = opened.tokenizer
    tokens = list(tokenizer(text)["input_ids"])
    cache = settings.make(opened.model)
    sampling.begin()
    reading, interrupt = shared.ReadingLine(), Interrupt()
    with interrupt.watching():
        found = continue_tokens(
            opened.model,
            opened.tokenizer,
            tokens,
            cache,
            settings.fit(opened.model, sampling),
            on_text=shared.write,
            on_read=reading,
            interrupt=interrupt,
        )
    reading.clear()
    if found.tokens:
        shared.write("\n")
    shared.note(f"{found.speeds()}; {cache_facts(cache)} ({settings.describe()})")
    warning = settings.beyond_context(opened.model, len(tokens) + len(found.tokens))
    if warning:
        shared.note(warning)
    return found.interrupted
