"""h2o_decode's CUDA kernels on the emulator: the tests of the CPU's kernels, and the two compared.

Where those tests change the number of threads, the emulator changes the order of blocks, warps and lanes.
"""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import test_h2o_decode
import torch
from accuracy import assert_close, assert_same_bits
from cases import DTYPES
from h2o_support import SEEN, USED, Cache, empty_cache
from test_h2o_decode import (  # noqa: F401
    test_against_float64,
    test_every_number_of_query_rows,
    test_nan_scores_are_evicted_last_and_infinities_before,
    test_nothing_to_do,
    test_padding_is_as_if_it_were_not_there,
    test_queries_do_not_see_the_future,
    test_recent_counts_the_newest_positions,
    test_scales,
    test_scores_are_summed_or_averaged_over_the_group,
    test_steps_follow_the_simulation,
    test_steps_have_the_same_bits_for_every_thread_count_and_batch,
    test_the_largest_logit_may_stand_anywhere,
    test_the_newest_of_equals_is_evicted,
    test_wrong_counts_never_overrun,
)
from torch import Tensor


@pytest.fixture
def cpu_level() -> str:
    """Once, not for every level of the CPU."""
    return "none"


def decode(*tensors: Tensor, num_threads: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    emulated.seed(num_threads)
    return emulated.decode(*tensors, **options)


def step(cache: Cache, *tensors: Tensor, num_threads: int = 1, **options: Any) -> Tensor:
    emulated.seed(num_threads)
    return emulated.step(cache, *tensors, **options)


CPU_STEP = Cache.step


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_h2o_decode, "decode", decode)
    monkeypatch.setattr(Cache, "step", step)


# The slowest of these tests, and the same loop for every dtype.
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float32, torch.float16))],
)
@pytest.mark.race_only
def test_bits_depend_on_live_slots_only(dtype: torch.dtype, torch_rng: torch.Generator) -> None:
    test_h2o_decode.test_bits_depend_on_live_slots_only("none", dtype, torch_rng)


# ---- the CPU's kernels on the same inputs ----


def filled(
    batch: int, kv_heads: int, capacity: int, used: int, dim: int, dtype: torch.dtype, rng: torch.Generator
) -> Cache:
    """Full to the budget but for the second row, its free slots somewhere in the middle."""
    cache = empty_cache(batch, kv_heads, capacity, dim, dtype, [used] * batch, [3] * batch)
    for b in range(batch):
        n = used if b == 0 else used // 2
        for hk in range(kv_heads):
            places = torch.randperm(used + 1 if b == 0 else n, generator=rng)[:n]
            for x in (cache.key, cache.value):
                x[b, hk, places] = torch.randn(n, dim, generator=rng).to(dtype)
            cache.scores[b, hk, places] = torch.rand(n, generator=rng)
            cache.positions[b, hk, places] = torch.randperm(2 * used, generator=rng)[:n].int()
            free = set(range(n + 1)) - set(places.tolist())
            cache.free_slot[b, hk] = free.pop()
        cache.rows[b, SEEN], cache.rows[b, USED] = 2 * used, n
    return cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 1, 8), (3, 3, 256), (8, 2, 128), (10, 2, 72)])
def test_steps_like_the_cpu(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """From the same states: the same slots, and keys and values bit by bit. Seeded: no ties."""
    rng = torch.Generator().manual_seed(heads + dim)
    cache = filled(2, kv_heads, 300, 270, dim, dtype, rng)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for number in range(12):
        query = torch.randn(2, heads, 1, dim, generator=rng).to(dtype)
        new = [torch.randn(2, kv_heads, 1, dim, generator=rng).to(dtype) for _ in range(2)]
        kept = torch.tensor([[True], [number % 3 != 1]])
        ours = cache.clone()
        output = ours.step(query, *new, new_mask=kept, num_sinks=2, mean=bool(number % 2))
        expected = CPU_STEP(cache, query, *new, new_mask=kept, num_sinks=2, mean=bool(number % 2))
        assert_close(output, expected, tolerance, name=f"output of step {number}")
        assert_close(ours.scores, cache.scores, 2e-5, 2e-5, name=f"scores of step {number}")
        for name in ("key", "value", "positions", "free_slot", "rows"):
            assert_same_bits(getattr(ours, name), getattr(cache, name), name)


def test_rows_of_any_alignment(torch_rng: torch.Generator) -> None:
    """Memory that cannot be read 16 bytes at a time; nothing between the rows is touched."""
    for dtype in DTYPES:
        cache = filled(2, 2, 40, 30, 24, dtype, torch_rng)
        wide = torch.full((2, 40, 2, 2, 27), 7.0, dtype=dtype)
        odd = cache.clone()._replace(
            **{name: wide[i, ..., 1:25].permute(1, 2, 0, 3) for i, name in enumerate(("key", "value"))}
        )
        odd.key.copy_(cache.key), odd.value.copy_(cache.value)
        query = torch.randn(2, 6, 1, 25, generator=torch_rng).to(dtype)[..., 1:]
        new = torch.randn(2, 2, 2, 1, 25, generator=torch_rng).to(dtype)[..., 1:]
        output = torch.full((2, 6, 1, 27), 7.0, dtype=dtype)[..., 1:25]
        odd.step(query, *new, output=output)
        expected = cache.step(query.clone(), *new.clone())
        assert_same_bits(output, expected, "output")
        for name, x in cache._asdict().items():
            assert_same_bits(getattr(odd, name), x, name)
        assert (wide[..., 0] == 7).all() and (wide[..., 25:] == 7).all()


def test_any_byte_but_zero_keeps(torch_rng: torch.Generator) -> None:
    query, key, value = torch.randn(3, 1, 2, 50, 16, generator=torch_rng)
    keep = torch.randint(0, 256, (2, 100), generator=torch_rng, dtype=torch.uint8)[:1, ::2]
    keep[:, ::3] = 0
    scores = torch.zeros(2, 1, 2, 50)
    one = decode(query[:, :, -3:], key, value, mask=keep.view(torch.bool), scores=scores[0])
    other = decode(query[:, :, -3:], key, value, mask=keep != 0, scores=scores[1])
    for a, b in zip((*one, scores[0]), (*other, scores[1]), strict=True):
        assert_same_bits(a, b)
