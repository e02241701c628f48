"""A cache's layer with positions="cache": kept entries stand at their rank, as StreamingLLM (2309.17453) has
it.

Keys are kept un-rotated, rounded once, and rotated by their rank for each forward: rotating them on from
rank to rank would drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..budget import Budget
from .layer import H2OLayer, Settings
from .new import NewTokens
from .rotary import Rotary, rotate, unrotate


class RankedLayer(H2OLayer):
    """As H2OLayer, but its keys are not rotated; a forward's new tokens bring what they were rotated with."""

    def __init__(self, index: int, budget: Budget, settings: Settings, rotary: Rotary) -> None:
        self.rotary: Rotary = rotary
        super().__init__(index, budget, settings)

    def reach(self, num_new: int) -> int:
        return self.bounds.most_used + num_new

    def _to_store(self, new: NewTokens) -> Tensor:
        return self._plain(new, new.key).to(new.key.dtype)

    def _plain(self, new: NewTokens, x: Tensor) -> Tensor:
        """x, of the new tokens, (B, heads, n, D) as before its rotation, float32."""
        assert new.rotation is not None
        return unrotate(x, new.rotation.cos[:, None], new.rotation.sin[:, None])

    def _turned(self, x: Tensor, ranks: Tensor, num_ranks: int, dtype: torch.dtype) -> Tensor:
        """x (B, heads, n, D) rotated by ranks, (B or 1, heads or 1, n)."""
        return rotate(x, *self.rotary.of_ranks(ranks, num_ranks)).to(dtype)

    def _attend_prompt(
        self, new: NewTokens, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert new.rotation is not None
        num_new, num_keys = new.query.shape[2], key.shape[2]
        if mask is None:
            ranks = torch.arange(num_keys, device=key.device)[None]
        else:
            ranks = (mask.cumsum(1) - 1).clamp(min=0)
        if num_new == num_keys and new.rotation.stands_at(ranks, mask):
            return self._run_prompt(new.query, new.key, value, mask, new.scale)  # rotated so already
        query = self._turned(
            self._plain(new, new.query), ranks[:, None, num_keys - num_new :], num_keys, new.query.dtype
        )
        key = self._turned(key, ranks[:, None], num_keys, key.dtype)
        return self._run_prompt(query, key, value, mask, new.scale)

    def _step(self, new: NewTokens) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            batch, heads, slots, dim = self.keys.shape
            order = self.positions.argsort(2)
            places = torch.arange(slots, device=order.device).expand_as(order)
            unused = (self.positions < 0).sum(2, keepdim=True)
            ranks = (torch.empty_like(order).scatter_(2, order, places) - unused).clamp(min=0)
            rank = self.rows[:, 1].long()[:, None, None]  # USED, of csrc/core/h2o.h
            plain = self._to_store(new)
            keys = self._turned(self.keys, ranks, slots, self.keys.dtype)
            key = self._turned(plain, rank, slots, plain.dtype)
            query = self._turned(self._plain(new, new.query), rank, slots, new.query.dtype)
            slot = self.free_slot.long()[:, :, None, None].expand(batch, heads, 1, dim)
        output = self._run_step(new, query, key, keys)
        self.keys.scatter_(2, slot, plain)
        return output
