"""Conversations as rows for TRL's trainer: packed or one by one, read from the store when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.packing import IGNORED, PackedRows
from ..data.shards import TokenStore


class ConversationRows(PackedRows):
    """Rows of whole conversations, as PackedRows packs them or each by itself, without padding.

    An item has input_ids and labels, int64 (as long as its conversations,), and seq_lengths, the tokens of
    each conversation, of which TRL's collator makes position_ids that restart.

    Raises:
        ValueError: a store without a mask of the answers, or a conversation longer than the context.
    """

    def __init__(
        self,
        store: TokenStore,
        context: int,
        *,
        documents: Sequence[int] | np.ndarray | None = None,
        packed: bool = True,
    ) -> None:
        if store.mask is None:
            raise ValueError("store: expected one with a mask of the answers")
        longest = int(np.diff(store.offsets).max(initial=0))
        if longest > context:
            raise ValueError(f"store: expected conversations of at most {context} tokens, got {longest}")
        super().__init__(store, context, documents=documents)
        if not packed:
            self._rows = np.arange(self.num_pieces + 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        pieces = slice(self._rows[index], self._rows[index + 1])
        lengths = self._lengths[pieces]
        tokens = np.concatenate(
            [
                np.arange(start, start + length)
                for start, length in zip(self._starts[pieces], lengths, strict=True)
            ]
        )
        ids = self.store.tokens[tokens].astype(np.int64)
        assert self.store.mask is not None
        labels = np.where(self.store.mask[tokens] != 0, ids, IGNORED)
        return {"input_ids": ids, "labels": labels, "seq_lengths": lengths.tolist()}

    def as_dataset(self) -> Any:
        """The rows as a datasets.Dataset, which TRL asks for; in memory it has the rows' numbers alone."""
        from datasets import Dataset

        return Dataset.from_dict({"row": list(range(len(self)))}).with_transform(self._items)

    def _items(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        items = [self[row] for row in batch["row"]]
        return {name: [item[name] for item in items] for name in items[0]}
