"""Readers of data files: each kind as a stream of rows, with the place of whatever is wrong in a file."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

# The field that the text of a text file is in.
TEXT = "text"
PARQUET_ROWS = 256
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_TEXT_ENDINGS = (".txt", ".md", ".py", ".rst", ".html", ".tex", ".c", ".h", ".csv", ".xml", ".yaml", ".yml")

Advance = Callable[[int], None]


class Row(NamedTuple):
    """Named values. source: "file", "file:line" or "file: row n", for messages."""

    values: dict[str, Any]
    source: str


def kind_of(path: Path) -> str:
    """The key in READERS, by the file's ending."""
    endings = _endings(path)
    return _KINDS.get(endings[0], "text")


def has_known_ending(path: Path) -> bool:
    """Whether a name is a file's and not a data set's."""
    first, compression = _endings(path)
    return first in _KINDS or first in _TEXT_ENDINGS or bool(compression)


def _endings(path: Path) -> tuple[str, str]:
    """(.jsonl, .gz) of a.jsonl.gz; ("", "") where there are none."""
    compression = path.suffix.lower() if path.suffix.lower() in _COMPRESSIONS else ""
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def read_text(path: Path, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    """The whole file as one row."""
    with _opened(path) as file:
        content = file.read()
    advance(path.stat().st_size)
    try:
        yield Row({TEXT: content.decode("utf-8-sig")}, str(path))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, error) from error


def read_lines(path: Path, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    """JSON Lines: an object a line; blank lines are none."""
    with _opened(path) as file:
        told = 0
        for number, line in enumerate(file, 1):
            place = file.told()
            advance(place - told)
            told = place
            text = _decoded(path, number, line)
            if text.strip():
                yield Row(_object(path, number, text), f"{path}:{number}")


def read_json(path: Path, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    """A list of objects, in memory as a whole; or, where the file does not begin with [, an object a line."""
    with _opened(path) as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start.startswith(b"["):
            yield from read_lines(path, columns, advance)
            return
    with _opened(path) as file:
        content = file.read()
    advance(path.stat().st_size)
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, error) from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"data: {path}:{line}: expected JSON: {error}") from error
    del content
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ValueError(
                f"data: {path}: row {number}: expected an object, got {_kind(value)} (text files that are "
                "no data end in .txt)"
            )
        yield Row(value, f"{path}: row {number}")


def read_parquet(path: Path, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    """The rows of a Parquet file; of a row group only the columns that are needed are read."""
    from ..extras import require

    require("train", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            there = file.schema_arrow.names
            # A missing one is told of by whoever needs it, with the names that are there.
            wanted = None if columns is None or not set(columns) <= set(there) else list(columns)
            total, number, told = file.metadata.num_rows, 0, 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}: row {number}")
                place = path.stat().st_size * number // max(total, 1)
                advance(place - told)
                told = place
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two of values that Python cannot hold: text that is no UTF-8, dates of other ages.
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        first = " ".join(str(error).split("\n")[0].split())
        raise ValueError(
            f"data: {path}: expected a Parquet file, got one that is damaged: {first}"
        ) from error


READERS: dict[str, Callable[[Path, Sequence[str] | None, Advance], Iterator[Row]]] = {
    "text": read_text,
    "jsonl": read_lines,
    "json": read_json,
    "parquet": read_parquet,
}


class _File:
    """A binary file that is being decompressed, and how far it has been read on the disk."""

    def __init__(self, path: Path, raw: IO[bytes], content: IO[bytes]) -> None:
        self._path, self._raw, self._content = path, raw, content

    def read(self, size: int = -1) -> bytes:
        with _damage(self._path):
            return self._content.read(size)

    def __iter__(self) -> Iterator[bytes]:
        with _damage(self._path):
            yield from self._content

    def told(self) -> int:
        return self._raw.tell()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_File]:
    compression = _endings(path)[1]
    with path.open("rb") as raw, contextlib.ExitStack() as stack:
        content: Any = raw
        if compression == ".gz":
            content = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif compression == ".bz2":
            content = stack.enter_context(bz2.BZ2File(raw))
        elif compression == ".xz":
            content = stack.enter_context(lzma.LZMAFile(raw))
        elif compression == ".zst":
            content = stack.enter_context(_zstandard(raw))
        yield _File(path, raw, content)


def _zstandard(raw: IO[bytes]) -> Any:
    """pyarrow has it; Python only from 3.14 on."""
    import io

    from ..extras import require

    require("train", "pyarrow")
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 2**16)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Errors of a compressed file that is damaged or cut off, with its name."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:  # the disk's own, which name the file
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"data: {path}: expected a whole compressed file, got one that is damaged: {error}")


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from error


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    within = "file" if b"\n" in error.object[:-1] else "line"
    what = f"the byte 0x{byte:02x} at offset {error.start} of the {within}"
    return ValueError(f"data: {path}:{line}: expected UTF-8, got {what}")


def _object(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {path}:{number}: expected JSON, an object a line: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"data: {path}:{number}: expected an object a line, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
