"""How fast and how small is the heavy-hitter (H2O) cache? Its operations and a whole model, beside torch's.

usage: python benchmarks/bench_h2o.py [--bars] [--quick] [--output benchmarks/results/DATE-h2o.csv]
       python benchmarks/bench_h2o.py --device cuda [--output .../DATE-h2o-cuda.csv]

prompt       causal attention with the scores of every key, and its two parts, against eager attention with
             column sums and against SDPA, which has no scores; peak extra memory of each
step         one decoded token with scores and eviction over N slots, on caches that are cold: enough of them
             take turns to push each other out of the processor's caches
model's ...  a random LLaMA in bfloat16 with a prompt: the prompt, then tokens one by one, with DynamicCache
             and with budgets; bytes that the cache holds, and peak memory

Prints a table (medians of interleaved runs) and the bars with pass or fail. --bars measures only what the
bars need and exits with status 1 where one fails. What each rival computes: rivals_h2o.py. On a CUDA device:
prompts and steps (device_h2o.py), no whole model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import device
import device_h2o
import h2o_model
import h2o_rows
import machine
import memory
import report
import timing
import torch
from h2o_rows import BAR_SHAPE, PROMPT, STEP, Row
from h2o_ways import (
    CHUNKED,
    EAGER,
    OURS,
    PROMPT_WAYS,
    READS,
    SDPA,
    STEP_WAYS,
    Call,
    Case,
    num_cold_caches,
    prompt_call,
    skip_reason,
    step_call,
)

import sinklora

TOKENS = (1024, 4096, 8192, 32768)
SLOTS = (512, 4096, 32768)
# So that the whole takes minutes: fewer rounds from here on, longer prompts in one dtype only, and memory
# only of prompts that are long enough to tell and take a few seconds.
LONG_TOKENS, LONG_DTYPE = 8192, "bfloat16"
MEMORY_TOKENS, MEMORY_SECONDS = 4096, 5.0
MEMORY_WAYS = (OURS, EAGER, CHUNKED, SDPA)
ESTIMATE_TOKENS = 1024
# In place of a model's 4096 tokens with --quick: 4 steps after 64 tokens.
QUICK_CACHES = 4
QUICK_MODEL = h2o_model.Shape(layers=1, num_heads=4, num_kv_heads=2, head_dim=16, prompt=64, new_tokens=4)


def prompt_row(row: Row, case: Case, options: argparse.Namespace) -> Call | None:
    """The call to time; where there is none the row's note says why."""
    row.note = skip_reason(row.way, case)
    if not row.note and case.num_tokens > LONG_TOKENS:
        small = Case(case.dtype, case.num_heads, case.num_kv_heads, ESTIMATE_TOKENS, case.head_dim)
        call = prompt_call(row.way, small)
        call()
        # Four times the pairs for twice the tokens.
        seconds = timing.sample(call)[0] * (case.num_tokens / ESTIMATE_TOKENS) ** 2
        if seconds > options.limit:
            row.note = f"skipped: about {seconds:.0f} s a call, more than --limit {options.limit:g}"
    return None if row.note else prompt_call(row.way, case)


def measure(section: str, case: Case, options: argparse.Namespace) -> list[Row]:
    """The rows of one case of prompt or step."""
    caches = QUICK_CACHES if options.quick else num_cold_caches(case)
    rows = [Row.of(section, case, way) for way in (PROMPT_WAYS if section == PROMPT else STEP_WAYS)]
    calls: dict[str, Call] = {}
    for row in rows:
        if section == STEP:
            calls[row.way] = step_call(row.way, case, caches)
        elif call := prompt_row(row, case, options):
            calls[row.way] = call
    long = section == PROMPT and case.num_tokens >= LONG_TOKENS
    with torch.no_grad():
        timings = timing.interleave(
            calls,
            rounds=max(1, options.rounds // 3) if long else options.rounds,
            warmup=0 if long else 1,
            drop_disturbed=not options.keep_disturbed,
        )
    calls.clear()
    for row in rows:
        if row.way not in timings:
            continue
        taken, each = timings[row.way], caches if section == STEP else 1
        row.seconds = taken.median / each
        row.first_quartile, row.third_quartile = (seconds / each for seconds in taken.quartiles)
        row.samples, row.dropped = len(taken.seconds), taken.dropped
        row.note = "" if taken.quiet else timing.BUSY
        if section == STEP:
            row.gigabytes = case.cache_bytes() / row.seconds / 1e9
        elif (
            row.way in MEMORY_WAYS
            and case.num_tokens >= MEMORY_TOKENS
            and row.seconds < MEMORY_SECONDS
            and not options.no_memory
        ):
            add_memory(row, case, options.threads)
    h2o_rows.add_ratios(rows)
    return rows


def add_memory(row: Row, case: Case, threads: int) -> None:
    try:
        arguments = ["--worker", row.way, case.dtype, case.shape(), str(threads)]
        row.extra_bytes = int(memory.run_alone(__file__, arguments, threads))
    except (OSError, RuntimeError) as error:
        row.note = f"{row.note} {error}".strip()


def work(way: str, dtype: str, shape: str, threads: str) -> None:
    """A worker: prints the peak extra bytes of one call."""
    torch.set_num_threads(int(threads))
    sinklora.set_num_threads(int(threads))
    case = Case.parse(dtype, shape)
    with torch.no_grad():
        prompt_call(way, Case(dtype, case.num_heads, case.num_kv_heads, 256, case.head_dim))()
        print(memory.peak_extra_bytes(prompt_call(way, case)))


def plan(options: argparse.Namespace) -> list[tuple[str, Case]]:
    heads, kv_heads, tokens, dim = BAR_SHAPE
    found = []
    for dtype in options.dtypes:
        for length in [tokens] if options.bars else options.tokens:
            if length <= LONG_TOKENS or dtype == LONG_DTYPE:
                found.append((PROMPT, Case(dtype, heads, kv_heads, length, dim)))
        for length in [tokens] if options.bars else options.slots:
            found.append((STEP, Case(dtype, heads, kv_heads, length, dim)))
    return found


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default cpu)")
    on_device = first.parse_known_args(given)[0].device == "cuda"
    tokens, slots = (device_h2o.TOKENS, device_h2o.SLOTS) if on_device else (TOKENS, SLOTS)
    rounds = 50 if on_device else 7
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, parents=[first])
    add = parser.add_argument
    add("--dtypes", nargs="+", default=["bfloat16"] if on_device else ["float32", "bfloat16"])
    add("--tokens", type=int, nargs="*", default=list(tokens), help="lengths of prompts")
    add("--slots", type=int, nargs="*", default=list(slots), help="sizes of caches to decode over")
    add(
        "--caches", nargs="*", default=list(h2o_model.WAYS), choices=h2o_model.WAYS, help="of the whole model"
    )
    add("--rounds", type=int, default=rounds, help=f"of each (default {rounds}; fewer of what takes long)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    add("--limit", type=float, default=20.0, help="leave out calls of more seconds (default 20)")
    add("--keep-disturbed", action="store_true", help="keep samples during which other processes were busy")
    add("--no-memory", action="store_true", help="do not measure memory (a process for each way)")
    add("--bars", action="store_true", help="only what the bars need; exit status 1 where one fails")
    add("--quick", action="store_true", help="small shapes, 2 rounds: tries the script out")
    add("--output", type=Path, help="CSV file to write; default: none")
    add("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads: expected at least 1")
    options.model = h2o_model.Shape()
    if options.quick:
        options.tokens, options.slots, options.rounds = [256], [128], 2
        options.model = QUICK_MODEL
    if on_device and (reason := device.refusal()):
        parser.error(reason)
    if options.bars:
        options.caches = [way for way in options.caches if way in (h2o_rows.DYNAMIC, h2o_rows.FIFTH)]
    return options


def main() -> int:
    options = parse_arguments()
    if options.device == "cuda":
        return device_h2o.main(options)
    if options.worker:
        work(*options.worker)
        return 0
    torch.set_num_threads(options.threads)
    sinklora.set_num_threads(options.threads)
    facts = machine.describe(options.threads)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    rows: list[Row] = []
    for section, case in plan(options):
        start = time.monotonic()
        rows += measure(section, case, options)
        seconds = time.monotonic() - start
        print(
            f"measured {section} {case.dtype} {case.shape()} in {seconds:.0f} s", file=sys.stderr, flush=True
        )
    if options.caches:
        rows += h2o_model.measure(options.model, options)
    verdicts = h2o_rows.verdict_table(rows)
    print(h2o_rows.figures(rows), verdicts, sep="\n\n")
    if any(row.way in READS for row in rows):
        print("of read: of the faster of torch's two reads of as many bytes, timed in the same rounds")
    if options.output:
        report.write_csv(options.output, rows, facts)
        print(f"written: {options.output}")
    return int(options.bars and any(line[-1] == "FAIL" for line in verdicts.lines))


if __name__ == "__main__":
    sys.exit(main())
