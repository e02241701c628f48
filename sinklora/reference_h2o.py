"""The H2O cache's definition made executable: SPEC.md, section 2, step by step in float64.

H2O is arXiv 2306.14048; the choices that it leaves open are the specification's. To test with and to read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .budget import Budget
from .scores import check_group_reduction, check_score_window

_Floats = npt.NDArray[np.float64]


class H2OSimulation:
    """The cache of one key/value head of one batch row: attends, scores and evicts by the definition.

    Args:
        heavy, recent, num_sink_tokens: the budget; see ``sinklora.budget.Budget``.
        score_window: of a forward of more than one token only the last so many queries score; None: all.
        group_reduction: "sum" over the query heads that share this key/value head, or "mean".
        scale: multiplies query . key; 1 / sqrt(D) by default.

    Attributes:
        seen: tokens so far; the position of the next one.
        positions: int64 (kept,), the positions of the entries that are kept, oldest first.
        scores: float64 (kept,), the attention that each has received since it came.
        keys, values: float64 (kept, D).

    Raises:
        TypeError, ValueError: a setting of the wrong kind or out of its range.
    """

    def __init__(
        self,
        heavy: int | float,
        recent: int | float,
        num_sink_tokens: int = 0,
        *,
        score_window: int | None = None,
        group_reduction: str = "sum",
        scale: float | None = None,
    ) -> None:
        self.budget = Budget(heavy, recent, num_sink_tokens)
        self.score_window = check_score_window(score_window)
        self.is_mean = check_group_reduction(group_reduction)
        self.scale = scale
        self.seen = 0
        self.num_prompt_tokens = 0
        self.positions = np.empty(0, dtype=np.int64)
        self.scores: _Floats = np.empty(0)
        self.keys: _Floats = np.empty((0, 0))
        self.values: _Floats = np.empty((0, 0))

    def forward(self, query: npt.ArrayLike, key: npt.ArrayLike, value: npt.ArrayLike) -> _Floats:
        """Attention of n >= 1 new tokens over what is kept and over each other; then scores; then eviction.

        Args:
            query: (heads, n, D), of all query heads that share this key/value head. key, value: (n, D).

        Returns:
            output (heads, n, D).
        """
        q, k, v = (np.asarray(array, dtype=np.float64) for array in (query, key, value))
        if q.ndim != 3 or k.shape != q.shape[1:] or v.shape != k.shape or not len(k):
            raise ValueError(
                "query, key, value: expected (heads, n, D) and two of (n, D), n >= 1, got "
                f"{q.shape}, {k.shape}, {v.shape}"
            )
        self._append(k, v)
        probabilities = self._attend(q)
        output: _Floats = probabilities @ self.values
        self._score(probabilities)
        if len(k) > 1:  # a prompt, a chunk of one, or a turn of a chat: fractions of the budget grow
            self.num_prompt_tokens += len(k)
        self._evict()
        return output

    def _append(self, key: _Floats, value: _Floats) -> None:
        positions = np.arange(self.seen, self.seen + len(key))
        self.seen += len(key)
        self.positions = np.concatenate([self.positions, positions])
        self.scores = np.concatenate([self.scores, np.zeros(len(key))])
        self.keys = np.concatenate([self.keys.reshape(-1, key.shape[1]), key])
        self.values = np.concatenate([self.values.reshape(-1, key.shape[1]), value])

    def _attend(self, query: _Floats) -> Any:
        """P (heads, n, kept + n): each query sees what was kept, and the new tokens up to itself."""
        num_new, dim = query.shape[1:]
        scale = 1 / math.sqrt(dim) if self.scale is None else self.scale
        seen_by = self.positions <= self.positions[-num_new:, None]
        logits = np.where(seen_by, scale * (query @ self.keys.T), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def _score(self, probabilities: Any) -> None:
        heads, num_new, _ = probabilities.shape
        if num_new > 1 and self.score_window is not None:
            probabilities = probabilities[:, -self.score_window :]
        self.scores = self.scores + probabilities.sum((0, 1)) / (heads if self.is_mean else 1)

    def _evict(self) -> None:
        heavy, recent, sinks = self.budget.entries(self.num_prompt_tokens)
        if len(self.positions) <= heavy + recent + sinks:
            return
        keep = self.positions < sinks
        keep[-recent:] = True  # positions ascend
        rest = np.flatnonzero(~keep)
        # A stable sort keeps equal scores in the order of their positions: ties keep the older.
        best = rest[np.argsort(-self.scores[rest], kind="stable")[:heavy]]
        keep[best] = True
        self.positions, self.scores = self.positions[keep], self.scores[keep]
        self.keys, self.values = self.keys[keep], self.values[keep]
