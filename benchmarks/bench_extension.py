"""What does `sinklora finetune` cost and bring, with SF-Attn, with S2-Attn, with full attention?

usage: python benchmarks/bench_extension.py --train FOLDER --validation FOLDER --work FOLDER
           [--seeds 0 1 2] [--rounds 3] [--sections base speed quality] [--output FILE.csv]

A LLaMA of 13 layers of 256 with a byte vocabulary is trained from scratch at 512 tokens (extension_base.py),
one for each seed, and extended to 4096 by the command line, with groups of 1024, LoRA, embeddings and norms.
Positions are stretched by YaRN: so short a training does not bring a model this small back from linear ones.

speed: float32, rows of 4096 without checkpointing; the commands take turns, round by round, and tokens/s
are the median over the steps of all rounds; peak memory is the median of the processes' (the first of them
also tokenises). S2-Attn is LongLoRA's form over torch's SDPA (s2-torch).
quality: trained in bfloat16 with float32 weights; S2-Attn here is the form that does not
leak (s2). Perplexity by `sinklora evaluate`: full attention over a sliding window, stride 256.
What is there already in the work folder is not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import extension_base
import machine
import report

CONTEXT, GROUP = 4096, 1024
LENGTHS = (512, 1024, 2048, 4096)
SPEED_ATTENTIONS = ("sf", "s2-torch", "full")
QUALITY_ATTENTIONS = ("full", "s2", "sf")
SPEED_STEPS, WARM_UP_STEPS = 5, 2
QUALITY = ("--steps", "20", "--accumulate", "2", "--dtype", "bfloat16", "--warmup-steps", "4")
VALIDATION_TOKENS = 5120


@dataclass
class ExtensionRow:
    """One figure: tokens_per_second and peak_bytes of an attention, or perplexity at a length."""

    section: str
    extension: str
    seed: int | str = ""
    length: int | str = ""
    perplexity: float | str = ""
    tokens_per_second: float | str = ""
    peak_bytes: int | str = ""
    samples: int | str = ""
    command: str = ""


def sinklora(*arguments: str | Path, threads: int, unless: Path | None = None) -> str:
    """Runs a command and gives it back as a user would type it; does not run it where `unless` is there."""
    words = [str(argument) for argument in arguments]
    if unless is None or not unless.is_file():
        print(f"$ sinklora {' '.join(words)}", file=sys.stderr, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-m", "sinklora", *words], env=environment, check=True)
    return " ".join(["sinklora", *(Path(word).name if "/" in word else word for word in words)])


def finetune(
    base: Path, train: Path, output: Path, attention: str, options: tuple[str, ...], threads: int
) -> str:
    """Extends base with one attention; rows are cut from the joined texts, the same for every attention."""
    groups = () if attention == "full" else ("--group-size", str(GROUP))
    return sinklora(
        "finetune", "--model", base, "--data", train, "--context", str(CONTEXT), "--output", output,
        "--attention", attention, *groups, "--packing", "joined", "--cache-dir", output.parent / "tokens",
        "--rope", "yarn", "--learning-rate", "2e-3", "--schedule", "cosine", "--no-gradient-checkpointing",
        *options, threads=threads, unless=output / "log.json",
    )  # fmt: skip


def speed(options: argparse.Namespace) -> list[ExtensionRow]:
    """Rounds of short runs, in an order that turns; the first steps of each run are left out."""
    base, runs = options.work / f"base-{options.seeds[0]}", options.work / "speed"
    rates: dict[str, list[float]] = {attention: [] for attention in SPEED_ATTENTIONS}
    peaks: dict[str, list[int]] = {attention: [] for attention in SPEED_ATTENTIONS}
    commands = {}
    for turn in range(options.rounds):
        for i in range(len(SPEED_ATTENTIONS)):
            attention = SPEED_ATTENTIONS[(i + turn) % len(SPEED_ATTENTIONS)]
            output = runs / f"{attention}-{turn}"
            steps = ("--steps", str(SPEED_STEPS + WARM_UP_STEPS), "--accumulate", "1", "--dtype", "float32")
            commands[attention] = finetune(base, options.train, output, attention, steps, options.threads)
            log = steps_of(output)
            rates[attention] += [float(row["tokens_per_second"]) for row in log[WARM_UP_STEPS:]]
            peaks[attention].append(max(int(row["memory_bytes"]) for row in log))
    return [
        ExtensionRow(
            "speed", attention, tokens_per_second=statistics.median(found),
            peak_bytes=int(statistics.median(peaks[attention])), samples=len(found),
            command=commands[attention],
        )
        for attention, found in rates.items()
    ]  # fmt: skip


def steps_of(run: Path) -> list[dict[str, str]]:
    """The training steps in a run's log.csv."""
    with (run / "log.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("loss")]


def quality(options: argparse.Namespace) -> list[ExtensionRow]:
    """Extends every seed's base with each attention and scores all models on the same held-out text."""
    rows = []
    for seed in options.seeds:
        base, commands = options.work / f"base-{seed}", {}
        models = {"base": base}
        for attention in QUALITY_ATTENTIONS:
            output = models[attention] = options.work / f"{attention}-{seed}"
            steps = (*QUALITY, "--seed", str(seed))
            commands[attention] = finetune(base, options.train, output, attention, steps, options.threads)
        results = options.work / f"evaluation-{seed}"
        lengths = [word for length in LENGTHS for word in ("--length", str(length))]
        sinklora(
            "evaluate", *(f"{name}={path}" for name, path in models.items()), "--data", options.validation,
            *lengths, "--max-tokens", str(VALIDATION_TOKENS), "--dtype", "bfloat16", "--output", results,
            threads=options.threads,
        )  # fmt: skip
        for row in json.loads((results / "results.json").read_text())["tasks"]["perplexity"]["rows"]:
            rows.append(
                ExtensionRow(
                    "quality", row["model"], seed, row["length"], row["values"]["perplexity"],
                    command=commands.get(row["model"], ""),
                )
            )  # fmt: skip
    return rows


def table(rows: list[ExtensionRow]) -> report.Table:
    found = report.Table(
        ("section", "extension", "seed", "length", "perplexity", "tokens/s", "peak MiB", "n")
    )
    for row in rows:
        found.lines.append(
            (
                row.section,
                row.extension,
                str(row.seed),
                str(row.length),
                report.number(row.perplexity, "{:.3f}"),
                report.number(row.tokens_per_second, "{:.0f}"),
                report.number(row.peak_bytes, "{:.0f}", 2**-20),
                str(row.samples),
            )
        )
    return found


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--train", type=Path, required=True, help="folder of .txt files to train on")
    add("--validation", type=Path, required=True, help="folder of .txt files to score")
    add("--work", type=Path, required=True, help="folder for models, runs and evaluations")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--base-steps", type=int, default=250)
    add("--rounds", type=int, default=3)
    add("--sections", nargs="+", default=["base", "speed", "quality"], choices=("base", "speed", "quality"))
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--output", type=Path, help="CSV file to write; default: none")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    facts = machine.describe(options.threads)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    if "base" in options.sections:
        for seed in options.seeds:
            extension_base.train(options.train, options.work / f"base-{seed}", seed, options.base_steps)
    rows = speed(options) if "speed" in options.sections else []
    rows += quality(options) if "quality" in options.sections else []
    if rows:
        print(table(rows))
    if rows and options.output:
        report.write_csv(options.output, rows, facts)
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
