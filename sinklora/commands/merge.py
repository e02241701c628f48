"""sinklora merge"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinklora.commands.shared import option_errors, prepare_libraries
from sinklora.extras import require

if TYPE_CHECKING:
    from sinklora.merge import Merged


def merge(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of a PEFT adapter, or one that LongLoRA's own scripts wrote.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the merged model; new, empty, or an earlier one.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of the base model.", show_default="the one that the adapter names"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the result: float32, bfloat16, float16, or auto: as the base was saved.")
    ] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = "cpu",
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens the adapter was trained at, for old LongLoRA folders, which do not say how far "
            "positions were stretched.",
            show_default=False,
        ),
    ] = None,
    rope_factor: Annotated[
        float | None,
        typer.Option(help="Instead of --context: the factor that divides positions.", show_default=False),
    ] = None,
) -> None:
    """Write an adapter into its base model: a plain checkpoint that loads anywhere, checked.

    LoRA, trained embeddings and norms, a changed vocabulary and stretched positions are all in it. The result
    is opened again with transformers alone, and its logits are compared with the adapter's, before anything
    appears in --output.
    """
    require("train", "torch", "transformers", "peft", "safetensors")
    prepare_libraries()
    from rich.console import Console

    from sinklora.merge import merge_adapter
    from sinklora.progress import progress_bars

    console = Console()
    with option_errors(model="ADAPTER"), progress_bars(console) as begin:
        result = merge_adapter(
            adapter,
            output,
            base=base,
            dtype=dtype,
            shard_size=shard_size,
            device=device,
            context=context,
            rope_factor=rope_factor,
            begin=begin,
        )
    _print(console, result)


def _print(console: object, result: Merged) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    table = Table(show_header=False)
    check = result.check
    tied = ", tied to the output layer" if result.tied else ""
    reach = f", {result.context} tokens" if result.context is not None else ""
    for name, value in (
        ("adapter", str(result.adapter)),
        ("base", result.base),
        ("weights", f"{result.parameters:,} in {result.dtype}, summed in float32"),
        ("vocabulary", f"{result.vocabulary} tokens{tied}"),
        ("positions", f"{result.rope}{reach}"),
        (
            "check",
            f"logits of {check.tokens} tokens differ by {check.difference:.1e} of their size; "
            f"{check.agreement:.1%} of the likeliest tokens agree",
        ),
        ("written to", str(result.output)),
    ):
        table.add_row(name, value)
    console.print(table)
