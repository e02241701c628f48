"""Data sets that the `datasets` library reads: those of the Hub, as a stream, and folders that it saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..extras import require
from .files import Row

SAVED_ROWS = 256
_SAVED_FILES = ("dataset_dict.json", "state.json")


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk of `datasets` wrote it."""
    return any((folder / name).is_file() for name in _SAVED_FILES)


def describe_saved(folder: Path) -> tuple[int, list[Any]]:
    """(bytes, identity) of a saved data set."""
    status = [(str(path.relative_to(folder)), path.stat()) for path in sorted(folder.rglob("*"))]
    parts = [[name, s.st_size, s.st_mtime_ns] for name, s in status]
    return sum(s.st_size for name, s in status if name.endswith(".arrow")), [str(folder.resolve()), parts]


def read_saved(
    folder: Path,
    split: str,
    columns: Sequence[str] | None,
    size: int,
    advance: Callable[[int], None],
) -> Iterator[Row]:
    """Its rows, through the memory map of `datasets`."""
    require("train", "datasets")
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever its parsers meet
        raise ValueError(f"data: {folder}: cannot be read by datasets: {_first_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"data: {folder}: expected one of the splits {', '.join(data)}, got {split}")
        data = data[split]
    if columns is not None and set(columns) <= set(data.column_names):
        data = data.select_columns(list(columns))
    told = 0
    for start in range(0, len(data), SAVED_ROWS):
        batch = data[start : start + SAVED_ROWS]
        names = list(batch)
        for number, values in enumerate(zip(*batch.values(), strict=True), start + 1):
            yield Row(dict(zip(names, values, strict=True)), f"{folder}: row {number}")
        place = size * min(start + SAVED_ROWS, len(data)) // len(data)
        advance(place - told)
        told = place


def describe(source: str, split: str) -> tuple[int, list[Any]]:
    """(0, identity) of a data set of the Hub: its name, split and revision.

    Raises:
        ValueError: the Hub may not be asked, cannot be reached, or has no such data set.
    """
    require("train", "datasets", "huggingface_hub")
    import huggingface_hub
    from huggingface_hub import constants

    name, _, _ = source.partition(":")
    if constants.is_offline_mode() or os.environ.get("HF_DATASETS_OFFLINE", "0").upper() in ("1", "TRUE"):
        raise ValueError(
            f"data: no file or folder {source} here, and the Hub is not asked for it, as HF_HUB_OFFLINE or "
            "HF_DATASETS_OFFLINE is set"
        )
    try:
        revision = huggingface_hub.HfApi().dataset_info(name).sha
    except Exception as error:  # of the network, of the Hub: many classes
        raise ValueError(
            f"data: no file or folder {source} here, and the Hub gives no data set of that name: "
            f"{_first_line(error)}"
        ) from error
    return 0, [source, split, revision]


def read_hub(source: str, split: str, columns: Sequence[str] | None, revision: str | None) -> Iterator[Row]:
    """Its rows as they come over the network; nothing is kept."""
    import datasets

    name, _, configuration = source.partition(":")
    try:
        data = datasets.load_dataset(
            name, configuration or None, split=split, revision=revision, streaming=True
        )
    except Exception as error:  # no such split or configuration, a script that is not run, the network
        raise ValueError(f"data: {source}, split {split}: {_first_line(error)}") from error
    if columns is not None and data.column_names and set(columns) <= set(data.column_names):
        data = data.select_columns(list(columns))
    for number, values in enumerate(data, 1):
        yield Row(dict(values), f"{source}: row {number}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
