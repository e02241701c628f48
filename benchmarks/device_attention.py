"""bench_attention.py --device cuda: SF-Attn against torch's backends and FlexAttention on one GPU."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import device
import device_rows
import report
import rivals
import torch
from device_rows import BAR_DEVICE, OURS, Bar, Row
from shapes import Candidate, Case, Inputs, candidate
from tables import RESULTS, newest

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS = (FORWARD, BACKWARD)
# FLOPs of one allowed pair, in head_dims.
FLOPS_PER_PAIR = {FORWARD: 4, BACKWARD: 10}
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
S2_FORMS = ("s2_one_batch", "s2_parts")
# LongLoRA's form with its copies and full attention, each over both backends; then our own pattern.
S2_NAMES = tuple(f"{form} {backend}" for form in S2_FORMS for backend in BACKENDS)
DENSE_NAMES = tuple(f"dense {backend}" for backend in BACKENDS)
FLEX = "flex"
NAMES = (OURS, *S2_NAMES, *DENSE_NAMES, FLEX)
SHAPES = ("32/32/8192/128/2048", "32/32/32768/128/2048", "32/32/32768/128/8192", "32/8/32768/128/2048")
QUICK_SHAPES = ("8/2/2048/64/512",)
GEMM_SIZE = 8192
# (num_tokens, group_size) -> milliseconds forward, backward: H = Hkv = 32, D = 128, bfloat16.
MILLISECONDS = {(8192, 2048): (0.45, 1.5), (32768, 2048): (1.8, 6.0), (32768, 8192): (7.0, 24.0)}


def device_candidate(name: str, case: Case, place: str) -> Candidate:
    """The candidate of that name. ValueError where the case's shape is not for it."""
    base, _, backend = name.partition(" ")
    if name == FLEX:
        import sinklora

        pattern = sinklora.SFPattern(group_size=case.group_size)
        attention = rivals.flex(pattern, case.num_heads, case.num_kv_heads, case.num_tokens, device=place)
        return Candidate(attention, candidate(OURS, case).pairs)
    plain = candidate(base, case)
    if not backend:
        return plain
    return Candidate(functools.partial(over_backend, plain.attention, BACKENDS[backend]), plain.pairs)


def over_backend(attention: rivals.Attention, backend: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The attention with torch's SDPA held to one backend, which its backward then keeps to."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return attention(*tensors)


def make_call(attention: rivals.Attention, inputs: Inputs, direction: str) -> device.Call:
    tensors = (inputs.query, inputs.key, inputs.value)
    if direction == FORWARD:

        def forward(_: Any) -> object:
            with torch.no_grad():
                return attention(*tensors)

        return device.Call(forward)
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    return device.Call(
        lambda output: torch.autograd.grad(output, leaves, inputs.grad_output), lambda: attention(*leaves)
    )


def prepared(names: Iterable[str], case: Case, inputs: Inputs) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Candidates that ran both ways once, and for the others the reason."""
    ready: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            chosen = device_candidate(name, case, inputs.query.device.type)
            for direction in DIRECTIONS:
                make_call(chosen.attention, inputs, direction)()
            if inputs.query.is_cuda:
                torch.cuda.synchronize()
            ready[name] = chosen
        except (
            Exception
        ) as error:  # Compilers and dispatchers raise anything; the reason is shown in the table.
            if name == OURS:
                raise
            lines = str(error).strip().splitlines() or [""]
            left_out[name] = f"skipped: {type(error).__name__}: {lines[0][:100]}"
    return ready, left_out


def measure(case: Case, options: argparse.Namespace, timer: device.Timer, place: str = "cuda") -> list[Row]:
    """The rows of one case, both directions, ours first."""
    inputs = Inputs.of(case, device=place)
    ready, left_out = prepared(options.candidates, case, inputs)
    size = 512 if options.quick else GEMM_SIZE
    a, b = (torch.randn(size, size, device=place).to(case.torch_dtype) for _ in range(2))
    rows: list[Row] = []
    for direction in DIRECTIONS:
        calls = {name: make_call(chosen.attention, inputs, direction) for name, chosen in ready.items()}
        calls["gemm"] = device.Call(lambda _: torch.mm(a, b))
        timings = device.interleave(calls, timer, rounds=options.rounds)
        gemm = 2 * size**3 / timings["gemm", device.WARM].median / 1e12
        here = []
        for name in options.candidates:
            for cache in device.CACHES if name in ready else ("",):
                row = new_row(case, direction, name, cache)
                row.gemm_tflops, row.note = gemm, left_out.get(name, "")
                here.append(row)
                if name not in ready:
                    continue
                row.fill(timings[name, cache])
                flops = FLOPS_PER_PAIR[direction] * case.head_dim * ready[name].pairs
                row.tflops = flops / float(row.seconds) / 1e12
                if cache == device.COLD and not options.no_memory:
                    row.extra_bytes = device.peak_extra_bytes(calls[name])
        device_rows.add_ratios(here)
        rows += here
    return rows


def new_row(case: Case, direction: str, name: str, cache: str) -> Row:
    numbers = (case.num_heads, case.num_kv_heads, case.num_tokens, case.head_dim, case.group_size)
    return Row("attention", direction, case.dtype, *numbers, name, cache)


def bars(rows: list[Row]) -> list[Bar]:
    """Of every case measured that has bars: milliseconds, and faster than every rival of linear cost."""
    found = []
    for (tokens, group), limits in MILLISECONDS.items():
        for direction, most in zip(DIRECTIONS, limits, strict=True):
            case: dict[str, Any] = {
                "direction": direction,
                "dtype": "bfloat16",
                "num_heads": 32,
                "num_kv_heads": 32,
                "num_tokens": tokens,
                "head_dim": 128,
                "group_size": group,
            }
            what = f"{direction} bfloat16 H32 D128 N{tokens} G{group}"
            ours = device_rows.find(rows, implementation=OURS, **case)
            milliseconds = float(ours.seconds) * 1e3 if ours else None
            found.append(Bar(what, milliseconds, most, " ms", at_least=False, only_on=BAR_DEVICE))
            for rival, names in (("S2", S2_NAMES), ("flex", (FLEX,))):
                others = [device_rows.find(rows, implementation=name, **case) for name in names]
                times = [row.over_ours for row in others if row and not isinstance(row.over_ours, str)]
                found.append(Bar(f"{what}, over {rival}", min(times, default=None), 1.0, "x", at_least=True))
    return found


def main(options: argparse.Namespace) -> int:
    timer = device.EventTimer()
    rows: list[Row] = []
    for dtype in options.dtypes:
        for shape in options.shapes:
            start = time.monotonic()
            rows += measure(Case.parse(dtype, shape), options, timer)
            torch.cuda.empty_cache()
            print(
                f"measured {dtype} {shape} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
            )
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    show(rows, device.describe(lambda: torch.mm(a, a)), options.output)
    return 0


def predictions(rows: list[Row], gpu: str, results: Path = RESULTS) -> report.Table:
    """The forward's measured rate beside what its machine code was predicted to allow (cuda_static.py)."""
    table = report.Table(("case", "measured TFLOP/s", "predicted at best", "share"))
    for row in rows:
        best = predicted(f"attention_forward<{row.dtype}, {row.head_dim}>", gpu, results)
        ours = (row.implementation, row.direction, row.l2) == (OURS, FORWARD, device.COLD)
        if ours and best and not isinstance(row.tflops, str):
            cells = (f"{row.tflops:.0f}", f"{best:.0f}", f"{row.tflops / best:.0%}")
            table.lines.append((row.case(), *cells))
    return table


def predicted(kernel: str, gpu: str, results: Path) -> float | None:
    """TFLOP/s of a kernel's steady loop on this GPU, from the newest static proof; None: it has none."""
    for row in newest(results, "issued_per_hmma"):
        part = row["part"].removesuffix(" SXM").removeprefix("RTX ")
        if row["kernel"] == kernel and row["best_tflops"] and any(name in gpu for name in part.split("/")):
            return float(row["best_tflops"])
    return None


def show(rows: list[Row], facts: dict[str, str], output: Path | None) -> None:
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    print(device_rows.figures(rows), device_rows.verdicts(bars(rows), facts["gpu"]), sep="\n\n")
    if (table := predictions(rows, facts["gpu"])).lines:
        print("", table, sep="\n")
    if output:
        report.write_csv(output, rows, facts)
        print(f"written: {output}")
