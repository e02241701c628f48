"""bench_h2o.py --device cuda: prompts with scores, and steps over caches, on one GPU.

A prompt is timed like attention, with cold and warm L2. A step runs from a CUDA graph, in which caches take
turns: so many of them that each is out of L2 again when its next turn comes ("cold"), or one alone ("warm").
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import device
import device_rows
import report
import rivals_h2o
import torch
from device_attention import BACKENDS, over_backend
from device_rows import BAR_DEVICE, OURS, Bar, Row
from h2o_ways import CHUNKED, FORWARD, SCORES, STEP_WAYS, Case, num_cold_caches, prompt_call, step_call

PROMPT, STEP = "prompt", "step"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
TOKENS, SLOTS = (8192, 32768), (4096, 32768)
SDPA_WAYS = {f"sdpa {backend}, no scores": name for backend, name in BACKENDS.items()}
PROMPT_WAYS = (OURS, FORWARD, SCORES, CHUNKED, *SDPA_WAYS)
NOT_CAPTURED = "published"
# The score pass may take this share of the causal forward's time; a step so many microseconds a layer.
MOST_SCORES, MOST_STEP = 0.9, 15.0
BAR_TOKENS, BAR_SLOTS = 32768, 4096


def case_of(dtype: str, tokens: int, quick: bool, place: str) -> Case:
    if quick:
        return Case(dtype, 8, 2, tokens, 64, place)
    return Case(dtype, NUM_HEADS, NUM_KV_HEADS, tokens, HEAD_DIM, place)


def device_prompt_call(way: str, case: Case) -> Callable[[], object]:
    if way not in SDPA_WAYS:
        return prompt_call(way, case)
    query = case.random(case.num_heads, case.num_tokens)
    key, value = (case.random(case.num_kv_heads, case.num_tokens) for _ in range(2))
    return lambda: over_backend(rivals_h2o.prompt_sdpa, SDPA_WAYS[way], query, key, value)


def new_row(section: str, case: Case, way: str, l2: str) -> Row:
    numbers = (case.num_heads, case.num_kv_heads, case.num_tokens, case.head_dim, "")
    return Row(section, "", case.dtype, *numbers, way, l2)


def without_state(call: Callable[[], object]) -> device.Call:
    return device.Call(lambda _: call())


def tried(make: Callable[[], Callable[[], object]], way: str) -> tuple[Callable[[], object] | None, str]:
    """The call, run once; or None and why it is left out."""
    try:
        call = make()
        call()
        return call, ""
    except Exception as error:  # Dispatchers and allocators raise anything: see the note.
        if way in (OURS, FORWARD, SCORES):
            raise
        lines = str(error).strip().splitlines() or [""]
        return None, f"skipped: {type(error).__name__}: {lines[0][:100]}"


def measure_prompt(case: Case, options: argparse.Namespace, timer: device.Timer) -> list[Row]:
    calls: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for way in PROMPT_WAYS:
        call, notes[way] = tried(lambda way=way: device_prompt_call(way, case), way)  # type: ignore[misc]
        if call:
            calls[way] = call
    timings = device.interleave(
        {way: without_state(call) for way, call in calls.items()}, timer, rounds=options.rounds
    )
    rows = []
    for way in PROMPT_WAYS:
        for cache in device.CACHES if way in calls else ("",):
            row = new_row(PROMPT, case, way, cache)
            row.note = notes[way]
            rows.append(row)
            if way in calls:
                row.fill(timings[way, cache])
                if cache == device.COLD and not options.no_memory:
                    row.extra_bytes = device.peak_extra_bytes(calls[way])
    device_rows.add_ratios(rows)
    return rows


def measure_step(
    case: Case,
    options: argparse.Namespace,
    timer: device.Timer,
    capture: Callable[[Callable[[], object]], Callable[[], object]] = device.captured,
) -> list[Row]:
    """Rows of cold caches, so many that they fill L2, and of a single warm one."""
    numbers = {device.COLD: num_cold_caches(case), device.WARM: 1}
    calls: dict[str, device.Call] = {}
    for way in STEP_WAYS:
        if way != NOT_CAPTURED:
            for cache, number in numbers.items():
                calls[f"{way}, {cache}"] = without_state(capture(step_call(way, case, number)))
    # What is cold or warm here is decided by the number of caches, not by the timer.
    timings = device.interleave(calls, timer, rounds=options.rounds, caches=(device.WARM,))
    rows = []
    for way in STEP_WAYS:
        if way == NOT_CAPTURED:
            rows.append(new_row(STEP, case, way, ""))
            rows[-1].note = "skipped: reads values on the host, which a graph cannot"
            continue
        for cache, number in numbers.items():
            row = new_row(STEP, case, way, cache)
            row.fill(timings[f"{way}, {cache}", device.WARM], number)
            row.gigabytes = case.cache_bytes() / float(row.seconds) / 1e9
            rows.append(row)
    device_rows.add_ratios(rows)
    return rows


def bars(rows: Iterable[Row]) -> list[Bar]:
    rows = list(rows)
    heads = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    prompt = {"section": PROMPT, "num_tokens": BAR_TOKENS, **heads}
    forward = device_rows.find(rows, implementation=FORWARD, **prompt)
    scores = device_rows.find(rows, implementation=SCORES, **prompt)
    share = float(scores.seconds) / float(forward.seconds) if forward and scores else None
    step = device_rows.find(rows, section=STEP, num_tokens=BAR_SLOTS, implementation=OURS, **heads)
    microseconds = float(step.seconds) * 1e6 if step else None
    heads_text = f"H{NUM_HEADS}/{NUM_KV_HEADS} D{HEAD_DIM} bfloat16"
    return [
        Bar(f"scores of N{BAR_TOKENS} over the causal forward, {heads_text}", share, MOST_SCORES, "x", False),
        Bar(f"step over {BAR_SLOTS} slots, {heads_text}", microseconds, MOST_STEP, " us", False, BAR_DEVICE),
    ]


def main(options: argparse.Namespace) -> int:
    timer = device.EventTimer()
    rows: list[Row] = []
    with torch.no_grad():
        for dtype in options.dtypes:
            plan = [(measure_prompt, tokens) for tokens in options.tokens]
            plan += [(measure_step, slots) for slots in options.slots]
            for measure, tokens in plan:
                start = time.monotonic()
                rows += measure(case_of(dtype, tokens, options.quick, "cuda"), options, timer)
                torch.cuda.empty_cache()
                seconds = time.monotonic() - start
                print(f"measured {rows[-1].case()} in {seconds:.0f} s", file=sys.stderr, flush=True)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    return show(rows, device.describe(lambda: torch.mm(a, a)), options.output, fail=options.bars)


def show(rows: list[Row], facts: dict[str, str], output: Path | None, fail: bool = False) -> int:
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    verdicts = device_rows.verdicts(bars(rows), facts["gpu"])
    print(device_rows.figures(rows), verdicts, sep="\n\n")
    if output:
        report.write_csv(output, rows, facts)
        print(f"written: {output}")
    return int(fail and any(line[-1] == "FAIL" for line in verdicts.lines))
