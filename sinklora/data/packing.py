"""Rows of tokens for training: several documents a row, each a sequence of its own."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from .shards import TokenStore

IGNORED = -100
PACKINGS = ("whole", "cut")


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of `context` tokens out of a store's documents, the same on every machine.

    A document longer than the context is cut into pieces of `context` tokens, the last one shorter. With
    packing "whole" no piece is cut further: pieces are packed into rows best-fit decreasing, and what is
    left of a row is padding. With "cut" documents follow each other in one stream that is cut at every
    `context` tokens: no padding but in the last row, more pieces.

    An item has input_ids, labels and position_ids, int64 (context,). Positions restart at every piece, so
    that attention keeps pieces apart; the first token of a piece is no label (nothing of the same piece
    predicts it), nor is padding, nor what the store's mask leaves out. Padding is a sequence of its own.

    Args:
        documents: indices of the store's documents to take; all without.

    Attributes:
        num_pieces: sequences that are no padding. num_tokens: their tokens. padding_share: of all tokens of
            all rows, the share that is none of them.

    Raises:
        ValueError: a setting out of range, or documents without two tokens.
    """

    def __init__(
        self,
        store: TokenStore,
        context: int,
        *,
        documents: Sequence[int] | np.ndarray | None = None,
        packing: Literal["whole", "cut"] = "whole",
    ) -> None:
        if context < 2:
            raise ValueError(f"context: expected at least 2 tokens, got {context}")
        if packing not in PACKINGS:
            raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}, got {packing}")
        self.store, self.context, self.packing = store, context, packing
        starts, lengths = _documents(store, documents)
        if packing == "whole":
            starts, lengths = _cut(starts, lengths, context)
            # A single token predicts nothing and nothing predicts it.
            starts, lengths = starts[lengths > 1], lengths[lengths > 1]
            order = np.argsort(-lengths, kind="stable")
            rows = best_fit(lengths[order], context)
            by_row = order[np.argsort(rows, kind="stable")]
            counts = np.bincount(rows)
        else:
            starts, lengths, counts = _cut_stream(starts, lengths, context)
            by_row = np.arange(len(starts))
        if not (lengths > 1).any():
            raise ValueError("data: expected documents of at least two tokens, found none")
        self._starts, self._lengths = starts[by_row], lengths[by_row]
        self._rows = np.concatenate([[0], np.cumsum(counts)])
        self.num_pieces = len(starts)
        self.num_tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        ids = np.full(self.context, self.store.pad_token, dtype=np.int64)
        labels = np.full(self.context, IGNORED, dtype=np.int64)
        positions = np.empty(self.context, dtype=np.int64)
        place = 0
        for piece in range(self._rows[index], self._rows[index + 1]):
            start, length = self._starts[piece], self._lengths[piece]
            end = place + length
            ids[place:end] = self.store.tokens[start : start + length]
            labels[place + 1 : end] = ids[place + 1 : end]
            if self.store.mask is not None:
                labels[place:end][self.store.mask[start : start + length] == 0] = IGNORED
            positions[place:end] = np.arange(length)
            place = end
        positions[place:] = np.arange(self.context - place)
        named = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(values) for name, values in named.items()}

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted, of all rows."""
        if self.store.mask is None:
            return self.num_tokens - self.num_pieces
        pieces = zip(self._starts.tolist(), self._lengths.tolist(), strict=True)
        mask = self.store.mask
        return sum(int(np.count_nonzero(mask[start + 1 : start + length])) for start, length in pieces)

    @property
    def padding_share(self) -> float:
        return 1.0 - self.num_tokens / (len(self) * self.context)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64, best-fit: each goes where the least room is left that takes it, else into
    a new row.

    lengths: integers from 1 to capacity, not increasing. Equal ones are placed together, so that millions
    take seconds.
    """
    assigned: list[int] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of open_rows, sorted
    num_rows = 0

    def put(rows: list[int], room: int) -> None:
        if not room or not rows:
            return
        if room in open_rows:
            open_rows[room] += rows
        else:
            open_rows[room] = rows
            insort(rooms, room)

    for length, count in _runs(lengths):
        left = count
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, rows = capacity, list(range(num_rows, num_rows + -(-left // (capacity // length))))
                num_rows += len(rows)
            else:
                room = rooms.pop(at)
                rows = open_rows.pop(room)
            each = room // length
            full = min(left // each, len(rows))
            assigned += [row for row in rows[:full] for _ in range(each)] if each > 1 else rows[:full]
            left -= full * each
            put(rows[:full], room - each * length)
            rest = rows[full:]
            if rest and left:  # fewer than fill a row
                assigned += [rest[0]] * left
                put(rest[:1], room - left * length)
                rest, left = rest[1:], 0
            if rest:
                put(rest, room)
    return np.array(assigned, dtype=np.int64)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """(value, how often in a row) of each run of equal values."""
    if not len(values):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1])
    counts = np.diff(np.append(starts, len(values)))
    return list(zip(values[starts].tolist(), counts.tolist(), strict=True))


def _documents(
    store: TokenStore, documents: Sequence[int] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(first token in the store, number of tokens) of each document."""
    starts, lengths = np.asarray(store.offsets[:-1]), np.diff(store.offsets)
    if documents is not None:
        chosen = np.asarray(documents, dtype=np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(store)):
            raise ValueError(f"documents: expected indices from 0 to {len(store) - 1}")
        starts, lengths = starts[chosen], lengths[chosen]
    return starts, lengths


def _cut(starts: np.ndarray, lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut at every `context` tokens of their own."""
    counts = -(-lengths // context)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its own
    rest = np.repeat(lengths, counts) - number * context
    return np.repeat(starts, counts) + number * context, np.minimum(rest, context)


def _cut_stream(
    starts: np.ndarray, lengths: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents one after another, cut at every `context` tokens; and the number of pieces of each row."""
    begins = np.cumsum(lengths) - lengths  # of documents, in the stream
    total = int(lengths.sum())
    cuts = np.unique(np.concatenate([begins, np.arange(0, total, context)]))
    cuts = cuts[cuts < total]
    owner = np.searchsorted(begins, cuts, side="right") - 1
    sizes = np.diff(np.append(cuts, total))
    return starts[owner] + cuts - begins[owner], sizes, np.bincount(cuts // context)


def split_documents(
    store: TokenStore, share_or_count: float | int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation): indices of the store's documents, each sorted; whole documents, drawn by seed.

    Args:
        share_or_count: documents held out, as a number, or as a share below 1 (at least one); 0: none.

    Raises:
        ValueError: nothing would be left to train on.
    """
    count = share_or_count
    if isinstance(share_or_count, float) and share_or_count < 1:
        count = max(1, round(share_or_count * len(store))) if share_or_count > 0 else 0
    if not 0 <= count < len(store) or count != int(count):
        raise ValueError(
            f"validation: expected a share below 1 or a number of documents from 0 to {len(store) - 1} "
            f"(there are {len(store)}), got {share_or_count}"
        )
    order = np.random.default_rng(seed).permutation(len(store))
    return np.sort(order[int(count) :]), np.sort(order[: int(count)])


def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The batch of rows, each tensor (B, context). Without position_ids where every row is one unbroken
    sequence: the model counts by itself, and no attention has to look for boundaries."""
    names = ["input_ids", "labels"]
    if any(int(item["position_ids"][-1]) != len(item["position_ids"]) - 1 for item in items):
        names.append("position_ids")
    return {name: torch.stack([item[name] for item in items]) for name in names}
