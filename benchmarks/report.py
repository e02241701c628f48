"""Rows of results: as CSV, which keeps everything, and as the table that is printed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from shapes import Case


@dataclass
class Row:
    """One candidate on one case in one direction. Empty strings: not measured, or does not apply."""

    section: str
    direction: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    group_size: int
    candidate: str
    seconds: float | str = ""
    first_quartile: float | str = ""
    third_quartile: float | str = ""
    samples: int | str = ""
    dropped: int | str = ""
    gflops: float | str = ""
    gemm_gflops: float | str = ""
    gemm_size: int | str = ""
    extra_bytes: int | str = ""
    bound_bytes: int | str = ""
    over_s2: float | str = ""
    over_dense: float | str = ""
    bar: str = ""
    verdict: str = ""
    note: str = ""

    @classmethod
    def of(cls, case: Case, section: str, direction: str, candidate: str) -> Row:
        numbers = (case.num_heads, case.num_kv_heads, case.num_tokens, case.head_dim, case.group_size)
        return cls(section, direction, case.dtype, *numbers, candidate)

    def shape(self) -> str:
        heads = f"H{self.num_heads}/{self.num_kv_heads}"
        return f"{self.dtype} {heads} N{self.num_tokens} D{self.head_dim} G{self.group_size}"


@dataclass
class Table:
    """Left-aligned first column, right-aligned others."""

    head: Sequence[str]
    lines: list[Sequence[str]] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(len(line[i]) for line in [self.head, *self.lines]) for i in range(len(self.head))]

        def format_line(line: Sequence[str]) -> str:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            return "  ".join(cells).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([format_line(self.head), rule, *map(format_line, self.lines)])


def number(value: float | str, pattern: str = "{:.1f}", factor: float = 1.0) -> str:
    return "-" if isinstance(value, str) else pattern.format(value * factor)


def figures(rows: Iterable[Row]) -> Table:
    measured = ("ms", "quartiles", "GFLOP/s", "of GEMM", "extra MiB")
    table = Table(("case", "candidate", *measured, "x S2", "x dense", "n", "note"))
    for row in rows:
        share = "-"
        if not isinstance(row.gflops, str) and not isinstance(row.gemm_gflops, str):
            share = f"{row.gflops / row.gemm_gflops:.0%}"
        dropped = f"{row.samples}" + (f" (-{row.dropped})" if row.dropped else "")
        spread = f"{number(row.first_quartile, '{:.4g}', 1e3)}..{number(row.third_quartile, '{:.4g}', 1e3)}"
        table.lines.append(
            (
                f"{row.direction} {row.shape()}",
                row.candidate,
                number(row.seconds, "{:.4g}", 1e3),
                spread if row.seconds != "" else "-",
                number(row.gflops, "{:.0f}"),
                share,
                number(row.extra_bytes, "{:.1f}", 2**-20),
                number(row.over_s2, "{:.2f}"),
                number(row.over_dense, "{:.2f}"),
                dropped,
                row.note,
            )
        )
    return table


def write_csv(path: Path, rows: Sequence[object], machine: dict[str, str]) -> None:
    """Each row's fields, then the machine's columns. The rows are dataclass instances of one class."""
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    names = [item.name for item in fields(rows[0])]  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *machine], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = asdict(row)  # type: ignore[call-overload]
            rounded = {
                name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in cells.items()
            }
            writer.writerow(rounded | machine)
