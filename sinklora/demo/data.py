"""The demo's text: the running Python's standard-library sources, on every machine, split by file."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

# Left out: what others installed, tests, tables, and programs generated or bundled from elsewhere.
SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "turtledemo",
        "ensurepip",
    }
)


def library_files(folder: str | os.PathLike[str] | None = None) -> list[Path]:
    """The .py files of the running Python's standard library (or of folder), in an order that no machine
    changes.

    Raises:
        ValueError: there are none (a Python that is installed without its sources).
    """
    root = Path(folder if folder is not None else sysconfig.get_path("stdlib"))
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(
            f"text: expected Python sources (*.py) under {root}, found none; give a folder of them"
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_texts(files: Iterable[Path], min_bytes: int) -> list[str]:
    """The UTF-8 texts of at least min_bytes bytes; each text once, so that no copy is on both sides of a
    split."""
    texts: dict[str, None] = {}
    for path in files:
        content = path.read_bytes()
        if len(content) >= min_bytes:
            try:
                texts[content.decode("utf-8")] = None
            except UnicodeDecodeError:  # an old encoding, named in the file's first lines
                continue
    return list(texts)


def split_by_file(texts: Sequence[str], num_validation: int, seed: int) -> tuple[list[str], list[str]]:
    """(training texts, validation texts): whole files, shuffled by seed; no file is in both.

    Raises:
        ValueError: too few files to leave one for training.
    """
    if not 0 < num_validation < len(texts):
        raise ValueError(
            f"validation_files: expected from 1 to {len(texts) - 1} (so many files are "
            f"long enough, less one), got {num_validation}"
        )
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_validation:], shuffled[:num_validation]


class Blocks(Dataset[dict[str, Any]]):
    """Texts cut into blocks of length tokens, as a causal language model is trained on them.

    A block never crosses a file, and what is left at a file's end is dropped. The items are what Trainer's
    default collator takes: input_ids and labels, int64 (length,).

    Args:
        tokenizer: any tokenizer of transformers.
        max_tokens: stop reading texts once so many tokens are there; reading more than is trained on costs
            start-up.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: Any, length: int, max_tokens: int | None = None
    ) -> None:
        rows: list[torch.Tensor] = []
        for text in texts:
            if max_tokens is not None and len(rows) * length >= max_tokens:
                break
            tokens = encode(text, tokenizer)
            whole = tokens[: len(tokens) // length * length].view(-1, length)
            rows += list(whole)
        if not rows:
            raise ValueError(f"text: expected a file of at least {length} tokens, found none")
        self.rows = torch.stack(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def encode(text: str, tokenizer: Any, max_tokens: int | None = None) -> torch.Tensor:
    """The tokens of a text, int64 (T,), at most max_tokens of them."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(tokens[:max_tokens], dtype=torch.int64)
