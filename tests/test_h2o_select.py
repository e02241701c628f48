"""h2o_select: which entries a cache keeps, and their move to the first slots (csrc/core/h2o.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_same_bits
from cases import DTYPES
from h2o_support import UNSEEN, USED, allocate
from torch import Tensor

from sinklora import _C


def kept_slots(
    scores: np.ndarray, positions: np.ndarray, budget: int, recent: int, num_sinks: int
) -> list[int]:
    """The definition, by sorting: protected first, then large scores (NaN the largest), then the older."""
    used = [s for s in range(len(positions)) if positions[s] >= 0]
    newest = set(sorted(used, key=lambda s: -positions[s])[:recent])
    protected = {s for s in used if s in newest or positions[s] < num_sinks}
    nan = np.isnan(scores)

    def rank(s: int) -> tuple[bool, bool, float, int]:
        return (s not in protected, not nan[s], 0.0 if nan[s] else -float(scores[s]), int(positions[s]))

    return sorted(sorted(used, key=rank)[: max(0, budget)])


class Entries:
    """A cache's entries and the call on them."""

    def __init__(
        self, batch: int, kv_heads: int, num_keys: int, dim: int, dtype: torch.dtype, rng: np.random.Generator
    ) -> None:
        shape = (batch, kv_heads, num_keys)
        self.key = torch.tensor(rng.standard_normal((*shape, dim))).to(dtype)
        self.value = torch.tensor(rng.standard_normal((*shape, dim))).to(dtype)
        # Few different scores, so that there are ties; positions in any order, with gaps.
        self.scores = torch.tensor(rng.integers(0, 6, shape)).float()
        order = [rng.permutation(3 * num_keys)[:num_keys] for _ in range(batch * kv_heads)]
        self.positions = torch.tensor(np.array(order).reshape(shape), dtype=torch.int32)
        self.rows = torch.tensor([[3 * num_keys, 0, num_keys, 1]] * batch, dtype=torch.int32).view(-1, 4)

    def mask(self, kept: Tensor) -> None:
        self.positions[~kept[:, None].expand_as(self.positions)] = UNSEEN
        dead = (self.positions == UNSEEN)[..., None]
        self.key.masked_fill_(dead, torch.nan)
        self.value.masked_fill_(dead, torch.nan)
        self.scores.masked_fill_(dead[..., 0], torch.nan)

    def expected(self, num_sinks: int) -> list[list[list[int]]]:
        return [
            [
                kept_slots(
                    self.scores[b, hk].numpy(), self.positions[b, hk].numpy(), budget, recent, num_sinks
                )
                for hk in range(self.key.shape[1])
            ]
            for b, (_, _, budget, recent) in enumerate(self.rows.tolist())
        ]

    def outputs(self, capacity: int) -> tuple[Tensor, ...]:
        batch, kv_heads, _, dim = self.key.shape
        key = torch.full((batch, kv_heads, capacity, dim), 55.0, dtype=self.key.dtype)
        scores = torch.full((batch, kv_heads, capacity), 55.0)
        return key, key.clone(), scores, scores.int()

    def select(self, outputs: tuple[Tensor, ...], num_sinks: int = 0, num_threads: int = 1) -> None:
        inputs = (self.key, self.value, self.scores, self.positions, self.rows)
        _C.h2o_select(*inputs, *outputs, num_sinks, num_threads, allocate)

    def check(self, capacity: int, num_sinks: int = 0, in_place: bool = False, num_threads: int = 1) -> None:
        before = [x.clone() for x in (self.key, self.value, self.scores, self.positions)]
        rows = self.rows.clone()
        expected = self.expected(num_sinks)
        outputs = (self.key, self.value, self.scores, self.positions) if in_place else self.outputs(capacity)
        self.select(outputs, num_sinks, num_threads)
        untouched = before if in_place else self.outputs(capacity)
        for b, heads in enumerate(expected):
            for hk, slots in enumerate(heads):
                n = len(slots)
                for got, source, rest in zip(outputs, before, untouched, strict=True):
                    assert_same_bits(got[b, hk, :n], source[b, hk, slots])
                    if got.ndim == 4:
                        assert_same_bits(got[b, hk, n:], rest[b, hk, n:])
                assert not outputs[2][b, hk, n:].any()
                assert (outputs[3][b, hk, n:] == UNSEEN).all()
            rows[b, USED] = len(heads[0])
        assert self.rows.tolist() == rows.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("num_keys", "budget", "recent", "num_sinks"),
    [
        (50, 20, 5, 3),
        (50, 1, 1, 0),
        (50, 50, 7, 0),
        (50, 500, 7, 9),
        (1, 1, 1, 1),
        (700, 128, 64, 4),
        (64, 12, 8, 4),
        (40, 0, 1, 0),
        (40, 5, 9, 9),
    ],
)
def test_keeps_what_the_definition_keeps(
    dtype: torch.dtype,
    in_place: bool,
    num_keys: int,
    budget: int,
    recent: int,
    num_sinks: int,
    rng: np.random.Generator,
) -> None:
    entries = Entries(2, 3, num_keys, 24, dtype, rng)
    entries.rows[:, 2], entries.rows[:, 3] = budget, recent
    entries.rows[1, 2] = max(0, budget - 1)
    entries.check(min(budget, num_keys) + 2, num_sinks, in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_unused_slots_are_never_kept(in_place: bool, rng: np.random.Generator) -> None:
    """Left and right padding, holes, and a row with nothing: NaN stands in all of it."""
    entries = Entries(4, 2, 30, 8, torch.float32, rng)
    kept = torch.ones(4, 30, dtype=torch.bool)
    kept[0, :7], kept[1, 20:], kept[2, 3::4], kept[3] = False, False, False, False
    entries.mask(kept)
    entries.rows[:, 2:] = torch.tensor([12, 4])
    entries.check(13, 2, in_place)
    assert entries.rows[:, USED].tolist() == [12, 12, 12, 0]


def test_special_scores_and_ties(rng: np.random.Generator) -> None:
    """NaN is the largest, then infinity; the zeros are equal; equals keep the older, wherever it stands."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, -1e-45, 3e38, -2.0])
    for budget in range(1, 40):
        entries = Entries(1, 4, 40, 8, torch.float32, rng)
        entries.scores[:] = special[torch.tensor(rng.integers(0, len(special), (1, 4, 40)))]
        entries.scores[0, 3] = 0.25
        entries.rows[:, 2] = budget
        entries.check(budget)


def test_random_scores_of_all_magnitudes(rng: np.random.Generator) -> None:
    entries = Entries(1, 2, 5000, 8, torch.float32, rng)
    entries.scores[:] = torch.tensor(np.exp(rng.normal(0, 20, (1, 2, 5000))))
    entries.rows[:, 2:] = torch.tensor([1234, 100])
    entries.check(1300, 4)


@pytest.mark.parametrize("in_place", [False, True])
def test_strides_and_threads(in_place: bool, rng: np.random.Generator) -> None:
    for num_threads in (1, 2, 3):
        entries = Entries(3, 4, 900, 64, torch.bfloat16, rng)
        entries.rows[:, 2:] = torch.tensor([300, 30])
        for name in ("key", "value"):
            wide = torch.full((900, 3, 4, 70), 5.0, dtype=torch.bfloat16)
            wide[..., :64] = getattr(entries, name).permute(2, 0, 1, 3)
            setattr(entries, name, wide[..., :64].permute(1, 2, 0, 3))
        entries.check(301, 2, in_place, num_threads)
        assert (wide[..., 64:] == 5).all()


def test_nothing_to_do(rng: np.random.Generator) -> None:
    for shape in ((0, 2, 5), (2, 2, 0)):
        Entries(*shape, 8, torch.float32, rng).check(0)


# ---- refusals: each names its argument, and nothing is written ----


def refuse(message: str, kind: type[Exception] = ValueError, **changes: Any) -> None:
    rng = np.random.default_rng(1)
    entries = Entries(2, 2, 10, 8, torch.float32, rng)
    entries.rows[:, 2] = 6
    names = ("key_out", "value_out", "scores_out", "positions_out")
    outputs = dict(zip(names, entries.outputs(6), strict=True))
    arguments: dict[str, Any] = {
        **{name: getattr(entries, name) for name in ("key", "value", "scores", "positions", "rows")},
        **outputs,
        **{"num_sinks": 0, "num_threads": 1, "allocate": allocate},
    }
    arguments.update(
        {name: change(arguments) if callable(change) else change for name, change in changes.items()}
    )
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    with pytest.raises(kind, match=message):
        _C.h2o_select(*arguments.values())
    for now, then in zip(tensors, before, strict=True):
        assert_same_bits(now, then)


def test_bad_arguments() -> None:
    ones = torch.ones

    def rows_of(budget: int) -> Tensor:
        return torch.tensor([[30, 0, 6, 1], [30, 0, budget, 1]], dtype=torch.int32)

    refuse(r"key_out: expected at least 7 slots, got 6", rows=rows_of(7))
    refuse(r"key_out: expected at least 10 slots, got 6", rows=rows_of(2**31 - 1))
    refuse(r"key: expected an array, got None", TypeError, key=None)
    refuse(r"key: expected dtype float32, bfloat16 or float16", TypeError, key=ones(2, 2, 10, 8).int())
    refuse(r"key: expected 4 dimensions", key=ones(2, 10, 8))
    refuse(r"value: expected shape", value=ones(2, 2, 9, 8))
    refuse(r"value_out: expected shape \(2, 2, 6, 8\)", value_out=ones(2, 2, 7, 8))
    refuse(r"key_out: expected shape \(2, 2, 6, 8\)", key_out=ones(2, 3, 6, 8))
    refuse(r"key_out: expected dtype float32", TypeError, key_out=ones(2, 2, 6, 8).half())
    refuse(r"scores_out: expected shape", scores_out=ones(2, 2, 10))
    refuse(r"positions_out: expected dtype int32", TypeError, positions_out=ones(2, 2, 6))
    refuse(r"positions: expected a contiguous last", positions=ones(2, 2, 20).int()[..., ::2])
    refuse(r"rows: expected shape \(2, 4\)", rows=ones(1, 4).int())
    refuse(r"num_sinks: expected at least 0", num_sinks=-1)
    refuse(
        r"key_out: expected the input's strides, as it is the input's memory",
        key_out=lambda given: given["key"].flatten()[: 2 * 2 * 6 * 8].view(2, 2, 6, 8),
    )
