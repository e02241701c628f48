"""How fast is one attention call? sinklora against torch's ways, taking turns in one process.

usage: python benchmarks/bench_attention.py [--quick] [--output benchmarks/results/DATE-attention.csv]
       python benchmarks/bench_attention.py --device cuda [--output .../DATE-attention-cuda.csv]

Prints a table (medians, quartiles, GFLOP/s of each function's own allowed pairs, share of the torch.mm rate
measured in the same rounds, peak extra memory) and the bars with pass or fail. What each rival computes:
rivals.py. On a CUDA device the rivals run over each of SDPA's backends, with cold and warm L2 (device.py).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import device
import device_attention
import machine
import memory
import report
import timing
import tiny
import torch
from shapes import (
    BOTH,
    FLOPS_PER_PAIR,
    FORWARD,
    NAMES,
    OURS,
    S2_FORMS,
    Candidate,
    Case,
    Inputs,
    candidate,
    make_call,
)

import sinklora

MIB = 2**20
GEMM_SIZE = 2048
ESTIMATE_TOKENS = 1024


@dataclass(frozen=True)
class Bar:
    """A speed-up to reach over "s2" (the faster form) or "dense", for H=8, Hkv 8 and 2, D=128, G=2048."""

    direction: str
    dtype: str
    rival: str
    least: float
    num_tokens: int
    num_threads: int = 2
    # Without AMX torch's bfloat16 products run on AVX-512; with it they are several times faster.
    only_without_amx: bool = False


BARS = (
    Bar(FORWARD, "float32", "s2", 1.6, 8192),
    Bar(FORWARD, "bfloat16", "s2", 2.4, 8192, only_without_amx=True),
    Bar(BOTH, "float32", "s2", 1.5, 8192),
    Bar(BOTH, "bfloat16", "s2", 2.0, 8192, only_without_amx=True),
    Bar(BOTH, "float32", "dense", 9.0, 16384),
    Bar(BOTH, "bfloat16", "dense", 13.0, 16384, only_without_amx=True),
)
# Peak extra memory of forward+backward: gradients, lse, delta and this much more. The output counts as extra.
MEMORY_SLACK = 64 * MIB
# Speed over SDPA's call on a tiny input.
TINY_BAR = 1.0

SHAPES = ("8/8/8192/128/2048", "8/2/8192/128/2048", "8/8/8192/64/2048", "8/2/8192/64/2048")
LONG_SHAPES = ("8/8/16384/128/2048", "8/2/16384/128/2048")


def matching_bars(case: Case, direction: str, threads: int) -> list[Bar]:
    shape = (case.num_heads, case.head_dim, case.group_size)
    if shape != (8, 128, 2048) or case.num_kv_heads not in (8, 2):
        return []
    wanted = (direction, case.dtype, case.num_tokens, threads)
    return [
        bar
        for bar in BARS
        if (bar.direction, bar.dtype, bar.num_tokens, bar.num_threads) == wanted
        and not (bar.only_without_amx and machine.has_amx())
    ]


@functools.cache
def gemm_size(dtype: torch.dtype) -> int:
    """2048, or less where torch.mm of this dtype is so slow that one product would take seconds."""
    size = 256
    a = torch.ones(size, size, dtype=dtype)
    torch.mm(a, a)
    seconds = min(timing.sample(lambda: torch.mm(a, a))[0] for _ in range(3))
    while size < GEMM_SIZE and seconds * 8 < 2.0:
        size, seconds = size * 2, seconds * 8
    return size


def estimate(name: str, case: Case, direction: str) -> float:
    """Seconds that one call would take, from a smaller one, which is if anything slower for its size."""
    small = case.smaller(ESTIMATE_TOKENS)
    little = candidate(name, small)
    call = make_call(little.attention, Inputs.of(small), direction)
    call()
    seconds, _ = timing.sample(call)
    return seconds * candidate(name, case).pairs / little.pairs


def prepare(name: str, case: Case, direction: str, limit: float) -> Candidate | str:
    """The candidate, called once so that it is compiled, or the reason why it is left out."""
    if name == "flex" and direction == BOTH:
        return "skipped: torch has no FlexAttention backward on CPUs"
    try:
        if name == "flex":
            chosen = candidate(name, case)
            make_call(chosen.attention, Inputs.of(case), direction)()
            return chosen
        seconds = estimate(name, case, direction)
        if seconds > limit:
            return f"skipped: about {seconds:.0f} s a call, more than --limit {limit:g}"
        return candidate(name, case)
    except Exception as error:  # Compilers and dispatchers raise anything; the reason is shown in the table.
        if name == OURS:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        return f"skipped: {type(error).__name__}: {first[:100]}"


def measure(
    case: Case, direction: str, names: list[str], options: argparse.Namespace, section: str
) -> list[report.Row]:
    """The rows of one case in one direction, ours first."""
    prepared = {name: prepare(name, case, direction, options.limit) for name in names}
    inputs = Inputs.of(case)
    ready = {name: item for name, item in prepared.items() if isinstance(item, Candidate)}
    calls = {name: make_call(item.attention, inputs, direction) for name, item in ready.items()}
    size = gemm_size(case.torch_dtype)
    a, b = (torch.randn(size, size).to(case.torch_dtype) for _ in range(2))
    calls["gemm"] = lambda: torch.mm(a, b)
    rounds = options.rounds if section == "attention" else max(3, options.rounds // 2)
    timings = timing.interleave(calls, rounds=rounds, drop_disturbed=not options.keep_disturbed)
    del inputs, calls
    gemm = 2 * size**3 / timings["gemm"].median / 1e9
    rows = []
    for name in names:
        row = report.Row.of(case, section, direction, name)
        row.gemm_gflops, row.gemm_size = gemm, size
        rows.append(row)
        if name not in ready:
            row.note = str(prepared[name])
            continue
        taken = timings[name]
        row.seconds, (row.first_quartile, row.third_quartile) = taken.median, taken.quartiles
        row.samples, row.dropped = len(taken.seconds), taken.dropped
        row.gflops = FLOPS_PER_PAIR[direction] * case.head_dim * ready[name].pairs / taken.median / 1e9
        if not taken.quiet:
            row.note = timing.BUSY
        if direction == BOTH and section == "attention" and not options.no_memory:
            add_memory(row, case, options.threads)
    add_speedups(rows)
    judge(rows[0], case, direction, options.threads)
    return rows


def add_memory(row: report.Row, case: Case, threads: int) -> None:
    shape = f"{case.num_heads}/{case.num_kv_heads}/{case.num_tokens}/{case.head_dim}/{case.group_size}"
    row.bound_bytes = case.gradient_bytes() + 2 * case.row_bytes() + MEMORY_SLACK
    try:
        row.extra_bytes = memory.measure(row.candidate, case.dtype, shape, BOTH, threads)
    except (OSError, RuntimeError) as error:
        row.note = f"{row.note} {error}".strip()


def add_speedups(rows: list[report.Row]) -> None:
    """Fills ours' over_s2, against the faster form, and over_dense."""
    seconds = {row.candidate: row.seconds for row in rows if not isinstance(row.seconds, str)}
    ours = seconds.get(OURS)
    forms = [seconds[name] for name in S2_FORMS if name in seconds]
    for row in rows:
        if row.candidate == OURS and ours is not None:
            row.over_s2 = min(forms) / ours if forms else ""
            row.over_dense = seconds["dense"] / ours if "dense" in seconds else ""


def judge(row: report.Row, case: Case, direction: str, threads: int) -> None:
    """Writes the bars that apply to ours' row, and whether they are reached."""
    if row.candidate != OURS:
        return
    bars, verdicts = [], []
    for bar in matching_bars(case, direction, threads):
        got = row.over_s2 if bar.rival == "s2" else row.over_dense
        bars.append(f"{bar.rival} >= {bar.least:g}x")
        verdicts.append("not measured" if isinstance(got, str) else ("pass" if got >= bar.least else "FAIL"))
    standard = (case.num_heads, case.num_tokens, case.head_dim, case.group_size) == (8, 8192, 128, 2048)
    if standard and not isinstance(row.extra_bytes, str) and not isinstance(row.bound_bytes, str):
        bars.append(f"extra <= {row.bound_bytes / MIB:.1f} MiB")
        verdicts.append("pass" if row.extra_bytes <= row.bound_bytes else "FAIL")
    row.bar, row.verdict = "; ".join(bars), "; ".join(verdicts)


def verdict_table(rows: list[report.Row]) -> report.Table:
    """One line for each bar: the case, got, bar, pass or FAIL."""
    table = report.Table(("case", "got", "bar", "verdict"))
    for row in rows:
        label = f"{row.direction} {row.shape()}"
        for bar, verdict in zip(row.bar.split("; "), row.verdict.split("; "), strict=True):
            if not bar:
                continue
            if bar.startswith("extra"):
                got = report.number(row.extra_bytes, "{:.1f} MiB", 1 / MIB)
            else:
                got = report.number(row.over_s2 if bar.startswith("s2") else row.over_dense, "{:.2f}x")
            table.lines.append((label, got, bar, verdict))
    return table


def measure_dtype(dtype: str, names: list[str], options: argparse.Namespace) -> list[report.Row]:
    plan = [("attention", shape, direction) for shape in options.shapes for direction in (FORWARD, BOTH)]
    plan += [("long", shape, BOTH) for shape in options.long_shapes]
    rows: list[report.Row] = []
    for section, shape, direction in plan:
        start = time.monotonic()
        # FlexAttention has no backward here; it only gets a row where there is a forward beside it.
        here = names if section == "attention" else [name for name in names if name != "flex"]
        rows += measure(Case.parse(dtype, shape), direction, here, options, section)
        seconds = time.monotonic() - start
        print(f"measured {direction} {dtype} {shape} in {seconds:.0f} s", file=sys.stderr, flush=True)
    if not options.no_tiny:
        rows += tiny.measure(dtype, options.rounds, TINY_BAR)
    return rows


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default cpu)")
    on_device = first.parse_known_args(given)[0].device == "cuda"
    names = device_attention.NAMES if on_device else NAMES
    shapes = device_attention.SHAPES if on_device else SHAPES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, parents=[first])
    add = parser.add_argument
    add("--dtypes", nargs="+", default=["bfloat16"] if on_device else ["float32", "bfloat16", "float16"])
    add("--shapes", nargs="*", default=list(shapes), help=f"H/Hkv/N/D/G; default {' '.join(shapes)}")
    add("--long-shapes", nargs="*", default=list(LONG_SHAPES), help="forward+backward, fewer rounds (CPU)")
    add("--candidates", nargs="+", default=list(names), choices=names, help="default: all")
    rounds = 50 if on_device else 7
    add("--rounds", type=int, default=rounds, help=f"samples of each candidate (default {rounds})")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    add("--limit", type=float, default=30.0, help="leave out calls of more seconds (default 30)")
    add("--keep-disturbed", action="store_true", help="keep samples during which other processes were busy")
    add("--no-memory", action="store_true", help="do not measure memory (a process for each candidate)")
    add("--no-tiny", action="store_true", help="do not time the tiny call")
    add("--quick", action="store_true", help="small shapes, 3 rounds, no FlexAttention: tries the script out")
    add("--output", type=Path, help="CSV file to write; default: none")
    options = parser.parse_args(given)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads: expected at least 1")
    if on_device:
        if options.quick:
            options.shapes, options.rounds = list(device_attention.QUICK_SHAPES), 3
        if reason := device.refusal():
            parser.error(reason)
    elif options.quick:
        options.dtypes, options.rounds = ["float32", "bfloat16"], 3
        options.shapes, options.long_shapes = ["8/2/1024/64/256"], ["8/2/2048/64/256"]
        options.candidates = [name for name in options.candidates if name != "flex"]
    return options


def main() -> None:
    options = parse_arguments()
    if options.device == "cuda":
        device_attention.main(options)
        return
    torch.set_num_threads(options.threads)
    sinklora.set_num_threads(options.threads)
    facts = machine.describe(options.threads)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    names = [name for name in NAMES if name in options.candidates]
    rows: list[report.Row] = []
    for dtype in options.dtypes:
        rows += measure_dtype(dtype, names, options)
    print(report.figures(rows), verdict_table(rows), sep="\n\n")
    if any(row.dropped for row in rows):
        print("(-k): k samples dropped and taken again, because other processes were busy")
    if machine.has_amx():
        print("This CPU has AMX: bfloat16 has no bar here; the table shows where it stands.")
    if options.output:
        report.write_csv(options.output, rows, facts)
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
