"""The CUDA scores of a prompt on the emulator: accuracy, padding, windows, what a score may not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_close, assert_same_bits
from emulated import score
from test_causal_forward import causal, inputs, random_mask
from test_h2o_score import assert_accurate, naive
from torch import Tensor

# batch, heads, key/value heads, queries, keys, head_dim: every head dim that kernels are instantiated for and
# some between, tiles of keys and of queries that end early, more than one chunk of queries.
SIZES = (
    (1, 1, 1, 1, 1, 8),
    (2, 4, 2, 1, 9, 16),
    (1, 2, 1, 7, 7, 24),
    (2, 4, 1, 33, 130, 40),
    (1, 4, 2, 65, 65, 64),
    (1, 2, 1, 50, 449, 72),
    (1, 2, 2, 700, 700, 16),
    (3, 3, 3, 5, 65, 128),
    (1, 2, 1, 130, 300, 184),
    (1, 2, 1, 9, 40, 256),
    (1, 1, 1, 257, 257, 248),
    (1, 2, 1, 513, 1025, 32),
)
DTYPES = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def lse_of(query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    return causal(query, key, None, mask, scale=scale)[1]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
@every_dtype
def test_matches_the_definition(
    size: tuple[int, ...], dtype: torch.dtype, torch_rng: torch.Generator
) -> None:
    query, key, _ = inputs(size, dtype, torch_rng)
    lse = lse_of(query, key)
    assert_accurate(score(query, key, lse), naive(query, key, None))


@pytest.mark.parametrize("window", (0, 1, 16, 10**9))
@pytest.mark.parametrize("kind", ("left", "right", "holes"))
def test_only_kept_columns_count(kind: str, window: int, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((3, 4, 2, 90, 330, 16), torch.bfloat16, torch_rng)
    mask = random_mask(3, 330, kind, torch_rng)
    assert mask is not None
    mask[2] = window == 1  # a row that is all padding
    want = naive(query, key, mask, window)
    key.masked_fill_(~mask[:, None, :, None], math.nan)
    query.masked_fill_(~mask[:, None, 240:, None], math.nan)
    lse = lse_of(query, key, mask)
    got = score(query, key, lse, mask, window=window)
    assert_accurate(got, want)
    assert not got[~mask[:, None].expand_as(got)].any()
    assert_accurate(score(query, key, lse, mask, window=window, mean=True) * 2, want, "mean")


@pytest.mark.parametrize("window", (1, 100, 600))
def test_a_window_is_of_the_last_queries(window: int, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 2, 1, 650, 700, 40), torch.float16, torch_rng)
    assert_accurate(score(query, key, lse_of(query, key), window=window), naive(query, key, None, window))


@pytest.mark.parametrize("window", (0, 60))
def test_a_row_alone_equals_it_among_padding(window: int, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((3, 4, 2, 600, 700, 16), torch.bfloat16, torch_rng)
    mask = torch.zeros(3, 700, dtype=torch.bool)
    mask[0, 430:] = True
    mask[1] = torch.rand(700, generator=torch_rng) < 0.5
    mask[2] = True
    together = score(query, key, lse_of(query, key, mask), mask, window=window)
    for row in range(3):
        keys, own = mask[row].nonzero()[:, 0], mask[row, 100:].nonzero()[:, 0]
        q, k = query[row : row + 1, :, own], key[row : row + 1, :, keys]
        alone = score(q, k, lse_of(q, k), window=window)
        assert_same_bits(together[row : row + 1, :, keys], alone, f"row {row}")


def test_the_cut_into_parts_changes_no_bit(torch_rng: torch.Generator) -> None:
    """So many rows fill a GPU with whole tiles of keys; a row alone is cut into chunks of queries."""
    rows, tokens = 342, 520
    query, key, _ = inputs((1, 2, 1, tokens, tokens, 8), torch.bfloat16, torch_rng)
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    mask[0] = True
    mask[1:, -1] = True
    lse = lse_of(query, key)
    want = score(query, key, lse)
    many = [x.expand(rows, *x.shape[1:]).contiguous() for x in (query, key, lse)]
    assert_same_bits(score(*many, mask)[:1], want)


@every_dtype
def test_later_keys_and_other_heads_change_no_bit(dtype: torch.dtype, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((2, 4, 2, 150, 150, 16), dtype, torch_rng)
    lse = lse_of(query, key)
    want = score(query, key, lse)
    for token, poison in ((149, 1e4), (149, math.nan), (60, math.nan)):
        saved = key[1, 1, token].clone()
        key[1, 1, token] = poison
        got = score(query, key, lse)
        key[1, 1, token] = saved
        same = torch.ones_like(got, dtype=torch.bool)
        same[1, 1, token] = False  # with the lse given, a key has a part in its own score only
        assert_same_bits(got[same], want[same], f"token {token} = {poison}")
        assert not torch.equal(got[~same], want[~same])
    query[1, 2, 70] = math.nan  # of key/value head 1: reaches the keys that it may see
    got = score(query, key, lse)
    assert got[1, 1, :71].isnan().all()
    same = ~got.isnan()
    assert_same_bits(got[same], want[same])
    assert int(same.sum()) == want.numel() - 71


def test_a_prefixs_window_is_its_own(torch_rng: torch.Generator) -> None:
    """Chunks of a prompt add up to the whole prompt's scores."""
    query, key, _ = inputs((1, 4, 2, 200, 200, 16), torch.bfloat16, torch_rng)
    whole = score(query, key, lse_of(query, key)).double()
    parts = torch.zeros_like(whole)
    for lo, hi in ((0, 1), (1, 70), (70, 200)):
        q, k = query[:, :, lo:hi], key[:, :, :hi]
        parts[:, :, :hi] += score(q, k, lse_of(q, k))
    assert_close(parts, whole, 4e-5, 4e-5)


def test_long_sums_stay_accurate() -> None:
    """A key that 4096 queries give 0.86 each: a float32 sum for each thread would miss by 7e-6 of it."""
    tokens, p = 4096, 0.86
    zeros = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16).expand(1, 1, tokens, 8)
    want = p * (tokens - torch.arange(tokens).double())
    got = score(zeros, zeros, torch.full((1, 1, tokens), math.log(1 / p)))
    assert_close(got[0, 0], want, 0, 2e-6)


@pytest.mark.parametrize("scale", (-0.5, 0.0, 3e38, -3e38))
def test_scales(scale: float, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 4, 2, 50, 70, 8), torch.float16, torch_rng)
    query = query * 0 if abs(scale) > 1 else query
    lse = lse_of(query, key, scale=scale)
    assert_accurate(score(query, key, lse, scale=scale), naive(query, key, None, scale=scale))


def test_no_probability_exceeds_one(torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 2, 1, 60, 60, 8), torch.bfloat16, torch_rng)
    got = score(query, key, lse_of(query, key, scale=1e30), scale=1e30)
    assert got.isfinite().all() and got.max() <= 120


def test_a_row_that_saw_nothing_gives_nothing(torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 2, 1, 40, 40, 8), torch.bfloat16, torch_rng)
    lse = lse_of(query, key)
    lse[0, 0, 30:] = lse[0, 1] = -math.inf
    want = naive(query[:, :1, :30], key[:, :, :30], None)
    got = score(query, key, lse)
    assert_accurate(got[:, :, :30], want)
    assert not got[:, :, 30:].any()


@pytest.mark.parametrize("offset, width", ((2, 24), (3, 21)), ids=("apart", "unaligned"))
def test_strided_memory(offset: int, width: int, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((2, 4, 2, 50, 70, 16), torch.bfloat16, torch_rng)
    wide = [torch.full((2, 80, x.shape[1], width), math.nan, dtype=x.dtype) for x in (query, key)]
    views = [
        w[:, offset : offset + x.shape[2], :, 2:18].transpose(1, 2)
        for w, x in zip(wide, (query, key), strict=True)
    ]
    for view, x in zip(views, (query, key), strict=True):
        view.copy_(x)
    lse = lse_of(query, key)
    assert_same_bits(score(*views, lse), score(query, key, lse))


def test_nothing_to_sum(torch_rng: torch.Generator) -> None:
    for size in ((0, 2, 1, 3, 5, 8), (1, 2, 1, 0, 300, 8), (1, 2, 1, 0, 0, 8)):
        query, key, _ = inputs(size, torch.bfloat16, torch_rng)
        scores = score(query, key, torch.zeros(query.shape[:3]))
        assert scores.shape == key.shape[:3] and not scores.any()
    query, key, _ = inputs((2, 2, 1, 3, 5, 8), torch.bfloat16, torch_rng)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert not score(query, key, torch.full((2, 2, 3), -math.inf), nothing).any()
