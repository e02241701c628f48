"""Rows of the benchmarks on a CUDA device, their bars, and both as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import device
import report
import timing

OURS = "sinklora"
# Absolute bars are of this device; others are judged by the relative ones alone.
BAR_DEVICE = "H200"
MIB = 2**20


@dataclass
class Row:
    """One implementation on one case, with one state of L2. Empty strings: not measured, or does not apply.

    seconds: of one call; of a step, of one layer. over_ours: its time over ours' in the same rounds. tflops:
    of the pairs that its own function allows. gigabytes: a second, of what a step must read.
    """

    section: str
    direction: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    group_size: int | str
    implementation: str
    l2: str
    seconds: float | str = ""
    first_quartile: float | str = ""
    third_quartile: float | str = ""
    samples: int | str = ""
    tflops: float | str = ""
    gemm_tflops: float | str = ""
    gigabytes: float | str = ""
    over_ours: float | str = ""
    extra_bytes: int | str = ""
    note: str = ""

    def fill(self, taken: timing.Timing, calls: int = 1) -> None:
        """From samples of so many calls each."""
        self.seconds = taken.median / calls
        self.first_quartile, self.third_quartile = (seconds / calls for seconds in taken.quartiles)
        self.samples = len(taken.seconds)

    def case(self) -> str:
        heads = f"H{self.num_heads}/{self.num_kv_heads}"
        group = f" G{self.group_size}" if self.group_size != "" else ""
        what = f"{self.section} {self.direction}".strip()
        return f"{what} {self.dtype} {heads} N{self.num_tokens} D{self.head_dim}{group}"


def add_ratios(rows: Sequence[Row], reference: str = OURS) -> None:
    """Fills over_ours of one case's rows."""
    ours = {row.l2: row.seconds for row in rows if row.implementation == reference}
    for row in rows:
        mine = ours.get(row.l2, "")
        if not isinstance(mine, str) and not isinstance(row.seconds, str):
            row.over_ours = row.seconds / mine


@dataclass(frozen=True)
class Bar:
    """One line of the verdicts; ``got`` in the bar's own unit, None where it was not measured."""

    what: str
    got: float | None
    bar: float
    unit: str
    at_least: bool
    only_on: str = ""

    def line(self, gpu: str) -> tuple[str, str, str, str]:
        sign = ">=" if self.at_least else "<="
        bar = f"{sign} {self.bar:g}{self.unit}"
        if self.got is None:
            return self.what, "-", bar, "not measured"
        got = f"{self.got:.3g}{self.unit}"
        if self.only_on and self.only_on not in gpu:
            return self.what, got, bar, f"for {self.only_on}"
        passed = self.got >= self.bar if self.at_least else self.got <= self.bar
        return self.what, got, bar, "pass" if passed else "FAIL"


def figures(rows: Iterable[Row]) -> report.Table:
    measured = ("ms", "quartiles", "TFLOP/s", "of GEMM", "GB/s", "/ ours", "extra MiB", "n")
    table = report.Table(("case", "implementation", "L2", *measured, "note"))
    for row in rows:
        share = "-"
        if not isinstance(row.tflops, str) and not isinstance(row.gemm_tflops, str):
            share = f"{row.tflops / row.gemm_tflops:.0%}"
        quartiles = [report.number(x, "{:.4g}", 1e3) for x in (row.first_quartile, row.third_quartile)]
        table.lines.append(
            (
                row.case(),
                row.implementation,
                row.l2,
                report.number(row.seconds, "{:.4g}", 1e3),
                "..".join(quartiles) if row.seconds != "" else "-",
                report.number(row.tflops, "{:.0f}"),
                share,
                report.number(row.gigabytes, "{:.0f}"),
                report.number(row.over_ours, "{:.2f}"),
                report.number(row.extra_bytes, "{:.1f}", 1 / MIB),
                str(row.samples or "-"),
                row.note,
            )
        )
    return table


def verdicts(bars: Iterable[Bar], gpu: str) -> report.Table:
    table = report.Table(("bar (cold L2)", "got", "bar", "verdict"))
    table.lines += [bar.line(gpu) for bar in bars]
    return table


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The measured row with cold L2 and these fields."""
    for row in rows:
        measured = row.l2 == device.COLD and not isinstance(row.seconds, str)
        if measured and all(getattr(row, name) == value for name, value in wanted.items()):
            return row
    return None
