"""h2o_decode (csrc/core/h2o.h): attention of a few tokens over a cache, scores, the step with eviction."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from accuracy import assert_close, assert_same_bits
from cases import DTYPES
from h2o_support import BUDGET, RECENT, SEEN, UNSEEN, USED, Cache, attend, decode, double, empty_cache
from torch import Tensor

from sinklora import _C

# batch, heads, kv heads, queries, keys, dim
SHAPES = [
    (1, 8, 2, 1, 1100, 128),
    (2, 4, 4, 1, 37, 64),
    (1, 6, 2, 3, 600, 72),
    (1, 8, 1, 8, 530, 8),
    (2, 8, 2, 5, 33, 256),
    (1, 4, 4, 1, 1030, 40),
    (1, 4, 2, 2, 2, 96),
    (3, 2, 1, 4, 5, 16),
    (1, 1, 1, 1, 1, 24),
    (1, 3, 3, 7, 63, 48),
]


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, num_queries, num_keys, dim = shape
    sizes = [(batch, heads, num_queries, dim)] + [(batch, kv_heads, num_keys, dim)] * 2
    query, key, value = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The yardstick of the accuracy rule: every step in the input dtype."""
    ratio = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(ratio, 1).mT * scale
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    allowed = visible[None, None] if mask is None else visible[None, None] & mask[:, None, None]
    weights = torch.softmax(logits.masked_fill(~allowed, torch.finfo(query.dtype).min), -1)
    return weights @ value.repeat_interleave(ratio, 1)


def check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 0.2, window: int = 0
) -> None:
    expected = attend(query, key, value, scale=scale, mask=mask, window=window)
    scores = torch.rand(key.shape[:3])
    before = double(scores)
    output, lse = decode(query, key, value, mask=mask, scores=scores, scale=scale, window=window)
    kept = np.isfinite(expected.lse)[..., None]
    yardstick = np.abs(double(plain(query, key, value, mask, scale)) - expected.output) * kept
    assert_close(output, expected.output, 2 * float(yardstick.max(initial=0)) + 1e-5, name="output")
    assert_close(lse, expected.lse, 2e-5, 2e-5, name="lse")
    assert_close(scores, before + expected.scores, 2e-5, 2e-5, name="scores")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    cpu_level: str, dtype: torch.dtype, shape: tuple[int, ...], torch_rng: torch.Generator
) -> None:
    check(*tensors(shape, dtype, torch_rng), scale=shape[-1] ** -0.5)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("num_queries", range(1, 9))
def test_every_number_of_query_rows(
    cpu_level: str, ratio: int, num_queries: int, torch_rng: torch.Generator
) -> None:
    for dtype in DTYPES:
        query, key, value = tensors((1, 2 * ratio, 2, num_queries, 41, 32), dtype, torch_rng)
        check(query, key, value)
        check(query, key, value, window=2)


@pytest.mark.parametrize("mean", [False, True])
def test_scores_are_summed_or_averaged_over_the_group(mean: bool, torch_rng: torch.Generator) -> None:
    query, key, value = tensors((2, 6, 2, 2, 50, 16), torch.float32, torch_rng)
    scores = torch.zeros(2, 2, 50)
    decode(query, key, value, scores=scores, mean=mean)
    assert_close(scores, attend(query, key, value, scale=0.25, mean=mean).scores, 2e-5, 2e-5)
    assert_close(scores.sum(-1), np.full((2, 2), 2.0 if mean else 6.0), 1e-4)


PADDINGS = ("left", "right", "holes", "all", "one")


def padding(kind: str, num_keys: int, generator: torch.Generator) -> Tensor:
    kept = torch.ones(num_keys, dtype=torch.bool)
    if kind == "left":
        kept[: num_keys // 3] = False
    elif kind == "right":
        kept[-2:] = False
    elif kind == "holes":
        kept = torch.rand(num_keys, generator=generator) > 0.4
    elif kind == "one":
        kept[:-1] = False
    else:
        kept[:] = False
    return kept


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("num_keys", [40, 1200])
def test_padding_is_as_if_it_were_not_there(
    cpu_level: str, num_queries: int, num_keys: int, torch_rng: torch.Generator
) -> None:
    """Bit for bit: each row equals its kept columns alone, and NaN in padding changes nothing."""
    for dtype in DTYPES:
        shape = (len(PADDINGS), 4, 2, num_queries, num_keys, 40)
        query, key, value = tensors(shape, dtype, torch_rng)
        mask = torch.stack([padding(kind, num_keys, torch_rng) for kind in PADDINGS])
        check(query, key, value, mask=mask, window=num_queries // 2)
        poisoned = [
            x.masked_fill(~mask[:, None, -x.shape[2] :, None], torch.nan) for x in (query, key, value)
        ]
        scores = torch.zeros(key.shape[:3])
        output, lse = decode(*poisoned, mask=mask, scores=scores)
        for b, kept in enumerate(mask):
            columns = kept.nonzero()[:, 0]
            queries = kept[-num_queries:].nonzero()[:, 0]
            dead = (~kept[-num_queries:]).nonzero()[:, 0]
            assert not output[b][:, dead].any() and torch.isneginf(lse[b][:, dead]).all()
            assert not scores[b][:, ~kept].any()
            if len(queries):
                row = (query[b : b + 1, :, queries], key[b : b + 1, :, columns], value[b : b + 1, :, columns])
                alone = torch.zeros(1, 2, len(columns))
                output_alone, lse_alone = decode(*row, scores=alone)
                assert_same_bits(output[b : b + 1, :, queries], output_alone, "output")
                assert_same_bits(lse[b : b + 1, :, queries], lse_alone, "lse")
                assert_same_bits(scores[b : b + 1][:, :, columns], alone, "scores")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_live_slots_only(
    cpu_level: str, dtype: torch.dtype, torch_rng: torch.Generator
) -> None:
    """Strides, threads, the batch and the other queries leave every bit alone."""
    query, key, value = tensors((3, 6, 2, 3, 1500, 48), dtype, torch_rng)
    scores = torch.zeros(3, 2, 1500)
    output, lse = decode(query, key, value, scores=scores)

    def strided(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[2], x.shape[0], x.shape[1], x.shape[3] + 5), torch.nan, dtype=dtype)
        wide[..., : x.shape[3]] = x.permute(2, 0, 1, 3)
        return wide[..., : x.shape[3]].permute(1, 2, 0, 3)

    for num_threads in (1, 2, 3, 4, 5):
        for layout in (strided, Tensor.clone):
            again = torch.zeros(3, 2, 1500)
            inputs = [layout(x) for x in (query, key, value)]
            output_again, lse_again = decode(*inputs, scores=again, num_threads=num_threads)
            assert_same_bits(output_again, output, "output")
            assert_same_bits(lse_again, lse, "lse")
            assert_same_bits(again, scores, "scores")
    for b, i in itertools.product(range(3), range(3)):
        end = 1500 - 2 + i
        one = decode(query[b : b + 1, :, i : i + 1], key[b : b + 1, :, :end], value[b : b + 1, :, :end])
        assert_same_bits(one[0], output[b : b + 1, :, i : i + 1], "one query alone")
        assert_same_bits(one[1], lse[b : b + 1, :, i : i + 1], "one query alone")


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e30, -1e30, 1e-30, 50.0])
def test_scales(cpu_level: str, scale: float, torch_rng: torch.Generator) -> None:
    query, key, value = tensors((1, 4, 2, 2, 70, 16), torch.float32, torch_rng)
    if abs(scale) < 100:
        check(query, key, value, scale=scale)
        return
    output, lse = decode(query, key, value, scale=scale)
    expected = attend(query, key, value, scale=scale)
    assert_close(output, expected.output, 1e-5)
    assert_close(lse, expected.lse, 2e-5, 2e-5)


def test_the_largest_logit_may_stand_anywhere(cpu_level: str, torch_rng: torch.Generator) -> None:
    """Far above or below the others, in the first, a middle or the last slot of a long cache."""
    query, key, value = tensors((1, 4, 2, 1, 2500, 16), torch.float32, torch_rng)
    query[:] = query[:, :1]
    for slot in (0, 1300, 2499):
        for factor in (-400.0, 400.0):
            outlier = key.clone()
            outlier[:, :, slot] = factor * query[0, 0]
            check(query, outlier, value)


def test_queries_do_not_see_the_future(cpu_level: str, torch_rng: torch.Generator) -> None:
    for dtype in DTYPES:
        query, key, value = tensors((1, 4, 2, 4, 60, 32), dtype, torch_rng)
        output, lse = decode(query, key, value)
        for late in range(1, 4):
            poisoned = [key.clone(), value.clone()]
            for x in poisoned:
                x[:, :, 56 + late] = 1e4
            output_again, lse_again = decode(query, *poisoned)
            assert_same_bits(output_again[:, :, :late], output[:, :, :late])
            assert_same_bits(lse_again[:, :, :late], lse[:, :, :late])


# ---- the step ----


class Simulation:
    """One batch row and key/value head in float64, by slots: rules a to d of csrc/core/h2o.h."""

    def __init__(self, capacity: int, budget: int, recent: int, num_sinks: int) -> None:
        self.budget, self.recent, self.num_sinks = budget, recent, num_sinks
        self.keys = [None] * capacity
        self.values = [None] * capacity
        self.scores = np.zeros(capacity)
        self.positions = np.full(capacity, UNSEEN)
        self.free = self.used = self.seen = 0

    def step(self, queries: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
        self.keys[self.free], self.values[self.free] = key, value
        self.positions[self.free], self.scores[self.free] = self.seen, 0.0
        live = range(self.used + 1)
        logits = scale * queries @ np.stack([self.keys[s] for s in live]).T
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        self.scores[: self.used + 1] += weights.sum(0)
        output = weights @ np.stack([self.values[s] for s in live])
        if self.used + 1 > self.budget:
            evictable = [s for s in live if self.num_sinks <= self.positions[s] <= self.seen - self.recent]
            self.free = min(evictable, key=lambda s: (self.scores[s], -self.positions[s]))
            self.positions[self.free], self.scores[self.free] = UNSEEN, 0.0
        else:
            self.used += 1
            self.free = self.used
        self.seen += 1
        return output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "budget", "recent", "num_sinks"),
    [
        (4, 2, 16, 20, 5, 2),
        (3, 3, 40, 9, 9, 0),
        (8, 1, 64, 12, 8, 4),
        (2, 1, 8, 1, 1, 0),
        (4, 2, 32, 70, 1, 3),
    ],
)
def test_steps_follow_the_simulation(
    cpu_level: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    budget: int,
    recent: int,
    num_sinks: int,
    torch_rng: torch.Generator,
) -> None:
    """Some hundred steps from an empty cache; two rows with budgets of their own, one of which pauses."""
    batch, capacity, scale, ratio = 2, budget + 9, 1.5 * dim**-0.5, heads // kv_heads
    budgets = [budget, budget + 8]
    cache = empty_cache(batch, kv_heads, capacity, dim, dtype, budgets, [recent, recent])
    simulations = {
        (b, hk): Simulation(capacity, budgets[b], recent, num_sinks)
        for b in range(batch)
        for hk in range(kv_heads)
    }
    for step in range(150):
        query = torch.randn(batch, heads, 1, dim, generator=torch_rng).to(dtype)
        new = [torch.randn(batch, kv_heads, 1, dim, generator=torch_rng).to(dtype) for _ in range(2)]
        kept = torch.tensor([[True], [step % 5 != 3]])
        before = cache.clone()
        output = cache.step(query, *new, new_mask=kept, num_sinks=num_sinks, scale=scale)
        for (b, hk), simulation in simulations.items():
            group = slice(hk * ratio, (hk + 1) * ratio)
            if not kept[b]:
                assert not output[b, group].any()
                for name, now in cache.row(b)._asdict().items():
                    assert_same_bits(now, getattr(before.row(b), name), name)
                continue
            expected = simulation.step(
                double(query[b, group, 0]), double(new[0][b, hk, 0]), double(new[1][b, hk, 0]), scale
            )
            tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
            assert_close(output[b, group, 0], expected, tolerance, name=f"output of step {step}")
            assert cache.positions[b, hk].tolist() == simulation.positions.tolist(), f"step {step}"
            assert cache.free_slot[b, hk] == simulation.free
            assert_close(cache.scores[b, hk], simulation.scores, 2e-5, 2e-5, f"scores of step {step}")
            assert cache.rows[b].tolist() == [simulation.seen, simulation.used, budgets[b], recent]
    assert (cache.rows[:, USED] == cache.rows[:, BUDGET]).all()


def test_the_newest_of_equals_is_evicted(cpu_level: str) -> None:
    """With equal keys all scores of an age are equal; positions stand in any order of slots."""
    cache = empty_cache(1, 1, 40, 8, torch.float32, [33], [9])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(5))
    cache.key[:, :, :33] = cache.value[:, :, :33] = 0
    cache.positions[0, 0, :33] = order.int()
    cache.scores[0, 0, :33] = 7.0
    cache.scores[0, 0, :33][order >= 20] = 9.0
    cache.free_slot[0, 0] = 33
    cache.rows[0] = torch.tensor([33, 33, 33, 9])
    zero = torch.zeros(1, 1, 1, 8)
    for victim in (19, 18, 17):
        slot = int((cache.positions[0, 0] == victim).nonzero())
        cache.step(zero, zero, zero)
        assert cache.free_slot.item() == slot
        assert cache.positions[0, 0, slot] == UNSEEN and cache.scores[0, 0, slot] == 0


def test_nan_scores_are_evicted_last_and_infinities_before(cpu_level: str) -> None:
    for scores, victims in (
        ([torch.nan, torch.inf, 3.0], [2, 1, 0]),
        ([torch.nan, torch.nan, torch.inf], [2, 1, 0]),
    ):
        cache = empty_cache(1, 1, 4, 8, torch.float32, [3], [1])
        cache.key[:] = cache.value[:] = 0
        cache.positions[0, 0, :3] = torch.arange(3)
        cache.scores[0, 0, :3] = torch.tensor(scores)
        cache.free_slot[0, 0], cache.rows[0, SEEN], cache.rows[0, USED] = 3, 3, 3
        zero = torch.zeros(1, 1, 1, 8)
        first = cache.clone()
        first.step(zero, zero, zero)
        assert first.free_slot.item() == victims[0]


def test_steps_have_the_same_bits_for_every_thread_count_and_batch(torch_rng: torch.Generator) -> None:
    def run(num_threads: int, rows: slice) -> Cache:
        generator = torch.Generator().manual_seed(3)
        cache = empty_cache(3, 2, 1301, 16, torch.bfloat16, [1300, 1290, 600], [4, 5, 6])
        fill = torch.randn(2, 3, 2, 1301, 16, generator=generator).to(torch.bfloat16)
        cache.key[:, :, :600], cache.value[:, :, :600] = fill[:, :, :, :600]
        cache.positions[:, :, :600] = torch.arange(600, dtype=torch.int32)
        cache.free_slot[:] = 600
        cache.rows[:, :2] = 600
        cache = Cache(*(x[rows] for x in cache))
        for _ in range(8):
            query = torch.randn(3, 4, 1, 16, generator=generator).to(torch.bfloat16)
            new = torch.randn(2, 3, 2, 1, 16, generator=generator).to(torch.bfloat16)
            cache.step(query[rows], *new[:, rows], num_threads=num_threads)
        return cache

    expected = run(1, slice(None))
    for num_threads in (2, 3, 5):
        for name, x in run(num_threads, slice(None))._asdict().items():
            assert_same_bits(x, getattr(expected, name), name)
    for b in range(3):
        for name, x in run(2, slice(b, b + 1))._asdict().items():
            assert_same_bits(x, getattr(expected, name)[b : b + 1], name)


def test_wrong_counts_never_overrun(cpu_level: str, rng: np.random.Generator) -> None:
    """Values beyond the buffers are clamped; what stands around the buffers stays as it is."""
    around = {
        name: torch.full((3, *x.shape[1:]), 77, dtype=x.dtype)
        for name, x in empty_cache(1, 2, 5, 8, torch.float32, [4], [1])._asdict().items()
    }
    cache = Cache(**{name: x[1:2] for name, x in around.items()})
    extremes = [-(2**31), -1, 0, 3, 5, 6, 2**31 - 1]
    one = torch.ones(1, 2, 1, 8)
    for _ in range(300):
        cache.rows[:] = torch.tensor(rng.choice(extremes, 4), dtype=torch.int32)
        cache.free_slot[:] = torch.tensor(rng.choice(extremes, (1, 2)), dtype=torch.int32)
        cache.step(one, one, one, num_sinks=int(rng.choice([0, 2, 2**40])))
    for x in around.values():
        assert (x[0] == 77).all() and (x[2] == 77).all()


def test_nothing_to_do() -> None:
    empty = torch.zeros(0, 2, 1, 8)
    output, lse = decode(empty, torch.zeros(0, 1, 9, 8), torch.zeros(0, 1, 9, 8))
    assert output.shape == empty.shape and lse.shape == (0, 2, 1)


# ---- refusals: each names its argument, and nothing is written ----


def refuse(message: str, kind: type[Exception] = ValueError, **changes: object) -> None:
    cache = empty_cache(1, 2, 6, 8, torch.float32, [4], [1])
    new = torch.ones(1, 2, 1, 8)
    arguments: dict[str, object] = {
        "query": torch.ones(1, 4, 1, 8),
        "key": cache.key,
        "value": cache.value,
        "output": torch.ones(1, 4, 1, 8),
        "lse": None,
        "padding_mask": None,
        "scores": cache.scores,
        "window": 0,
        "mean": False,
        "new_key": new,
        "new_value": new,
        "new_mask": None,
        "positions": cache.positions,
        "free_slot": cache.free_slot,
        "rows": cache.rows,
        "num_sinks": 0,
        "scale": 1.0,
        "num_threads": 1,
        "allocate": lambda size: torch.empty(size, dtype=torch.uint8),
    }
    before = cache.clone()
    with pytest.raises(kind, match=message):
        _C.h2o_decode(*{**arguments, **changes}.values())  # type: ignore[arg-type]
    for now, then in zip(cache, before, strict=True):
        assert_same_bits(now, then)
    assert (arguments["output"] == 1).all()  # type: ignore[attr-defined]


def test_bad_arguments() -> None:
    ones = torch.ones
    refuse(
        r"query: expected one token, as new_key is given, got 2",
        query=ones(1, 4, 2, 8),
        output=ones(1, 4, 2, 8),
    )
    refuse(r"query: expected 1 to 8 tokens, got 9", query=ones(1, 4, 9, 8))
    refuse(r"query: expected 1 to 8 tokens, got 0", query=ones(1, 4, 0, 8))
    refuse(r"key: expected from the query's 7 ", query=ones(1, 4, 7, 8))
    refuse(r"value: expected shape \(1, 2, 6, 8\), got \(1, 2, 5, 8\)", value=ones(1, 2, 5, 8))
    refuse(r"query: expected an array, got None", TypeError, query=None)
    refuse(r"query: head_dim must be", NotImplementedError, query=ones(1, 4, 1, 12), key=ones(1, 2, 6, 12))
    refuse(r"output: expected shape", output=ones(1, 4, 1, 16))
    refuse(r"lse: expected dtype float32", TypeError, lse=ones(1, 4, 1).double())
    refuse(r"padding_mask: expected none, as rows says", padding_mask=ones(1, 6).bool())
    refuse(r"padding_mask: expected dtype bool", TypeError, padding_mask=ones(1, 6))
    refuse(r"scores: expected an array, as rows is given, got none", scores=None)
    refuse(r"scores: expected contiguous memory", scores=ones(1, 2, 9)[:, :, :6])
    refuse(r"new_value: expected an array, as rows is given", new_value=None)
    refuse(r"rows: expected an array, as free_slot is given", rows=None)
    refuse(r"new_key: expected shape \(1, 2, 1, 8\)", new_key=ones(1, 2, 2, 8))
    refuse(r"new_key: expected dtype float32", TypeError, new_key=ones(1, 2, 1, 8).half())
    refuse(r"new_mask: expected shape \(1, 1\), got \(1,\)", new_mask=ones(1).bool())
    refuse(r"positions: expected dtype int32", TypeError, positions=ones(1, 2, 6))
    refuse(r"free_slot: expected shape \(1, 2\)", free_slot=torch.zeros(2, dtype=torch.int32))
    refuse(r"rows: expected shape \(1, 4\)", rows=torch.zeros(1, 3, dtype=torch.int32))
    refuse(r"window: expected at least 0, got -1", window=-1)
    refuse(r"num_sinks: expected at least 0, got -1", num_sinks=-1)
    refuse(r"scale: expected a finite float32", scale=1e39)
    refuse(r"mean: expected a bool", TypeError, mean=1)
    refuse(r"num_threads: ", num_threads=0)


def test_a_read_only_cache_is_refused() -> None:
    key = np.zeros((1, 2, 6, 8), np.float32)
    key.flags.writeable = False
    refuse(r"key: expected writable memory", BufferError, key=key)


def test_recent_counts_the_newest_positions() -> None:
    """The window of recency moves with the tokens: an entry leaves it after so many steps, not before."""
    cache = empty_cache(1, 1, 5, 8, torch.float32, [4], [3])
    zero = torch.zeros(1, 1, 1, 8)
    for seen in range(12):
        cache.step(zero, zero, zero)
        live = sorted(p for p in cache.positions[0, 0].tolist() if p != UNSEEN)
        assert live[-min(3, seen + 1) :] == list(range(max(0, seen - 2), seen + 1))
        assert cache.rows[0, RECENT] == 3
