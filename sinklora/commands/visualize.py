"""sinklora visualize"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PICTURES = (".png", ".svg", ".pdf")


def visualize(
    group_size: Annotated[int, typer.Option(help="Tokens in a group.")] = 16,
    sinks: Annotated[int, typer.Option(help="Sink tokens at the start, which every query sees.")] = 4,
    fraction: Annotated[float, typer.Option(help="Share of the heads whose groups are shifted.")] = 0.25,
    shift: Annotated[
        int | None, typer.Option(help="How far those groups are shifted.", show_default="half a group")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence.")] = 64,
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="A query sees no later token.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(help="Picture to write (.png, .svg or .pdf).", show_default="the terminal, as text"),
    ] = None,
) -> None:
    """Draw who may see whom, for each kind of head: a picture, or block characters on the terminal."""
    from sinklora import SFPattern, plots

    pattern = SFPattern(
        group_size=group_size, num_sink_tokens=sinks, shifted_fraction=fraction, shift=shift, causal=causal
    )
    if output is None:
        import shutil

        typer.echo(
            plots.text_pattern(pattern, heads, tokens, width=max(2, shutil.get_terminal_size().columns))
        )
        return
    if output.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"output: expected a name that ends in {', '.join(PICTURES)}, got {output}")
    figure = plots.plot_pattern(pattern, heads, tokens)
    # Written beside it first: a picture that is there is whole.
    partial = output.with_name(f".{output.stem}.partial{output.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    typer.echo(f"wrote {output}")
