"""How long is one training step of a LLaMA with sinklora, with full attention, with LongLoRA's S2 form?

usage: python benchmarks/bench_training_step.py [--tokens 4096 8192] [--pools openmp own] [--output FILE.csv]

A step is forward, loss, backward and AdamW on a randomly initialised LLaMA (transformers), one row of tokens
in four groups. "full" is transformers' "sdpa"; "s2" is one of the two forms of rivals.py, the faster for the
model's heads, behind transformers' attention interface. Each thread pool (SINKLORA_THREADS in the
environment, read when the kernels first run) has a process of its own; they take turns step by step, the
others asleep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import report
import timing

OURS, FULL, S2 = "sinklora", "full", "s2"
ATTENTIONS = (OURS, FULL, S2)
GROUPS = 4


@dataclass(frozen=True)
class Shape:
    """The model and its input."""

    tokens: int
    dtype: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    threads: int

    def __post_init__(self) -> None:
        if self.tokens % GROUPS:
            raise ValueError(
                f"tokens: expected a multiple of {GROUPS} (the S2 form's groups), got {self.tokens}"
            )


@dataclass
class StepRow:
    """One way to attend, on one pool of threads."""

    tokens: int
    dtype: str
    hidden: int
    layers: int
    num_heads: int
    num_kv_heads: int
    group_size: int
    attention: str
    pool: str
    seconds: float
    first_quartile: float
    third_quartile: float
    samples: int
    dropped: int
    tokens_per_second: float
    speedup: float = 1.0
    note: str = ""


def build_step(shape: Shape, attention: str) -> Callable[[], float]:
    """A function that does one optimiser step and returns the loss. Imports torch and transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.tokens,
        use_cache=False,
    )
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa")
    model.train()
    route(model, attention, shape.tokens // GROUPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, shape.vocabulary, (1, shape.tokens), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def route(model: Any, attention: str, group_size: int) -> None:
    """Sends the model's attention calls to ours or to the S2 form; "full" stays with transformers' sdpa."""
    import rivals
    import transformers

    if attention == OURS:
        import sinklora

        sinklora.patch(model, sinklora.SFPattern(group_size=group_size))
    elif attention == S2:

        def s2(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
            if mask is not None:
                raise NotImplementedError("attention_mask: the S2 form knows unpadded rows only")
            repeats = query.shape[1] != key.shape[1]
            form = rivals.s2_parts if repeats else rivals.s2_one_batch
            return form(query, key, value, group_size).transpose(1, 2), None

        transformers.AttentionInterface.register("s2_form", s2)
        model.set_attn_implementation("s2_form")


def work(shape: Shape) -> None:
    """A worker: each line on stdin names an attention; it does one step and answers with one JSON line."""
    import torch

    torch.set_num_threads(shape.threads)
    steps: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in steps:
            steps[name] = build_step(shape, name)
        losses: list[float] = []

        def once(step: Callable[[], float] = steps[name], losses: list[float] = losses) -> None:
            losses.append(step())

        seconds, disturbed = timing.sample(once)
        print(json.dumps({"seconds": seconds, "disturbed": disturbed, "loss": losses[0]}), flush=True)


class Worker:
    """A process that takes steps on demand, with its own choice of threads."""

    def __init__(self, shape: Shape, pool: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(shape.threads)}
        if pool != "default":
            environment["SINKLORA_THREADS"] = pool
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(shape))]
        self.pool = pool
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self, attention: str) -> tuple[float, bool]:
        """Seconds of one step, and whether other processes were busy. RuntimeError: the worker failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(attention + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"a step of {attention!r} on pool {self.pool!r} failed; its error stands above"
            )
        answer = json.loads(line)
        return float(answer["seconds"]), bool(answer["disturbed"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(shape: Shape, pools: list[str], attentions: list[str], rounds: int) -> list[StepRow]:
    """Ours on every pool; the others, which use torch's threads, on the first only."""
    workers = [Worker(shape, pool) for pool in pools]
    try:
        turns = [(worker, name) for worker in workers for name in attentions]
        turns = [(worker, name) for worker, name in turns if name == OURS or worker is workers[0]]
        samples: list[list[tuple[float, bool]]] = [[] for _ in turns]
        for worker, name in turns:
            worker.step(name)  # warm-up: builds the model, fills the optimiser's state
        for turn in range(rounds):
            order = [(i + turn) % len(turns) for i in range(len(turns))]
            for i in order:
                worker, name = turns[i]
                samples[i].append(worker.step(name))
    finally:
        for worker in workers:
            worker.close()
    quiet = [[seconds for seconds, disturbed in taken if not disturbed] for taken in samples]
    usable = all(2 * len(kept) >= rounds for kept in quiet)
    rows = []
    for (worker, name), taken, kept in zip(turns, samples, quiet, strict=True):
        chosen = timing.Timing(tuple(kept) if usable else tuple(seconds for seconds, _ in taken))
        rows.append(
            StepRow(
                shape.tokens, shape.dtype, shape.hidden, shape.layers, shape.heads, shape.kv_heads,
                shape.tokens // GROUPS, name, worker.pool, chosen.median, *chosen.quartiles,
                len(chosen.seconds), len(taken) - len(chosen.seconds), shape.tokens / chosen.median,
                note="" if usable else timing.BUSY,
            )
        )  # fmt: skip
    ours = min((row.seconds for row in rows if row.attention == OURS), default=None)
    for row in rows:
        # How many times as long as ours at its best: what a user gains by changing one line.
        row.speedup = row.seconds / ours if ours else float("nan")
    return rows


def step_table(rows: list[StepRow]) -> report.Table:
    table = report.Table(
        ("step", "attention", "pool", "ms", "quartiles", "tokens/s", "time / ours", "n", "note")
    )
    for row in rows:
        table.lines.append(
            (
                f"{row.dtype} N{row.tokens} G{row.group_size} hidden {row.hidden} x {row.layers} layers",
                row.attention,
                row.pool,
                f"{row.seconds * 1e3:.0f}",
                f"{row.first_quartile * 1e3:.0f}..{row.third_quartile * 1e3:.0f}",
                f"{row.tokens_per_second:.0f}",
                f"{row.speedup:.2f}",
                f"{row.samples}" + (f" (-{row.dropped})" if row.dropped else ""),
                row.note,
            )
        )
    return table


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=2)
    add("--vocabulary", type=int, default=512, help="small, so that the logits do not rule the step")
    add("--attentions", nargs="+", default=list(ATTENTIONS), choices=ATTENTIONS)
    add("--pools", nargs="+", default=["default"], help="values of SINKLORA_THREADS to compare: openmp own")
    add("--rounds", type=int, default=7)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--output", type=Path, help="CSV file to write; default: none")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.worker:
        work(Shape(**json.loads(options.worker)))
        return
    facts = machine.describe(options.threads)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    rows: list[StepRow] = []
    for dtype in options.dtypes:
        for tokens in options.tokens:
            shape = Shape(
                tokens, dtype, options.hidden, options.layers, options.heads, options.kv_heads,
                options.vocabulary, options.threads,
            )  # fmt: skip
            rows += measure(shape, options.pools, options.attentions, options.rounds)
            print(f"measured {dtype} {tokens} tokens", file=sys.stderr, flush=True)
    print(step_table(rows))
    if options.output:
        report.write_csv(options.output, rows, facts)
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
