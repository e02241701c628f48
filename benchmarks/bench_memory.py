"""What memory and time does one training step take, by context, and was it foretold?

usage: python benchmarks/bench_memory.py [--contexts 2048 4096 8192 16384] [--attentions sf full]
           [--hidden 512] [--layers 8] [--dtypes float32] [--output FILE.csv]

A LLaMA as it leaves finetune.prepare (LoRA, embeddings and norms), one row of tokens, groups of a quarter,
with and without gradient checkpointing, loss in chunks. Each case has a fresh process, which takes two steps:
peak memory is the rise of the resident high-water mark over what the process had before the model was made,
after a small model's step; time is the second step's. The C library gives freed memory back at once
(MALLOC_MMAP_THRESHOLD_): by default it keeps some, and the peak is higher. "foretold" is
sinklora.memory_estimate for the same case, made without running it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine
import report

GROUPS = 4
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "524288", "MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclass
class MemoryRow:
    """One case; empty strings: the process failed, and note says how."""

    trained_with: str
    dtype: str
    context: int
    checkpointing: bool
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    peak_bytes: int | str = ""
    foretold_bytes: int | str = ""
    step_seconds: float | str = ""
    note: str = ""


def config(row: MemoryRow) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=row.hidden,
        intermediate_size=row.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        num_key_value_heads=row.kv_heads,
        vocab_size=row.vocabulary,
        max_position_embeddings=row.context // GROUPS,
        use_cache=False,
    )


def pattern(row: MemoryRow) -> Any:
    import sinklora

    return "full" if row.trained_with == "full" else sinklora.SFPattern(group_size=row.context // GROUPS)


def step(row: MemoryRow) -> Callable[[], float]:
    """A function that does one optimiser step and returns its seconds."""
    import torch
    from transformers import LlamaForCausalLM

    import sinklora
    from sinklora.training.chunked_loss import use_chunked_loss

    torch.manual_seed(0)
    model = LlamaForCausalLM(config(row)).to(getattr(torch, row.dtype))
    model = sinklora.finetune.prepare(model, row.context, pattern=pattern(row))
    if row.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    use_chunked_loss(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(row.vocabulary, (1, row.context))

    def once() -> float:
        begun = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    return once


def work(row: MemoryRow, threads: int) -> dict[str, float]:
    """In a process of its own: two steps, their peak and the second's time."""
    import psutil
    import torch

    torch.set_num_threads(threads)
    # A small step first: what modules, thread pools and allocators take once is not the model's.
    step(replace(row, context=64, hidden=16 * row.heads, layers=1, vocabulary=64))()
    gc.collect()
    before = psutil.Process().memory_info().rss
    once = step(row)
    once()
    seconds = once()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak - before, "step_seconds": seconds}


def measure(row: MemoryRow, threads: int) -> None:
    """Fills the row in."""
    import sinklora

    estimate = sinklora.memory_estimate(
        config(row), context=row.context, pattern=pattern(row), dtype=row.dtype,
        gradient_checkpointing=row.checkpointing,
    )  # fmt: skip
    row.foretold_bytes = int(estimate["total"])
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(row)), "--threads", str(threads)]
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        row.note = f"the step ended with status {done.returncode}"
        return
    for name, value in json.loads(done.stdout.splitlines()[-1]).items():
        setattr(row, name, value)


def table(rows: list[MemoryRow]) -> report.Table:
    found = report.Table(("step", "checkpointing", "peak MiB", "foretold MiB", "off by", "s", "note"))
    for row in rows:
        off = "-"
        if not isinstance(row.peak_bytes, str) and not isinstance(row.foretold_bytes, str):
            off = f"{row.foretold_bytes / row.peak_bytes - 1:+.1%}"
        found.lines.append(
            (
                f"{row.trained_with} {row.dtype} {row.context} tokens, {row.layers} layers of {row.hidden}",
                "yes" if row.checkpointing else "no",
                report.number(row.peak_bytes, "{:.0f}", 2**-20),
                report.number(row.foretold_bytes, "{:.0f}", 2**-20),
                off,
                report.number(row.step_seconds, "{:.2f}"),
                row.note,
            )
        )
    return found


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    add("--attentions", nargs="+", default=["sf", "full"], choices=("sf", "full"))
    add("--dtypes", nargs="+", default=["float32"])
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=2)
    add("--vocabulary", type=int, default=32000)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--output", type=Path, help="CSV file to write; default: none")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(work(MemoryRow(**json.loads(options.worker)), options.threads)))
        return
    facts = machine.describe(options.threads)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    rows = [
        MemoryRow(
            attention, dtype, context, checkpointing, options.hidden, options.layers, options.heads,
            options.kv_heads, options.vocabulary,
        )
        for dtype in options.dtypes
        for context in options.contexts
        for attention in options.attentions
        for checkpointing in (False, True)
    ]  # fmt: skip
    for row in rows:
        measure(row, options.threads)
        print(f"measured {row.trained_with} {row.context}", file=sys.stderr, flush=True)
    print(table(rows))
    if options.output:
        report.write_csv(options.output, rows, facts)
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
