"""Rows of tokens: every token once, boundaries kept, the same each time."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from sinklora.data.packing import IGNORED, PackedRows, best_fit, collate, split_documents
from sinklora.data.shards import StoreWriter, TokenStore, stored


def make_store(
    folder: Path, documents: list[np.ndarray], masks: list[np.ndarray] | None = None
) -> TokenStore:
    """A store of these documents, padded with 999."""

    def write(place: Path) -> StoreWriter:
        writer = StoreWriter(place, 1000, 999, masked=masks is not None)
        mask = None if masks is None else np.concatenate(masks)
        writer.append(np.concatenate(documents), [len(ids) for ids in documents], mask)
        return writer

    return stored(folder, "test", {"documents": [ids.tolist() for ids in documents]}, write)


def random_documents(rng: np.random.Generator, count: int, longest: int) -> list[np.ndarray]:
    return [rng.integers(0, 900, rng.integers(1, longest + 1)) for _ in range(count)]


def pieces_of(item: dict) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each sequence of a row, the padding left out."""
    ids, labels, positions = (item[name].numpy() for name in ("input_ids", "labels", "position_ids"))
    starts = [*np.flatnonzero(positions == 0), len(ids)]
    cut = [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    return [piece for piece in cut if piece[0][0] != 999]


@pytest.mark.parametrize("packing", ["whole", "cut"])
def test_every_token_is_in_one_piece_of_its_document(tmp_path: Path, rng, packing: str) -> None:
    documents = random_documents(rng, 60, 50)
    rows = PackedRows(make_store(tmp_path, documents), 16, packing=packing)
    pieces = [piece for row in range(len(rows)) for piece in pieces_of(rows[row])]
    assert rows.num_pieces == len(pieces)
    assert rows.num_tokens == sum(len(ids) for ids, _ in pieces)
    assert rows.padding_share == pytest.approx(1 - rows.num_tokens / (16 * len(rows)))
    for ids, labels in pieces:
        assert labels == [IGNORED, *ids[1:]]
    if packing == "whole":
        expected = [
            ids[at : at + 16].tolist()
            for ids in documents
            for at in range(0, len(ids), 16)
            if len(ids) - at > 1
        ]
        assert sorted(ids for ids, _ in pieces) == sorted(expected)
    else:
        assert np.array_equal(np.concatenate([ids for ids, _ in pieces]), np.concatenate(documents))
        assert len(rows) == -(-sum(map(len, documents)) // 16)


def test_the_mask_takes_labels_away(tmp_path: Path) -> None:
    store = make_store(
        tmp_path, [np.arange(5), np.arange(10, 13)], [np.array([1, 0, 1, 0, 1]), np.array([1, 1, 0])]
    )
    (row,) = (PackedRows(store, 10)[index] for index in range(1))
    assert row["labels"].tolist() == [IGNORED, IGNORED, 2, IGNORED, 4, IGNORED, 11, IGNORED, IGNORED, IGNORED]
    assert row["input_ids"].tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 999, 999]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]


def test_best_fit_is_best_fit(rng) -> None:
    """Against the plain loop."""
    lengths = np.sort(rng.integers(1, 65, 500))[::-1]
    rooms: list[int] = []
    for row, length in zip(best_fit(lengths, 64), lengths, strict=True):
        fitting = [room for room in rooms if room >= length]
        if row == len(rooms):
            assert not fitting
            rooms.append(64)
        else:
            assert rooms[row] == min(fitting)
        rooms[row] -= length


def test_splits_are_whole_documents(tmp_path: Path) -> None:
    store = make_store(tmp_path, [np.arange(3)] * 10)
    train, held = split_documents(store, 0.2, seed=1)
    assert len(held) == 2 and sorted([*train, *held]) == list(range(10))
    assert np.array_equal(split_documents(store, 2, seed=1)[1], held)
    assert len(split_documents(store, 0.0, seed=1)[1]) == 0
    with pytest.raises(ValueError, match=r"validation: expected .* from 0 to 9"):
        split_documents(store, 10, seed=1)


def test_unbroken_rows_need_no_positions(tmp_path: Path) -> None:
    rows = PackedRows(make_store(tmp_path, [np.arange(16), np.arange(7)]), 8)
    whole, broken = [rows[0], rows[1]], [rows[0], rows[2]]
    assert set(collate(whole)) == {"input_ids", "labels"}
    assert collate(broken)["position_ids"].shape == (2, 8)


def test_a_store_travels_by_its_path(tmp_path: Path) -> None:
    store = make_store(tmp_path, [np.arange(900)] * 100)
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content)[3], store[3])
