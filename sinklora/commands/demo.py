"""sinklora demo"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinklora.cli import ConfigOption
from sinklora.demo.settings import QUICK, DemoSettings
from sinklora.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from sinklora.demo.cache_report import CacheResults
    from sinklora.demo.report import Results

_DEFAULT = DemoSettings  # the class: its attributes are the defaults, and making one takes NumPy


def _changed_by_quick(name: str) -> str:
    return f"{getattr(_DEFAULT, name)}; with --quick {QUICK[name]}"


def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A minute or two; the numbers then say little."),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of the file split, the start model and the order of the data.")
    ] = _DEFAULT.seed,
    output: Annotated[
        Path, typer.Option(help="Folder for the model, its adapter, tables and pictures.")
    ] = Path("sinklora-demo"),
    start_steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps of the start model.", show_default=_changed_by_quick("start_steps")
        ),
    ] = None,
    extend_steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps of each extension.", show_default=_changed_by_quick("extend_steps")
        ),
    ] = None,
    start_batch: Annotated[
        int, typer.Option(help="Blocks in a step of the start model.")
    ] = _DEFAULT.start_batch,
    extend_batch: Annotated[
        int, typer.Option(help="Blocks in a step of an extension.")
    ] = _DEFAULT.extend_batch,
    start_context: Annotated[
        int, typer.Option(help="Context of the start model, tokens.")
    ] = _DEFAULT.start_context,
    context: Annotated[int, typer.Option(help="Context after the extension, tokens.")] = _DEFAULT.context,
    group_size: Annotated[int, typer.Option(help="Tokens in a group.")] = _DEFAULT.group_size,
    sinks: Annotated[int, typer.Option(help="Sink tokens of SF-Attn.")] = _DEFAULT.num_sink_tokens,
    fraction: Annotated[
        float, typer.Option(help="Share of SF-Attn's heads that are shifted.")
    ] = _DEFAULT.shifted_fraction,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = _DEFAULT.lora_rank,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = _DEFAULT.hidden_size,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = _DEFAULT.num_layers,
    validation_files: Annotated[
        int | None,
        typer.Option(help="Files held out and scored.", show_default=_changed_by_quick("validation_files")),
    ] = None,
    validation_tokens: Annotated[
        int, typer.Option(help="Tokens scored of each.")
    ] = _DEFAULT.validation_tokens,
    continuation_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of each file that are decoded through each cache.",
            show_default=_changed_by_quick("continuation_tokens"),
        ),
    ] = None,
    num_streams: Annotated[
        int | None,
        typer.Option(help="Long texts read through a cache.", show_default=_changed_by_quick("num_streams")),
    ] = None,
    stream_contexts: Annotated[
        int, typer.Option(help="Length of each, in contexts.")
    ] = _DEFAULT.stream_contexts,
    sample_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens generated at the end.", show_default=_changed_by_quick("sample_tokens")),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Extend the context of a small LLaMA with full attention, S2-Attn and SF-Attn, and compare them.

    Then decodes with smaller and smaller caches.

    Trains on the CPU, on the sources of this Python's standard library; nothing is downloaded.
    """
    require("train", "torch", "transformers", "peft", "accelerate", "matplotlib")
    preset = QUICK if quick else {}
    own = {
        "start_steps": start_steps,
        "extend_steps": extend_steps,
        "validation_files": validation_files,
        "sample_tokens": sample_tokens,
        "continuation_tokens": continuation_tokens,
        "num_streams": num_streams,
    }
    settings = DemoSettings(
        seed=seed,
        start_context=start_context,
        context=context,
        group_size=group_size,
        num_sink_tokens=sinks,
        shifted_fraction=fraction,
        start_batch=start_batch,
        extend_batch=extend_batch,
        lora_rank=lora_rank,
        hidden_size=hidden_size,
        num_layers=layers,
        validation_tokens=validation_tokens,
        stream_contexts=stream_contexts,
        **{**preset, **{name: value for name, value in own.items() if value is not None}},
    )
    _run(settings, output)


def _run(settings: DemoSettings, output: Path) -> None:
    console = _console()
    console.print("importing torch, transformers and PEFT ...")
    # Hints of the libraries to each other about names that they are going to change.
    warnings.simplefilter("ignore", FutureWarning)
    import transformers

    from sinklora.demo.run import run
    from sinklora.progress import progress_bars

    transformers.utils.logging.disable_progress_bar()
    with progress_bars(console) as begin:
        results = run(settings, output, begin)
    show(results, console)
    console.print(f"\n{results.seconds:.0f} s. Everything is in {output}: AutoModelForCausalLM opens it.")


def _console() -> Console:
    """rich's console; in a log, which has no width of its own, wide enough for the table."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


def show_caches(caches: CacheResults, console: Console) -> None:
    """The table of caches, what its columns mean, and how long texts ended."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for header in caches.headers():
        table.add_column(header, justify="right")
    for line in caches.lines():
        table.add_row(*line)
    console.print(table)
    for note in caches.notes():
        console.print(Text(note, style="dim"))


def show(results: Results, console: Console) -> None:
    """The table, what its columns mean, and the sampled continuation."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sinklora.demo.report import cell_texts

    table = Table(box=box.SIMPLE)
    for index, header in enumerate(results.headers()):
        table.add_column(header, justify="left" if index == 0 else "right")
    for row in results.rows():
        table.add_row(*cell_texts(row))
    console.print(table)
    for note in results.notes():
        console.print(Text(note, style="dim"))
    if results.caches is not None:
        show_caches(results.caches, console)
    prompt, continuation = results.sample
    if continuation:
        show_sample(prompt, continuation, console)


def show_sample(prompt: str, continuation: str, console: Console) -> None:
    """A held-out file's text, and what the model wrote behind it."""
    from rich.text import Text

    # A log shows nothing dim: there a line says where the model begins to write.
    dim = console.is_terminal and console.color_system is not None
    console.print("\nThe SF-Attn model goes on with a held-out file" + (" (its text dim):" if dim else ":"))
    joint = "" if dim else "\n===== continued =====\n"
    console.print(Text(prompt, style="dim") + Text(joint + continuation))
