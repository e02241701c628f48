"""Tokens of many documents in memory-mapped files, made once and found again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

logger = logging.getLogger("sinklora")

MANIFEST = "manifest.json"
VERSION = 1
_TOKENS, _OFFSETS, _MASK = "tokens.bin", "offsets.bin", "mask.bin"


class TokenStore:
    """Documents of tokens on disk; nothing is read before it is asked for.

    len(store) documents; store[i] is the i-th one's tokens, int64 (T,), a copy. Copies of a store that go to
    other processes (a DataLoader's workers) open the files anew.

    Attributes:
        folder: where the files are. manifest: what was written beside them.
        tokens: every document after another, uint16 or uint32 (num_tokens,), mapped.
        offsets: int64 (len + 1,), mapped: document i is tokens[offsets[i]:offsets[i + 1]].
        mask: uint8 (num_tokens,), 1 where a token is to be learnt; None: all are.
        pad_token: the token to fill rows with; its value is never learnt.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens what StoreWriter wrote.

        Raises:
            FileNotFoundError: no manifest there. ValueError: files that do not fit it.
        """
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = _read_manifest(self.folder / MANIFEST)
        tokens, documents = self.manifest["num_tokens"], self.manifest["num_documents"]
        self.tokens = _mapped(self.folder / _TOKENS, self.manifest["dtype"], tokens)
        self.offsets = _mapped(self.folder / _OFFSETS, "int64", documents + 1)
        self.mask = _mapped(self.folder / _MASK, "uint8", tokens) if self.manifest["has_mask"] else None
        self.pad_token: int = self.manifest["pad_token"]
        if self.offsets[0] != 0 or self.offsets[-1] != tokens:
            raise ValueError(f"{self.folder}: expected offsets from 0 to {tokens}, got others; delete it")

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TokenStore:
        """As the constructor."""
        return cls(folder)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)


class StoreWriter:
    """Appends documents to the files of a new store; used inside `stored`.

    Args:
        folder: exists, empty.
        num_ids: ids are below it; decides the kind of integer on disk.
        pad_token: see TokenStore.
        masked: each append also brings a mask.
    """

    def __init__(self, folder: Path, num_ids: int, pad_token: int, masked: bool = False) -> None:
        self.dtype = np.dtype(np.uint16 if num_ids <= 2**16 else np.uint32)
        self.pad_token = pad_token
        self.num_tokens = 0
        self.num_documents = 0
        self._folder = folder
        names = [_TOKENS, _OFFSETS, *([_MASK] if masked else [])]
        with write_errors(folder):
            self._files: dict[str, IO[bytes]] = {name: (folder / name).open("xb") for name in names}
            self._files[_OFFSETS].write(np.zeros(1, np.int64).tobytes())

    def append(self, tokens: Any, lengths: Sequence[int], mask: Any = None) -> None:
        """Documents of `lengths` tokens each, one after another in `tokens` (integers, (sum of lengths,)).

        mask: as long, 1 where a token is to be learnt; needed where the writer is masked.
        """
        given = np.asarray(tokens)
        if len(given) and not (given.min() >= 0 and given.max() < 2 ** (8 * self.dtype.itemsize)):
            raise ValueError(f"tokens: expected ids that fit {self.dtype}, got {given.min()}..{given.max()}")
        ids = np.ascontiguousarray(given, dtype=self.dtype)
        if sum(lengths) != len(ids):
            raise ValueError(f"lengths: expected a sum of {len(ids)}, got {sum(lengths)}")
        if (mask is None) == (_MASK in self._files) or (mask is not None and len(mask) != len(ids)):
            raise ValueError(f"mask: expected {len(ids)} values where the store has one, else None")
        offsets = self.num_tokens + np.cumsum(np.asarray(lengths, dtype=np.int64))
        with write_errors(self._folder):
            self._files[_TOKENS].write(ids.data)
            self._files[_OFFSETS].write(offsets.data)
            if mask is not None:
                self._files[_MASK].write(np.ascontiguousarray(mask, dtype=np.uint8).data)
        self.num_tokens += len(ids)
        self.num_documents += len(lengths)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes everything through to the disk, the manifest last."""
        own = {
            "version": VERSION,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "dtype": self.dtype.name,
            "has_mask": _MASK in self._files,
            "pad_token": self.pad_token,
        }
        with write_errors(self._folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            with (self._folder / MANIFEST).open("x", encoding="utf-8") as text:
                json.dump({**own, **manifest}, text, indent=1)
                text.flush()
                os.fsync(text.fileno())

    def close(self) -> None:
        """Closes the files, finished or not."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()


def stored(
    cache: Path,
    kind: str,
    key: Mapping[str, Any],
    write: Callable[[Path], StoreWriter],
) -> TokenStore:
    """The store of this key under `cache`: opened where it is there already, else made by `write`.

    Whole or not at all: files are written in a folder of another name, synced, and that is renamed. Of
    several processes that ask at the same time one makes it and the others wait for that.

    Args:
        kind: beginning of the folder's name.
        key: plain JSON, everything that the tokens depend on; goes into the manifest as "key".
        write: fills the folder it is given and returns its writer, unfinished.

    Raises:
        OSError: the folder cannot be written; nothing of the new files is left.
    """
    name = f"{kind}-{_digest(key)}"
    place = cache / name
    if (store := _open_whole(place)) is not None:
        return store
    with write_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: another process makes it, waiting", place)
            lock.acquire()
    try:
        if (store := _open_whole(place)) is not None:
            return store
        for left in [place, *cache.glob(f".{name}.partial-*")]:  # of a run that was killed, or damaged
            shutil.rmtree(left, ignore_errors=True)
        with write_errors(cache):
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=cache))
        try:
            writer = write(scratch)
            try:
                writer.finish({"key": dict(key)})
            finally:
                writer.close()
            with write_errors(cache):
                scratch.rename(place)
                sync_folder(cache)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        lock.release()
    return TokenStore(place)


def _open_whole(place: Path) -> TokenStore | None:
    try:
        return TokenStore(place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        logger.warning("%s; making it anew", error)
        return None


def _digest(key: Mapping[str, Any]) -> str:
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        fits = manifest["version"] == VERSION
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: expected the manifest of a token store, version {VERSION}")
    return dict(manifest)


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    expected = length * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else -1
    if size != expected:
        raise ValueError(f"{path}: expected {expected} bytes, got {max(size, 0)}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype)


def sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is; where folders cannot be opened so, it needs none."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def write_errors(folder: Path, what: str = "the tokens") -> Iterator[None]:
    """Says of an error of the disk what was to be written where."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder}: {what} cannot be written there: {error.strerror or error}") from error
