"""A cache driven through the operators step by step, and the simulations that it must follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accuracy import assert_close, assert_same_bits
from torch import Tensor

from sinklora import torch_h2o
from sinklora.budget import Budget
from sinklora.reference import H2OSimulation

SEEN, USED, BUDGET, RECENT = range(4)


def make(
    rng: torch.Generator,
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """query, key, value of new tokens."""
    return [torch.randn(batch, n, tokens, dim, generator=rng).to(dtype) for n in (heads, kv_heads, kv_heads)]


def cache(rng: torch.Generator, *, used: int = 6, budget: int = 6, batch: int = 2) -> dict[str, Tensor]:
    """A cache of 2 heads and 8 slots whose rows hold positions 0, 1, 2, ... in the first slots."""
    positions = torch.full((batch, 2, 8), -1, dtype=torch.int32)
    positions[:, :, :used] = torch.arange(used)
    scores = torch.rand(batch, 2, 8, generator=rng)
    return {
        "key": torch.randn(batch, 2, 8, 16, generator=rng),
        "value": torch.randn(batch, 2, 8, 16, generator=rng),
        "scores": scores,
        "positions": positions,
        "free_slot": torch.full((batch, 2), used, dtype=torch.int32),
        "rows": torch.tensor([[used, used, budget, 2]], dtype=torch.int32).repeat(batch, 1),
    }


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_unchanged(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor, name)


class OperatorCache:
    """One layer's cache of any number of rows, with ``spare`` slots more than it must have."""

    def __init__(
        self, budget: Budget, *, window: int | None = None, mean: bool = False, spare: int = 0
    ) -> None:
        self.budget, self.window, self.mean, self.spare = budget, window, mean, spare
        self.key: Any = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feeds new tokens, mask bool (B, n): one by the decode kernel, more as a prompt."""
        if self.key is None:
            self._start(key)
        if query.shape[2] > 1:
            return self._prompt(query, key, value, mask)
        self._reserve()
        return torch_h2o.h2o_decode(
            *(query, key, value, self.key, self.value, self.scores, self.positions, self.free_slot),
            *(self.rows,),
            new_mask=mask,
            num_sinks=self.budget.num_sink_tokens,
            mean=self.mean,
        )

    def kept(self, row: int, head: int) -> tuple[list[int], np.ndarray, Tensor, Tensor]:
        """positions, scores, keys and values of a key/value head, oldest first."""
        order = self.positions[row, head].argsort(stable=True)
        order = order[self.positions[row, head][order] >= 0]
        tensors = (self.scores, self.key, self.value)
        scores, key, value = (x[row, head][order] for x in tensors)
        return self.positions[row, head][order].tolist(), scores.numpy(), key, value

    def _start(self, key: Tensor) -> None:
        batch, heads, _, dim = key.shape
        self.key, self.value = (key.new_empty(batch, heads, 0, dim) for _ in range(2))
        self.scores = torch.empty(batch, heads, 0)
        self.positions = torch.empty(batch, heads, 0, dtype=torch.int32)
        self.free_slot = torch.zeros(batch, heads, dtype=torch.int32)
        self.rows = torch.zeros(batch, 4, dtype=torch.int32)
        self.prompt_tokens = [0] * batch
        self._count_budget()

    def _count_budget(self) -> None:
        for row, tokens in enumerate(self.prompt_tokens):
            heavy, recent, sinks = self.budget.entries(tokens)
            self.rows[row, BUDGET], self.rows[row, RECENT] = heavy + recent + sinks, recent

    def _reserve(self) -> None:
        """Room for one entry more than is used; what stands in new slots must have no effect."""
        missing = int(self.rows[:, USED].max()) + 1 + self.spare - self.key.shape[2]
        if missing > 0:
            self.key, self.value = (_grow(x, missing, float("nan")) for x in (self.key, self.value))
            self.scores, self.positions = _grow(self.scores, missing, 7), _grow(self.positions, missing, -1)

    def _prompt(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = key.shape
        kept = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
        order = self.positions.argsort(dim=-1, stable=True)
        past = [x.take_along_dim(order[..., None], 2) for x in (self.key, self.value)]
        positions, scores = (x.take_along_dim(order, 2) for x in (self.positions, self.scores))
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        new = torch.where(kept, self.rows[:, SEEN, None] + kept.cumsum(1) - 1, -1).to(torch.int32)
        positions = torch.cat([positions, new[:, None].expand(-1, heads, -1)], 2).contiguous()
        entries = positions[:, 0] >= 0
        padding = None if bool(entries.all()) else entries
        output, lse = torch_h2o.causal_attention(query, key, value, padding_mask=padding)
        received = torch_h2o.attention_scores(
            *(query, key, lse),
            score_window=self.window,
            padding_mask=padding,
            group_reduction="mean" if self.mean else "sum",
        )
        received[:, :, : scores.shape[2]] += scores.where(positions[:, :, : scores.shape[2]] >= 0, 0)
        counts = kept.sum(1)
        self.rows[:, SEEN] += counts
        self.prompt_tokens = [a + b for a, b in zip(self.prompt_tokens, counts.tolist(), strict=True)]
        self._count_budget()
        capacity = int(torch.minimum(self.rows[:, BUDGET], entries.sum(1)).max()) + 1 + self.spare
        self.key, self.value, self.scores, self.positions = torch_h2o.h2o_select(
            *(key, value, received, positions, self.rows),
            num_sinks=self.budget.num_sink_tokens,
            capacity=capacity,
        )
        self.free_slot = self.rows[:, USED, None].repeat(1, heads)  # never a view of rows
        return output


def _grow(tensor: Tensor, missing: int, fill: float) -> Tensor:
    shape = list(tensor.shape)
    shape[2] = missing
    return torch.cat([tensor, tensor.new_full(shape, fill)], 2)


class Followed(H2OSimulation):
    """A simulation that remembers what it evicted from, to take another choice where scores are close."""

    before: Any = None

    def _evict(self) -> None:
        self.before = (self.positions, self.scores, self.keys, self.values)
        super()._evict()

    def follow(self, kept: list[int], where: str) -> None:
        """Accepts a kept set that differs from this one's by entries of nearly the same score only."""
        if kept == self.positions.tolist():
            return
        positions, scores = self.before[:2]
        received = dict(zip(positions.tolist(), scores.tolist(), strict=True))
        other = set(kept) ^ set(self.positions.tolist())
        close = [received.get(p, float("inf")) for p in other]
        gap = max(close) - min(close)
        assert len(kept) == len(self.positions) and gap <= 2e-5 * (1 + max(close)), (
            f"{where}: kept {kept}, expected {self.positions.tolist()}, scores differ by {gap:.3g}"
        )
        chosen = np.isin(positions, kept)
        self.positions, self.scores, self.keys, self.values = (x[chosen] for x in self.before)


class Comparison:
    """A cache and the simulations of its rows and key/value heads, fed the same tokens and compared."""

    def __init__(
        self, settings: tuple[Any, ...], *, window: int | None = None, mean: bool = False, atol: float = 1e-5
    ) -> None:
        self.cache = OperatorCache(Budget(*settings), window=window, mean=mean)
        self.reduction = "mean" if mean else "sum"
        self.settings, self.window, self.atol = settings, window, atol
        self.simulations: dict[tuple[int, int], Followed] = {}
        self.step = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        output = self.cache.forward(query, key, value)
        group = query.shape[1] // key.shape[1]
        for row in range(key.shape[0]):
            for head in range(key.shape[1]):
                where = f"step {self.step}, row {row}, head {head}"
                simulation = self.simulations.setdefault((row, head), self._simulation())
                heads = slice(head * group, (head + 1) * group)
                new = (x.double().numpy() for x in (query[row, heads], key[row, head], value[row, head]))
                expected = simulation.forward(*new)
                assert_close(output[row, heads], expected, self.atol, name=f"{where}: output")
                positions, scores, kept_key, kept_value = self.cache.kept(row, head)
                simulation.follow(positions, where)
                assert_close(scores, simulation.scores, 2e-5, 2e-5, name=f"{where}: scores")
                assert_close(kept_key, simulation.keys, 0, name=f"{where}: keys")
                assert_close(kept_value, simulation.values, 0, name=f"{where}: values")
        self.step += 1

    def _simulation(self) -> Followed:
        return Followed(*self.settings, score_window=self.window, group_reduction=self.reduction)
