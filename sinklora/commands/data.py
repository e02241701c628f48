"""sinklora data"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinklora.cli import load_config
from sinklora.data.mix_settings import PRESETS, TEXT_INSTRUCTION, MixSettings, listed, make_sources
from sinklora.extras import require

if TYPE_CHECKING:
    from rich.console import Console

# Options of the command that a YAML file may give as mappings.
_MAPPINGS = ("source", "licence")


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    path = load_config(context, path)
    for name in _MAPPINGS:
        if path is not None and context.default_map and name in context.default_map:
            try:
                context.default_map[name] = listed(name, context.default_map[name])
            except ValueError as error:
                raise typer.BadParameter(f"{path}: {error}") from error
    return path


def mix(
    output: Annotated[Path, typer.Option(help="File to write, .jsonl; its manifest goes beside it.")],
    source: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH:SHARE",
            help="Instruction rows: file, folder or name on the Hub, and their share of the mixture, as "
            "nq=nq.jsonl:44%. Once for each source; with --preset without a share.",
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Published shares, for your own files: {', '.join(PRESETS)} "
            f"({', '.join(PRESETS['longalpaca-plus'].shares)}).",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows of the mixture.", show_default="as many as the preset's")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "--model",
            help="Folder or name on the Hub, to count tokens with; needed for the two below.",
            show_default=False,
        ),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(help="Leave out shorter rows.", show_default="none")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Leave out longer rows.", show_default="none")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of the rows and their order.")] = 0,
    allow_fewer: Annotated[
        bool,
        typer.Option(
            "--allow-fewer", help="Where a source has too few rows, make less of all; the shares stay."
        ),
    ] = False,
    licence: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="A source's licence, for the manifest.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="Of saved data sets and those of the Hub.")] = "train",
    text_field: Annotated[str, typer.Option(help="Of rows that are plain text, what holds it.")] = "text",
    text_instruction: Annotated[
        str, typer.Option(help="The question that such a text becomes the answer to.")
    ] = TEXT_INSTRUCTION,
    read_rows: Annotated[
        int | None, typer.Option(help="Rows read of each source at most.", show_default="all")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file of options (key: value; source and licence as mappings by name); options on the "
            "command line win.",
            callback=_load_config,
            is_eager=True,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Mix instruction rows from several sources by shares into one file for `sinklora sft`.

    Rows are Alpaca's fields, chats or plain texts. Equal rows are kept once, rows of other lengths left out,
    and what went in is counted and hashed in a manifest.
    """
    try:
        if rows is None and preset in PRESETS:
            rows = PRESETS[preset].rows
        sources = make_sources(source, licence or (), preset)
        if rows is None:
            raise ValueError("rows: expected the rows of the mixture, got none")
        settings = MixSettings(
            sources,
            rows,
            tokenizer=tokenizer,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            seed=seed,
            allow_fewer=allow_fewer,
            split=split,
            text_field=text_field,
            text_instruction=text_instruction,
            read_rows=read_rows,
        )
        _mix(settings, output)
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        name = "source" if name == "data" else name  # what the readers of all commands call it
        if name not in _OPTIONS or not rest:
            raise
        raise typer.BadParameter(rest, param_hint=f"'--{name.replace('_', '-')}'") from error


# Settings that errors name, each an option here.
_OPTIONS = (
    "source", "licence", "preset", "rows", "tokenizer", "min_tokens", "max_tokens", "read_rows", "output"
)  # fmt: skip


def _mix(settings: MixSettings, output: Path) -> None:
    if settings.tokenizer is not None:
        require("train", "transformers")
    from rich.console import Console

    from sinklora.data.mix import manifest_path, mix
    from sinklora.progress import progress_bars

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=110)
    with progress_bars(console) as begin:
        manifest = mix(settings, output, begin)
    _show(manifest, console)
    made = manifest["output"]
    console.print(f"{made['rows']:,} rows in {output}, sha256 {made['sha256'][:16]}...", soft_wrap=True)
    console.print(f"What went in: {manifest_path(output)}", soft_wrap=True)


def _show(manifest: dict[str, Any], console: Console) -> None:
    """The table of sources, and a word on licences that were not given."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    headers = ("source", "share", "read", "duplicates", "too short", "too long", "eligible", "taken")
    for header in headers:
        table.add_column(header, justify="left" if header == "source" else "right")
    for source in manifest["sources"]:
        numbers = [f"{source['rows'][header.replace(' ', '_')]:,}" for header in headers[2:]]
        table.add_row(source["name"], f"{source['share']:.4g}", *numbers)
    console.print(table)
    if missing := [source["name"] for source in manifest["sources"] if source["licence"] is None]:
        console.print(f"No licence given for {', '.join(missing)} (--licence NAME=TEXT).")
