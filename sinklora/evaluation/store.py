"""Measured cells on disk, a line each, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FILE_NAME = "cells.jsonl"


def cell_key(**parts: Any) -> str:
    """A digest of everything that a cell's values depend on; plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Store:
    """The cells of an output folder.

    Every cell is on the disk before `add` returns. What a kill left half-written is passed over.

    Raises:
        ValueError: `output` is a file, or a folder that holds other things than an evaluation. OSError: it
        cannot be made or read.
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self.folder = Path(output)
        self.path = self.folder / FILE_NAME
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output: expected a folder, got the file {self.folder}")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.path.is_file():
            raise ValueError(
                f"output: expected a new or empty folder, or one with an earlier {FILE_NAME}, got "
                f"{self.folder}, which holds other files"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            self._values[found["key"]] = dict(found["values"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # measured again

    def get(self, key: str) -> dict[str, Any] | None:
        return self._values.get(key)

    def add(self, key: str, values: dict[str, Any], about: dict[str, Any]) -> None:
        """Stores a cell's values; `about` says for a human reader what they are of.

        Raises OSError where they cannot be stored (a full disk): the earlier cells stay as they are.
        """
        line = json.dumps({"key": key, **about, "values": values}).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            begin = file.tell()
            try:
                # After a kill the last line may lack its end.
                whole = begin == 0 or self._ends_in_newline()
                line = line if whole else b"\n" + line
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(begin)
                raise OSError(
                    error.errno, f"output: cannot store a measured cell: {error.strerror}", str(self.path)
                ) from error
        self._values[key] = values

    def _ends_in_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
