"""Column sums of causal attention: against float64, every instruction set, padding, windows, same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import assert_close, assert_same_bits
from cases import DTYPES, each_level
from test_causal_forward import allocate, causal, inputs, random_mask, visible
from torch import Tensor

from sinklora import _C

# batch, heads, key/value heads, queries, keys, head_dim
SIZES = (
    (1, 1, 1, 1, 1, 8),
    (2, 4, 2, 1, 9, 16),
    (1, 2, 1, 7, 7, 24),
    (2, 4, 1, 33, 130, 40),
    (1, 8, 2, 65, 65, 64),
    (1, 8, 1, 50, 449, 16),
    (1, 2, 2, 700, 700, 16),
    (3, 3, 3, 5, 65, 128),
    (1, 2, 1, 9, 40, 256),
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def score(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    window: int = 0,
    mean: bool = False,
    scale: float | None = None,
    threads: int = 2,
) -> Tensor:
    scores = torch.full(key.shape[:3], float("nan"))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _C.h2o_score(query, key, lse, scores, mask, window, mean, scale, threads, allocate)
    return scores


def naive(
    query: Tensor, key: Tensor, mask: Tensor | None, window: int = 0, scale: float | None = None
) -> Tensor:
    """The definition in float64, with the N x N matrix."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    scale = dim**-0.5 if scale is None else scale
    wide = key.double().nan_to_num().repeat_interleave(heads // kv_heads, 1)
    scores = query.double().nan_to_num() @ wide.transpose(-1, -2) * scale
    sees = visible(batch, queries, keys, mask)[:, None]
    probabilities = scores.masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num()
    if window:
        kept = torch.ones(batch, queries, dtype=torch.bool) if mask is None else mask[:, keys - queries :]
        later = kept.long().flip(1).cumsum(1).flip(1)  # kept queries from this one on
        probabilities = probabilities * (kept & (later <= window))[:, None, :, None]
    return probabilities.sum(2).view(batch, kv_heads, heads // kv_heads, keys).sum(2)


def assert_accurate(actual: Tensor, want: Tensor, name: str = "scores") -> None:
    assert_close(actual, want, 2e-5, 2e-5, name)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
@every_dtype
@pytest.mark.parametrize("kind", ("none", "left", "right", "holes"))
def test_matches_the_definition(
    size: tuple[int, ...], dtype: torch.dtype, kind: str, torch_rng: torch.Generator
) -> None:
    query, key, _ = inputs(size, dtype, torch_rng)
    mask = random_mask(size[0], size[4], kind, torch_rng)
    windows = (0, 1, 16, 10**9)
    wanted = [naive(query, key, mask, window) for window in windows]
    if mask is not None:  # padding may hold anything
        key.masked_fill_(~mask[:, None, :, None], float("nan"))
        query.masked_fill_(~mask[:, None, size[4] - size[3] :, None], float("nan"))
    ratio = size[1] // size[2]
    for level in each_level():
        _, lse = causal(query, key, None, mask)
        for window, want in zip(windows, wanted, strict=True):
            got = score(query, key, lse, mask, window=window)
            assert_accurate(got, want, f"{level}, window {window}")
            if mask is not None:
                assert not got[~mask[:, None].expand_as(got)].any(), f"{level}: padding has a score"
        assert_accurate(score(query, key, lse, mask, mean=True) * ratio, wanted[0], f"{level}, mean")


@every_dtype
@pytest.mark.parametrize("window", (0, 60))
def test_a_row_alone_equals_it_among_padding(
    window: int, dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, _ = inputs((3, 4, 2, 250, 300, 16), dtype, torch_rng)
    mask = torch.zeros(3, 300, dtype=torch.bool)
    mask[0, 130:] = True
    mask[1] = torch.rand(300, generator=torch_rng) < 0.5
    mask[2] = True
    together = score(query, key, causal(query, key, None, mask)[1], mask, window=window)
    for row in range(3):
        keys, own = mask[row].nonzero()[:, 0], mask[row, 50:].nonzero()[:, 0]
        q, k = query[row : row + 1, :, own], key[row : row + 1, :, keys]
        alone = score(q, k, causal(q, k, None)[1], window=window)
        assert_same_bits(together[row : row + 1, :, keys], alone, f"row {row}")


@every_dtype
def test_threads_change_no_bit(dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 4, 2, 900, 1100, 64), dtype, torch_rng)
    _, lse = causal(query, key, None)
    want = score(query, key, lse, threads=1)
    for threads in (2, 3, 16):
        assert_same_bits(score(query, key, lse, threads=threads), want, f"{threads} threads")


@every_dtype
def test_later_keys_and_other_heads_change_no_bit(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, _ = inputs((2, 4, 2, 150, 150, 16), dtype, torch_rng)
    _, lse = causal(query, key, None)
    want = score(query, key, lse)
    for token, poison in ((149, 1e4), (149, float("nan")), (60, float("nan"))):
        saved = key[1, 1, token].clone()
        key[1, 1, token] = poison
        got = score(query, key, lse)
        key[1, 1, token] = saved
        same = torch.ones_like(got, dtype=torch.bool)
        same[1, 1, token] = False  # with the lse given, a key has a part in its own score only
        assert_same_bits(got[same], want[same], f"token {token} = {poison}")
        assert not torch.equal(got[~same], want[~same])


@every_dtype
def test_a_prefixs_window_is_its_own(dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator) -> None:
    """Chunks of a prompt add up to the whole prompt's scores."""
    query, key, _ = inputs((1, 4, 2, 200, 200, 16), dtype, torch_rng)
    whole = score(query, key, causal(query, key, None)[1]).double()
    parts = torch.zeros_like(whole)
    for lo, hi in ((0, 1), (1, 70), (70, 200)):
        q, k = query[:, :, lo:hi], key[:, :, :hi]
        parts[:, :, :hi] += score(q, k, causal(q, k, None)[1])
    assert_close(parts, whole, 4e-5, 4e-5)


def test_long_sums_stay_accurate(cpu_level: str) -> None:
    """A key that 65,536 queries give 0.3 each: float32 sums of that length miss by more than is allowed."""
    tokens = 65536 if cpu_level == _C.cpu_levels()[-1] else 2048
    zeros = torch.zeros(1, 1, 1, 8).expand(1, 1, tokens, 8)
    lse = torch.full((1, 1, tokens), -math.log(0.3))
    want = 0.3 * (tokens - torch.arange(tokens).double())
    assert_accurate(score(zeros, zeros, lse)[0, 0], want)


@pytest.mark.parametrize("scale", (-0.5, 0.0, 3e38, -3e38))
def test_scales(scale: float, cpu_level: str, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 4, 2, 50, 70, 8), torch.float32, torch_rng)
    query = query * 0 if abs(scale) > 1 else query
    _, lse = causal(query, key, None, scale=scale)
    assert_accurate(score(query, key, lse, scale=scale), naive(query, key, None, scale=scale))


def test_strided_memory(cpu_level: str, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((2, 4, 2, 50, 70, 16), torch.bfloat16, torch_rng)
    _, lse = causal(query, key, None)
    wide = [torch.full((2, 80, x.shape[1], 20), float("nan"), dtype=x.dtype) for x in (query, key)]
    views = [
        w[:, 3 : 3 + x.shape[2], :, 2:18].transpose(1, 2) for w, x in zip(wide, (query, key), strict=True)
    ]
    for view, x in zip(views, (query, key), strict=True):
        view.copy_(x)
    assert_same_bits(score(*views, lse), score(query, key, lse))


def test_nothing_to_sum(torch_rng: torch.Generator) -> None:
    for size in ((0, 2, 1, 3, 5, 8), (1, 2, 1, 0, 5, 8), (1, 2, 1, 0, 0, 8)):
        query, key, _ = inputs(size, torch.float32, torch_rng)
        scores = score(query, key, torch.zeros(query.shape[:3]))
        assert scores.shape == key.shape[:3] and not scores.any()
    query, key, _ = inputs((2, 2, 1, 3, 5, 8), torch.float32, torch_rng)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert not score(query, key, torch.full((2, 2, 3), float("-inf")), nothing).any()


def test_bad_arguments(torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 4, 2, 5, 9, 16), torch.float32, torch_rng)
    lse, scores = torch.zeros(1, 4, 5), torch.zeros(1, 2, 9)

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        arguments = dict(
            query=query, key=key, lse=lse, scores=scores, mask=None, window=0, mean=False, scale=1.0
        )
        arguments |= changes
        with pytest.raises(error, match=message):
            _C.h2o_score(*arguments.values(), 1, allocate)  # type: ignore[arg-type]
        assert not scores.any()

    refused(ValueError, "key: expected at least the query's 5 tokens, got 4", key=key[:, :, :4])
    refused(ValueError, "window: expected an integer >= 0, got -1", window=-1)
    refused(TypeError, "window", window=1.5)
    refused(TypeError, "mean", mean=1)
    refused(ValueError, "scale: expected a finite float32 number", scale=float("nan"))
    refused(ValueError, r"scores: expected shape \(1, 2, 9\)", scores=torch.zeros(1, 4, 9))
    refused(TypeError, "scores: expected dtype float32", scores=torch.zeros(1, 2, 9, dtype=torch.float64))
    refused(
        ValueError,
        "scores: expected a contiguous last dimension",
        scores=torch.zeros(1, 9, 2).transpose(1, 2),
    )
    refused(ValueError, r"lse: expected shape \(1, 4, 5\)", lse=torch.zeros(1, 4, 9))
    refused(TypeError, "lse: expected an array, got None", lse=None)
    refused(ValueError, r"padding_mask: expected shape \(1, 9\)", mask=torch.ones(1, 5, dtype=torch.bool))
    refused(TypeError, "key: expected dtype float32", key=key.half())


def test_no_probability_exceeds_one(cpu_level: str, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((1, 2, 1, 60, 60, 8), torch.float32, torch_rng)
    _, lse = causal(query, key, None, scale=1e30)
    got = score(query, key, lse, scale=1e30)
    assert got.isfinite().all() and got.max() <= 120
