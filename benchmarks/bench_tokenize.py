"""What is left of the tokenizers library's speed when files become a store of tokens?

usage: python benchmarks/bench_tokenize.py [--data FOLDER ...] [--output benchmarks/results/DATE-tokenize.csv]

tokenize_documents reads the files, encodes whole documents, appends the end token and writes memory-mapped
files, synced to the disk. Beside it, on the same texts that are in memory already: encode_batch and
encode_batch_fast of the tokenizers library, whose result is dropped, and transformers' tokenizer. The
vocabulary is a byte-level BPE trained on a part of the texts. Without --data the texts are the sources of
Python's standard library. The bar: 85 % of encode_batch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import report
import timing

from sinklora.data.sources import read_documents
from sinklora.data.tokens import tokenize_documents
from sinklora.demo.data import library_files

OURS, BATCH, FAST, TRANSFORMERS = (
    "tokenize_documents",
    "encode_batch",
    "encode_batch_fast",
    "transformers",
)
BAR = 0.85
END = "<|end|>"
# Enough to train a vocabulary on.
TRAINING_CHARACTERS = 4 * 2**20


@dataclass
class TokenizeRow:
    """One way over all texts. of_batch: speed as a share of encode_batch's."""

    texts: str
    documents: int
    megabytes: float
    tokens: int
    vocabulary: int
    way: str
    seconds: float
    first_quartile: float
    third_quartile: float
    samples: int
    dropped: int
    megabytes_per_second: float
    of_batch: float
    bar: str = ""
    verdict: str = ""
    note: str = ""


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of transformers, trained on the first megabytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    left, part = TRAINING_CHARACTERS, []
    for text in texts:
        part.append(text[:left])
        left -= len(part[-1])
        if not left:
            break
    tokenizer.train_from_iterator(part, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def ways(sources: list[str], texts: list[str], tokenizer: Any, scratch: Path) -> dict[str, Callable[[], Any]]:
    """Name -> call. Ours makes a new store each time."""
    backend = tokenizer.backend_tokenizer
    number = 0

    def ours() -> None:
        nonlocal number
        number += 1
        tokenize_documents(sources, tokenizer, scratch / str(number))

    return {
        OURS: ours,
        BATCH: lambda: backend.encode_batch(texts),
        FAST: lambda: backend.encode_batch_fast(texts),
        TRANSFORMERS: lambda: tokenizer(texts, verbose=False)["input_ids"],
    }


def measure(options: argparse.Namespace, scratch: Path) -> list[TokenizeRow]:
    if options.data:
        sources = options.data
        name = Path(sources[0]).resolve().name if len(sources) == 1 else f"{len(sources)} sources"
    else:
        name, sources = "standard library", [str(path) for path in library_sources()]
    sources = sources[: options.max_files]
    texts = [document.text for document in read_documents(sources)]
    tokenizer = train_tokenizer(texts, options.vocabulary)
    store = tokenize_documents(sources, tokenizer, scratch / "first")
    size = sum(len(text.encode()) for text in texts) / 1e6
    calls = ways(sources, texts, tokenizer, scratch)
    timings = timing.interleave(calls, rounds=options.rounds, drop_disturbed=not options.keep_disturbed)
    rows = []
    for way, taken in timings.items():
        share = timings[BATCH].median / taken.median
        row = TokenizeRow(
            name, len(texts), size, store.num_tokens, options.vocabulary, way, taken.median, *taken.quartiles,
            len(taken.seconds), taken.dropped, size / taken.median, share,
            note="" if taken.quiet else timing.BUSY,
        )  # fmt: skip
        if way == OURS:
            row.bar, row.verdict = f"at least {BAR:.0%}", "pass" if share >= BAR else "FAIL"
        rows.append(row)
    return rows


def library_sources() -> list[Path]:
    """The standard library's files that are UTF-8 and not empty."""
    found = []
    for path in library_files():
        try:
            if path.read_bytes().decode("utf-8"):
                found.append(path)
        except UnicodeDecodeError:
            continue
    return found


def table(rows: Sequence[TokenizeRow]) -> report.Table:
    shown = report.Table(("way", "s", "quartiles", "MB/s", "of encode_batch", "n", "bar", "verdict", "note"))
    for row in rows:
        dropped = f" (-{row.dropped})" if row.dropped else ""
        shown.lines.append(
            (
                row.way, f"{row.seconds:.3f}", f"{row.first_quartile:.3f}..{row.third_quartile:.3f}",
                f"{row.megabytes_per_second:.2f}", f"{row.of_batch:.0%}", f"{row.samples}{dropped}",
                row.bar, row.verdict, row.note,
            )
        )  # fmt: skip
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", help="files or folders; default: Python's standard library")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-files", type=int, help="take the first of the sources only, to try it out")
    parser.add_argument("--keep-disturbed", action="store_true", help="keep samples of a busy machine")
    parser.add_argument("--output", type=Path, help="CSV to write")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options, Path(scratch))
    first = rows[0]
    print(
        f"{first.texts}: {first.documents:,} documents, {first.megabytes:.1f} MB, {first.tokens:,} tokens of "
        f"{first.vocabulary:,}, {os.cpu_count()} processors\n"
    )
    print(table(rows))
    if options.output:
        report.write_csv(options.output, rows, machine.describe(os.cpu_count() or 1))
    return 0 if all(row.verdict in ("", "pass") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
