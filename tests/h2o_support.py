"""The cache's kernels in float64 NumPy, step by step, and calls of the extension on torch tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sinklora import _C

SEEN, USED, BUDGET, RECENT = range(4)
UNSEEN = -1  # position of an unused slot


def allocate(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


class Attended(NamedTuple):
    output: np.ndarray
    lse: np.ndarray
    scores: np.ndarray  # what is added, (batch, kv heads, keys)


def double(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int = 0,
    mean: bool = False,
) -> Attended:
    """Bottom-right causal attention in float64, one query at a time; padded queries give 0 and -infinity."""
    q, k, v = double(query), double(key), double(value)
    batch, heads, num_queries, _ = q.shape
    kv_heads, num_keys = k.shape[1:3]
    kept = np.ones((batch, num_keys), bool) if mask is None else mask.numpy()
    output, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    scores = np.zeros(k.shape[:3])
    for b in range(batch):
        columns = [c for c in range(num_keys - num_queries, num_keys) if kept[b, c]]
        counted = columns[-window:] if window else columns
        for column in columns:
            visible = [c for c in range(column + 1) if kept[b, c]]
            i = column - (num_keys - num_queries)
            for h in range(heads):
                hk = h // (heads // kv_heads)
                logits = scale * k[b, hk, visible] @ q[b, h, i]
                top = logits.max()
                weights = np.exp(logits - top)
                lse[b, h, i] = top + np.log(weights.sum())
                weights /= weights.sum()
                output[b, h, i] = weights @ v[b, hk, visible]
                if column in counted:
                    scores[b, hk, visible] += weights / (heads // kv_heads if mean else 1)
    return Attended(output, lse, scores)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scores: Tensor | None = None,
    window: int = 0,
    mean: bool = False,
    scale: float = 0.25,
    num_threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """Output and lse of the kernel; scores are added to."""
    output = torch.full_like(query, torch.nan)
    lse = torch.full(query.shape[:3], torch.nan)
    step = (None,) * 6
    _C.h2o_decode(
        query, key, value, output, lse, mask, scores, window, mean, *step, 0, scale, num_threads, allocate
    )
    return output, lse


class Cache(NamedTuple):
    """A layer's buffers, as the step writes to them."""

    key: Tensor
    value: Tensor
    scores: Tensor
    positions: Tensor
    free_slot: Tensor
    rows: Tensor

    def clone(self) -> Cache:
        return Cache(*(x.clone() for x in self))

    def row(self, b: int) -> Cache:
        return Cache(*(x[b : b + 1].clone() for x in self))

    def step(
        self,
        query: Tensor,
        new_key: Tensor,
        new_value: Tensor,
        *,
        new_mask: Tensor | None = None,
        num_sinks: int = 0,
        mean: bool = False,
        scale: float = 0.25,
        num_threads: int = 1,
        output: Tensor | None = None,
    ) -> Tensor:
        result = torch.full_like(query, torch.nan) if output is None else output
        new = (new_key, new_value, new_mask, self.positions, self.free_slot, self.rows)
        fixed: tuple[Any, ...] = (num_sinks, scale, num_threads, allocate)
        _C.h2o_decode(query, self.key, self.value, result, None, None, self.scores, 0, mean, *new, *fixed)
        return result


def empty_cache(
    batch: int,
    kv_heads: int,
    capacity: int,
    dim: int,
    dtype: torch.dtype,
    budget: list[int],
    recent: list[int],
) -> Cache:
    """No entry yet; keys and values are poisoned with NaN."""
    poison = torch.full((batch, kv_heads, capacity, dim), torch.nan, dtype=dtype)
    heads = (batch, kv_heads)
    rows = torch.tensor([[0, 0, b, r] for b, r in zip(budget, recent, strict=True)], dtype=torch.int32)
    return Cache(
        key=poison,
        value=poison.clone(),
        scores=torch.zeros(*heads, capacity),
        positions=torch.full((*heads, capacity), UNSEEN, dtype=torch.int32),
        free_slot=torch.zeros(heads, dtype=torch.int32),
        rows=rows,
    )
