"""Files and folders of results that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it; text as UTF-8. Raises OSError."""
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(target: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """A new folder beside `target`; its entries are moved there at the end, and where an error came it is
    deleted.

    Entries of an earlier run are replaced; whatever else lies in target stays. `marker` is the entry that
    says that
    target holds such results: it is moved last.

    Raises:
        ValueError: target is a file, or a folder with content but no marker (so not ours to write into).
    """
    folder = Path(target).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, got the file {target}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ValueError(
            f"output: expected a new or empty folder, or one with an earlier {marker}, got {target}, which "
            "holds other files"
        )
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"output: cannot write into {target}: {error.strerror or error}") from error
    try:
        yield scratch
        folder.mkdir(exist_ok=True)
        for entry in sorted(scratch.iterdir(), key=lambda path: path.name == marker):
            place = folder / entry.name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            entry.replace(place)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OSError(f"output: {target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
