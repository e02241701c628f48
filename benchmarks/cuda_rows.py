"""Rows of the static proof: one for each kernel and part, and both as tables."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import cuda_cubin
import cuda_model
import cuda_sass
import report

# The other classes are printed only where a loop has them.
FIRST = ("HMMA", "MUFU", "LDSM", "LDGSTS", "FFMA", "FADD", "FMUL", "FMNMX", "F2FP", "SHFL", "BAR")


@dataclass
class Report:
    """What is known of one kernel. shared: static and dynamic bytes; None where no header was asked."""

    name: str
    kernel: cuda_cubin.Kernel
    function: cuda_sass.Function
    spills: cuda_cubin.Spills | None = None
    shared: int | None = None
    loops: list[cuda_sass.Loop] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loops = cuda_sass.loops(self.function)

    @functools.cached_property
    def steady(self) -> cuda_sass.Loop | None:
        return cuda_sass.steady_loop(self.loops)

    def uses_shared(self) -> bool:
        kinds = {item.kind for item in self.function.instructions}
        return bool(kinds & {"LDSM", "LDS", "STS", "LDGSTS"})

    def predictions(self) -> list[tuple[cuda_model.Part, cuda_model.Occupancy, cuda_model.Prediction | None]]:
        found = []
        for part in cuda_model.PARTS:
            threads = self.kernel.threads or 1024
            fits = cuda_model.occupancy(part, self.kernel.registers, self.shared or 0, threads)
            prediction = cuda_model.predict(self.steady.path, part, fits.warps) if self.steady else None
            found.append((part, fits, prediction))
        return found


@dataclass
class Row:
    """One kernel on one part. Empty strings: unknown, or does not apply.

    Counts are those of the steady loop, once round, for one warp. best and worst are shares of the part's
    dense peak (of float32's where the loop has no tensor-core instruction).
    """

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_bytes: int | str
    local_accesses: int
    shared_bytes: int | str
    threads: int
    issued: int | str
    issued_per_hmma: float | str
    counts: str
    part: str
    blocks: int
    warps: int
    occupancy_limit: str
    limit: str
    best: float | str
    worst: float | str
    best_tflops: float | str


def rows(item: Report, arch: str) -> list[Row]:
    count = item.steady.count() if item.steady else {}
    issued = len(item.steady.path) if item.steady else ""
    spilled = item.spills.stores + item.spills.loads if item.spills else ""
    common = (
        item.name,
        arch,
        item.kernel.registers,
        item.kernel.stack,
        spilled,
        item.function.local_accesses(),
        "" if item.shared is None else item.shared,
        item.kernel.threads,
        issued,
        int(issued) / count["HMMA"] if count.get("HMMA") else "",
        " ".join(f"{name}:{number}" for name, number in sorted(count.items())),
    )
    found = []
    for part, fits, prediction in item.predictions():
        known: tuple[float | str, ...] = ("", "", "")
        if prediction:
            known = (prediction.best, prediction.worst, prediction.tflops()[1])
        limit = prediction.limit if prediction else ""
        found.append(Row(*common, part.name, fits.blocks, fits.warps, fits.limit, limit, *known))
    return found


def loop_table(item: Report) -> report.Table:
    """A line for each loop: counts of its steady path, once round. A star marks the steady loop."""
    counts = [loop.count() for loop in item.loops]
    others = [name for name, _ in cuda_sass.CLASSES if name not in FIRST] + ["other"]
    shown = [*FIRST, *(name for name in others if any(count[name] for count in counts))]
    table = report.Table(("loop", "issued", "longest", "per HMMA", *shown))
    for loop, count in zip(item.loops, counts, strict=True):
        star = "*" if loop is item.steady else ""
        place = f"{'  ' * (loop.depth - 1)}{loop.path[0].address:04x}-{loop.path[-1].address:04x}{star}"
        per = f"{len(loop.path) / count['HMMA']:.2f}" if count["HMMA"] else "-"
        cells = [str(count[name]) for name in shown]
        table.lines.append((place, str(len(loop.path)), str(loop.longest), per, *cells))
    return table


def part_table(item: Report) -> report.Table:
    """Clocks of a quarter on each pipe for one warp's way round, occupancy and the shares of peak."""
    pipes = (cuda_model.TENSOR, cuda_model.XU, cuda_model.FMA, cuda_model.ALU, cuda_model.SHARED)
    table = report.Table(
        ("part", "blocks", "warps", "by", *pipes, "issue", "limit", "share of peak", "TFLOP/s")
    )
    for part, fits, prediction in item.predictions():
        cells = [part.name, str(fits.blocks), str(fits.warps), fits.limit]
        if prediction is None:
            table.lines.append((*cells, *["-"] * (len(pipes) + 4)))
            continue
        busy = [f"{prediction.clocks.get(pipe, 0):.0f}" for pipe in (*pipes, cuda_model.ISSUE)]
        low, high = prediction.tflops()
        share = f"{prediction.worst:.0%}..{prediction.best:.0%}"
        table.lines.append((*cells, *busy, prediction.limit, share, f"{low:.0f}..{high:.0f}"))
    return table


def summary(items: Sequence[Report]) -> report.Table:
    """A line for each kernel: what the guards look at, the share of peak on each part, what limits it."""
    names = [part.name for part in cuda_model.PARTS]
    table = report.Table(
        ("kernel", "regs", "stack", "spills", "shared", "threads", "issued", "per HMMA", *names)
    )
    for item in items:
        steady = item.steady
        tensor = steady.count()["HMMA"] if steady else 0
        spilled = str(item.spills.stores + item.spills.loads) if item.spills else "-"
        cells = [item.name, str(item.kernel.registers), str(item.kernel.stack), spilled]
        cells += [
            "-" if item.shared is None else f"{item.shared / 1024:.1f} KB",
            str(item.kernel.threads or "-"),
            str(len(steady.path)) if steady else "-",
            f"{len(steady.path) / tensor:.2f}" if steady and tensor else "-",
        ]
        for _, _, prediction in item.predictions():
            if prediction is None:
                cells.append("-")
            else:
                share = f"{100 * prediction.worst:.0f}..{prediction.best:.0%}"
                cells.append(f"{share} {prediction.limit}")
        table.lines.append(cells)
    return table
