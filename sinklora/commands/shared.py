"""What `sinklora generate` and `sinklora chat` share: options, their checks, and opening the model."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinklora.extras import require

if TYPE_CHECKING:
    from sinklora.generation.settings import CacheSettings, Sampling
    from sinklora.loading import OpenedModel

# Python's names of the settings that are options here; errors about a setting name the option.
_OPTIONS = {
    "heavy": "--heavy",
    "recent": "--recent",
    "num_sink_tokens": "--sinks",
    "positions": "--positions",
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "seed": "--seed",
    "chunk": "--prefill-chunk",
    "model": "--model",
    "dtype": "--dtype",
    "style": "--style",
    "base": "--base",
    "output": "--output",
    "shard_size": "--shard-size",
    "context": "--context",
    "rope_factor": "--rope-factor",
    "device": "--device",
}
# Shells say so of a program whose reader went away.
BROKEN_PIPE_STATUS = 141
# Shorter prompts are read at once.
MIN_SHOWN_TOKENS = 512
_SHOWN_CONTROLS = {code: 0xFFFD for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def amount(text: object) -> int | float:
    """Entries or a share, from the command line or a YAML file."""
    from sinklora.generation.settings import parse_amount

    try:
        return parse_amount(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder of a model or of a PEFT adapter, or a model's name on the Hub.",
        show_default="what `sinklora demo` left in sinklora-demo",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="Of the weights: float32, bfloat16, float16, or auto: as they were saved.")
]
DeviceOption = Annotated[
    str,
    typer.Option(help="Where the model runs: cpu, cuda, cuda:1, or auto: a GPU where there is one that can."),
]
HeavyOption = Annotated[
    Any,
    typer.Option(
        "--heavy",
        parser=amount,
        metavar="N|SHARE",
        help="Entries kept for their attention scores: 256 entries, or 0.1 of the prompt's tokens.",
        show_default="256",
    ),
]
RecentOption = Annotated[
    Any,
    typer.Option(
        "--recent",
        parser=amount,
        metavar="N|SHARE",
        help="Newest entries kept: 256 entries, or 0.1 of the prompt's tokens.",
        show_default="256",
    ),
]
SinksOption = Annotated[
    int | None, typer.Option("--sinks", help="First tokens always kept.", show_default="4")
]
PositionsOption = Annotated[
    str | None,
    typer.Option(
        "--positions",
        help="original: where tokens stood in the text; cache: their rank among those kept, so that a text "
        "may grow beyond the model's context for ever.",
        show_default="original",
    ),
]
FullCacheOption = Annotated[
    bool, typer.Option("--full-cache", help="Keep everything (transformers' DynamicCache), to compare.")
]
MaxNewTokensOption = Annotated[int, typer.Option(help="Most tokens written at once.")]
TemperatureOption = Annotated[
    float, typer.Option(help="Of sampling; 0 takes the likeliest token, and no other sampling option acts.")
]
TopPOption = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")]
SeedOption = Annotated[int | None, typer.Option(help="Of the sampling.", show_default="a new one each time")]
PrefillChunkOption = Annotated[
    int, typer.Option(help="Tokens of the prompt read at a time; a bounded cache evicts after each.")
]


def bad(option: str, what: str) -> typer.BadParameter:
    """The error to raise about an option."""
    return typer.BadParameter(what, param_hint=f"'{option}'")


@contextlib.contextmanager
def option_errors(**others: str) -> Iterator[None]:
    """Turns an error "name: what is wrong" about a setting into one about the option; others: options of
    this command that are called otherwise."""
    options = {**_OPTIONS, **others}
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(": ")
        if name not in options or not rest:
            raise
        raise bad(options[name], rest) from error


def cache_settings(
    heavy: Any, recent: Any, sinks: int | None, positions: str | None, full_cache: bool
) -> CacheSettings:
    """The cache that the options ask for, checked before a model is opened."""
    from sinklora.generation.settings import CacheSettings

    given = {"heavy": heavy, "recent": recent, "num_sink_tokens": sinks, "positions": positions}
    given = {name: value for name, value in given.items() if value is not None}
    if full_cache and given:
        names = ", ".join(_OPTIONS[name] for name in given)
        raise bad("--full-cache", f"expected alone, as it keeps everything, got {names} too")
    with option_errors():
        return CacheSettings(**given, full=full_cache)


def sampling_settings(**values: Any) -> Sampling:
    from sinklora.generation.settings import Sampling

    with option_errors():
        return Sampling(**values)


def open_for_generation(name: str | None, dtype: str, device: str, settings: CacheSettings) -> OpenedModel:
    """Opens the model of the options, where it can run with the cache."""
    with option_errors():
        from sinklora.loading import choose_device, on_the_hub, open_model

        if name is not None and on_the_hub(name):
            note(f"no folder {name} here: asking the Hub")
        place = choose_device(device, kernels=not settings.full)
        opened = open_model(name, dtype)
        opened.model.to(place)  # type: ignore[arg-type]
        return opened


def prepare_libraries() -> None:
    """Says what is missing; keeps progress bars and hints of the libraries to each other off the terminal."""
    require("train", "torch", "transformers")
    warnings.simplefilter("ignore", FutureWarning)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # It tells every try to reach the Hub; the error at the end is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def write(text: str) -> None:
    """Text of the model, at once. A terminal gets no control characters but tab and newline: what a model
    writes must not move the cursor or retitle the window."""
    sys.stdout.write(text.translate(_SHOWN_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line about the text, where it does not get into a pipe."""
    typer.echo(text, err=True)


@contextlib.contextmanager
def text_to_stdout() -> Iterator[None]:
    """Any text can be written inside, and a reader that leaves (`| head`) ends the command quietly."""
    reconfigure: Callable[..., None] | None = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    try:
        yield
    except BrokenPipeError:
        # Python would write the rest at its end and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE_STATUS) from None


@contextlib.contextmanager
def own_warnings_only() -> Iterator[None]:
    """Keeps transformers from its reminders that a text is long; these commands say so once, with the way
    out."""
    import transformers

    logs = transformers.utils.logging
    before = logs.get_verbosity()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(before)


class ReadingLine:
    """Shows on a terminal how much of a long prompt has been read, and takes that away again."""

    def __init__(self) -> None:
        self.shown = False

    def __call__(self, done: int, total: int) -> None:
        if done >= total:
            self.clear()
        elif sys.stderr.isatty() and total > MIN_SHOWN_TOKENS:
            sys.stderr.write(f"\rreading {done:,} of {total:,} tokens")
            sys.stderr.flush()
            self.shown = True

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self.shown = False
