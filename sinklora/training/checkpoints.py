"""Checkpoints that are whole or absent: written under a scratch name, listed with their sizes, renamed last.

checkpoints/checkpoint-200/        what the Trainer wrote, and checkpoint.json: the sizes of all files
checkpoints/.partial/              one being written; what a killed run left of it is deleted
checkpoints/.removed-checkpoint-100   one being deleted
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("sinklora")

LISTING = "checkpoint.json"
SCRATCH = ".partial"
_REMOVED = ".removed-"
# What torch.save says where it cannot write (RuntimeError).
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "Parent directory")
_READ_WHOLE = 2**24
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpointError(ValueError):
    """A checkpoint is not as it was written; the message names its folder and what is wrong."""


def step_of(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"checkpoint: expected a folder checkpoint-N, got {checkpoint}")
    return int(match[1])


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def commit(written: Path, folder: Path) -> Path:
    """Moves a checkpoint that is complete under its scratch name to `folder`, and returns where it is.

    Everything is on the disk before the rename, so that a machine that loses power keeps it or never had it.
    Raises OSError.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    sizes = {path.relative_to(written).as_posix(): path.stat().st_size for path in files}
    listing = written / LISTING
    listing.write_text(
        json.dumps({"step": step_of(written), "sizes": sizes}, indent=1) + "\n", encoding="utf-8"
    )
    for path in (*files, listing, *(path for path in written.rglob("*") if path.is_dir()), written):
        _to_disk(path)
    place = folder / written.name
    if place.exists():  # of the same step, and damaged: what stands there was passed over on resuming
        remove(place)
    written.rename(place)
    _to_disk(folder)
    return place


def check_whole(checkpoint: Path) -> None:
    """Raises DamagedCheckpointError unless every file that was written is there in its length, and can be
    read as far as that is quickly told."""
    listing = checkpoint / LISTING
    try:
        sizes = json.loads(listing.read_text(encoding="utf-8"))["sizes"]
        listed = [(checkpoint / str(name), int(size)) for name, size in sizes.items()]
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{checkpoint}: no {LISTING}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{listing}: expected the sizes of the files, got {error!r}") from None
    for path, size in listed:
        if not path.is_file():
            raise DamagedCheckpointError(f"{path}: missing")
        if path.stat().st_size != size:
            raise DamagedCheckpointError(f"{path}: expected {size} bytes, got {path.stat().st_size}")
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix in (".pt", ".pth"):
            _check_archive(path)
        elif path.suffix == ".json":
            _check_json(path)


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those passed over are named in warnings. None: there is none at
    all.

    Raises:
        DamagedCheckpointError: there are checkpoints, and every one is damaged.
    """
    damaged = None
    for checkpoint in find_checkpoints(folder):
        try:
            check_whole(checkpoint)
            return checkpoint
        except DamagedCheckpointError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
            damaged = error
    if damaged is not None:
        raise DamagedCheckpointError(
            f"resume: no whole checkpoint in {folder} ({damaged}); start anew in another folder"
        )
    return None


def keep_newest(folder: Path, count: int | None) -> None:
    """Deletes all checkpoints but the newest `count`; None keeps all."""
    for checkpoint in find_checkpoints(folder)[count:] if count is not None else []:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; one that is half deleted no longer has a checkpoint's name."""
    doomed = checkpoint.with_name(_REMOVED + checkpoint.name)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(folder: Path) -> None:
    """Deletes what a killed run left: a checkpoint half written or half deleted."""
    for path in folder.glob(".*") if folder.is_dir() else []:
        if path.name == SCRATCH or path.name.startswith(_REMOVED):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(folder: Path, *, clear: bool) -> Iterator[Path]:
    """The folder that the next checkpoint is written in; deleted after an error. clear: empty it first."""
    scratch = folder / SCRATCH
    if clear:
        shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        yield scratch
    except BaseException:
        if clear:
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            file.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: {error}") from None


def _check_archive(path: Path) -> None:
    """torch.save writes zip archives. Their large entries, the tensors, are not read for this."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as content:  # checks the entry's header
                    if entry.file_size < _READ_WHOLE:
                        content.read()  # and this its checksum
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        raise DamagedCheckpointError(f"{path}: {error}") from None


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: {error}") from None


@contextlib.contextmanager
def write_errors(place: Path, what: str) -> Iterator[None]:
    """Says of an error of the disk what was to be written where; torch and safetensors have errors of their
    own for a disk that is full."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            if not any(sign in text for sign in _TORCH_CANNOT_WRITE):
                raise
            text = f"is the disk full? ({text})"
        raise OSError(
            f"{place}: {what} cannot be written: {text}; what was saved before is kept, and --resume goes on "
            "from it"
        ) from error


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
