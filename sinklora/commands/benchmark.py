"""sinklora benchmark"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinklora.cli import ConfigOption
from sinklora.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from sinklora.benchmark import BenchmarkSettings, Timing


def benchmark(
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence, a multiple of the group size.")] = 4096,
    group_size: Annotated[int, typer.Option(help="Tokens in a group.")] = 1024,
    sinks: Annotated[int, typer.Option(help="Sink tokens of SF-Attn.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the table shows medians.")] = 7,
    threads: Annotated[
        int | None, typer.Option(help="Threads of every attention.", show_default="what torch uses")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="CSV file for the times.", show_default="the terminal only")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Time SF-Attn, LongLoRA's S2 form over SDPA and full attention by SDPA, forward and with backward."""
    require("torch", "torch")
    from rich.console import Console

    from sinklora.benchmark import BenchmarkSettings, run
    from sinklora.progress import progress_bars

    settings = BenchmarkSettings(
        tokens=tokens,
        group_size=group_size,
        num_sink_tokens=sinks,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        rounds=rounds,
        seed=seed,
    )
    _set_threads(threads)
    console = Console(highlight=False)
    with progress_bars(console) as begin:
        timings = run(settings, begin("rounds", rounds + 1))
    _show(timings, settings, console)
    if output is not None:
        _write(timings, settings, output)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)


def _show(timings: list[Timing], settings: BenchmarkSettings, console: Console) -> None:
    import torch
    from rich.table import Table

    import sinklora

    rival = next(timing for timing in timings if timing.name.startswith("S2"))
    table = Table()
    for index, header in enumerate(("attention", "forward ms", "x S2", "forward+backward ms", "x S2")):
        table.add_column(header, justify="left" if index == 0 else "right")
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.forward_ms:.2f}",
            f"{rival.forward_ms / timing.forward_ms:.2f}",
            f"{timing.training_ms:.2f}",
            f"{rival.training_ms / timing.training_ms:.2f}",
        )
    console.print(table)
    level = sinklora.info()["cpu_level"]
    console.print(
        f"{settings.dtype}, batch {settings.batch}, {settings.tokens} tokens, "
        f"groups of {settings.group_size}, {settings.heads} heads ({settings.kv_heads} key/value), "
        f"head size {settings.head_dim}; {level}, {torch.get_num_threads()} threads. "
        f"Medians of {settings.rounds} interleaved rounds."
    )
    console.print("x S2: how many times as fast as the S2 form.")


def _write(timings: list[Timing], settings: BenchmarkSettings, output: Path) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            rows = [{**dataclasses.asdict(timing), **dataclasses.asdict(settings)} for timing in timings]
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
