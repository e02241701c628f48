"""Stores of tokens are there whole or not at all, whoever is killed, and made by one of many."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sinklora.data import shards
from sinklora.data.shards import StoreWriter, TokenStore, stored

KEY = {"made": "of this"}
FORK = multiprocessing.get_context("fork")


def write(folder: Path) -> StoreWriter:
    writer = StoreWriter(folder, 70_000, 0)
    writer.append(np.array([1, 2, 69_999]), [1, 2])
    return writer


def never(folder: Path) -> StoreWriter:
    raise AssertionError("made again")


def content(store: TokenStore) -> list[list[int]]:
    return [store[index].tolist() for index in range(len(store))]


def run_forked(*bodies: Callable[[], None]) -> list[int]:
    children = [FORK.Process(target=body) for body in bodies]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
    return [child.exitcode for child in children]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = stored(tmp_path, "t", KEY, write)
    assert content(store) == content(stored(tmp_path, "t", KEY, never)) == [[1], [2, 69_999]]
    assert store[-1].tolist() == [2, 69_999] and store.tokens.dtype == np.uint32
    assert store.manifest["key"] == KEY and store.num_tokens == 3
    with pytest.raises(IndexError):
        store[2]
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 5


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, 1000, 0)
    for ids in ([70_000], [-1]):
        with pytest.raises(ValueError, match="expected ids that fit uint16"):
            writer.append(ids, [1])


@pytest.mark.parametrize("moment", ["writing", "finished", "renaming"])
def test_a_kill_leaves_nothing_half_made(tmp_path: Path, moment: str) -> None:
    def die(*ignored: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def body() -> None:
        if moment == "finished":
            StoreWriter.finish = lambda self, manifest: die()  # type: ignore[method-assign]
        if moment == "renaming":
            Path.rename = die  # type: ignore[method-assign]
        stored(tmp_path, "t", KEY, lambda folder: (write(folder), moment == "writing" and die())[0])

    assert run_forked(body) == [-signal.SIGKILL]
    assert not list(tmp_path.glob("t-*")) and list(tmp_path.glob(".t-*.partial-*"))
    assert content(stored(tmp_path, "t", KEY, write)) == [[1], [2, 69_999]]
    assert not list(tmp_path.glob(".t-*.partial-*"))


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    def slowly(folder: Path) -> StoreWriter:
        with (tmp_path / "log").open("a") as log:
            log.write("made\n")
        time.sleep(0.3)
        return write(folder)

    def body() -> None:
        assert content(stored(tmp_path / "cache", "t", KEY, slowly)) == [[1], [2, 69_999]]

    assert run_forked(body, body, body) == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "manifest.json"])
def test_a_damaged_store_is_made_anew(tmp_path: Path, name: str, caplog) -> None:
    damaged = stored(tmp_path, "t", KEY, write).folder / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        TokenStore(damaged.parent)
    assert content(stored(tmp_path, "t", KEY, write)) == [[1], [2, 69_999]]
    assert "making it anew" in caplog.text


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match=f"{tmp_path}.*cannot be written there: No space left on device"):
        stored(tmp_path, "t", KEY, write)
    monkeypatch.undo()
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert content(stored(tmp_path, "t", KEY, write)) == [[1], [2, 69_999]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_disk_that_fills_up_while_tokens_are_written(tmp_path: Path) -> None:
    def fill(folder: Path) -> StoreWriter:
        writer = write(folder)
        writer._files["tokens.bin"] = Path("/dev/full").open("wb")  # noqa: SIM115
        writer.append(np.zeros(100_000, np.int64), [100_000])
        return writer

    with pytest.raises(OSError, match="cannot be written there: No space left on device"):
        stored(tmp_path, "t", KEY, fill)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file/cache: the tokens cannot be written there: Not a directory"):
        stored(tmp_path / "file" / "cache", "t", KEY, write)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    with pytest.raises(OSError, match="cache: the tokens cannot be written there: Permission denied"):
        stored(cache, "t", KEY, write)
