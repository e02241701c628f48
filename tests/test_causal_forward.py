"""Plain causal attention with past keys, padding on any side, and the log-sum-exp alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_close, assert_same_bits
from cases import DTYPES, each_level
from torch import Tensor

from sinklora import _C

# Twice what the plain computation in the dtype misses by, on inputs of these tests.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# batch, heads, key/value heads, queries, keys, head_dim
SIZES = (
    (1, 1, 1, 1, 1, 8),
    (2, 4, 2, 1, 9, 16),
    (1, 2, 1, 7, 7, 24),
    (2, 4, 1, 33, 130, 40),
    (1, 8, 2, 65, 65, 64),
    (1, 4, 2, 50, 449, 16),
    (1, 2, 2, 400, 800, 16),
    (3, 3, 3, 5, 65, 128),
    (1, 2, 1, 9, 40, 256),
)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def allocate(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def inputs(size: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, queries, keys, dim = size
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    query, key, value = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    return query, key, value


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    threads: int = 2,
) -> tuple[Tensor, Tensor]:
    """Output and lse; the output stays NaN where only the lse is asked for."""
    output = torch.full_like(query, float("nan"))
    lse = torch.full(query.shape[:3], float("nan"))
    out = None if value is None else output
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _C.causal_forward(query, key, value, out, lse, mask, scale, threads, allocate)
    return output, lse


def visible(batch: int, queries: int, keys: int, mask: Tensor | None) -> Tensor:
    """Bool (B, n_query, n_key): which column sees which; padded queries see nothing."""
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, -1, -1)
    return seen if mask is None else seen & mask[:, None, :] & mask[:, keys - queries :, None]


def dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition in float64; padded rows: output 0, lse -infinity."""
    repeat = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.double().nan_to_num().repeat_interleave(repeat, 1) for x in (key, value))
    scores = query.double().nan_to_num() @ key.transpose(-1, -2) * scale
    sees = visible(query.shape[0], query.shape[2], key.shape[2], mask)[:, None]
    lse = scores.masked_fill(~sees, float("-inf")).logsumexp(-1)
    probabilities = torch.where(sees, (scores - lse[..., None]).exp(), 0.0)
    return probabilities @ value, lse


def random_mask(batch: int, keys: int, kind: str, rng: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(batch, keys, dtype=torch.bool)
    if kind == "holes":
        return torch.rand(batch, keys, generator=rng) < 0.6
    for row in range(batch):
        padded = int(torch.randint(0, keys + 1, (), generator=rng))
        mask[row, :padded] = False
    return mask.flip(1) if kind == "right" else mask


@every_size
@every_dtype
@pytest.mark.parametrize("kind", ("none", "left", "right", "holes"))
def test_matches_the_definition(
    size: tuple[int, ...], dtype: torch.dtype, kind: str, torch_rng: torch.Generator
) -> None:
    query, key, value = inputs(size, dtype, torch_rng)
    mask = random_mask(size[0], size[4], kind, torch_rng)
    want, want_lse = dense(query, key, value, mask)
    if mask is not None:  # padding may hold anything
        for x in (key, value):
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
        query.masked_fill_(~mask[:, None, size[4] - size[3] :, None], float("nan"))
    for level in each_level():
        output, lse = causal(query, key, value, mask)
        assert_close(output, want, TOLERANCE[dtype], TOLERANCE[dtype], f"{level}: output")
        assert_close(lse, want_lse, 2e-5, 2e-5, f"{level}: lse")
        untouched, alone = causal(query, key, None, mask)
        assert_same_bits(alone, lse, f"{level}: lse alone")
        assert untouched.isnan().all()


@every_dtype
def test_without_past_the_bits_are_one_groups(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, value = inputs((2, 4, 2, 449, 449, 24), dtype, torch_rng)
    output, lse = causal(query, key, value)
    want, want_lse = torch.empty_like(query), torch.empty(query.shape[:3])
    settings: tuple[Any, ...] = (449, 0, 0, 0.0, True, 24**-0.5, 1, allocate)
    _C.attention_forward(query, key, value, want, want_lse, None, None, None, *settings)
    assert_same_bits(output, want)
    assert_same_bits(lse, want_lse, "lse")


@every_dtype
@pytest.mark.parametrize("queries", (1, 20, 300))
def test_a_row_alone_equals_it_among_padding(
    queries: int, dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, value = inputs((3, 4, 2, queries, 300, 16), dtype, torch_rng)
    mask = torch.zeros(3, 300, dtype=torch.bool)
    mask[0, 130:] = True  # on the left
    mask[1] = torch.rand(300, generator=torch_rng) < 0.5
    mask[1, -1] = True
    mask[2] = True
    together = causal(query, key, value, mask)
    for row in range(3):
        keys = mask[row].nonzero()[:, 0]
        own = mask[row, 300 - queries :].nonzero()[:, 0]
        one = slice(row, row + 1)
        alone = causal(query[one][:, :, own], key[one][:, :, keys], value[one][:, :, keys])
        for got, want, name in zip(together, alone, ("output", "lse"), strict=True):
            assert_same_bits(got[one][:, :, own], want, f"row {row}: {name}")


@every_dtype
@pytest.mark.parametrize("past", (0, 700))
def test_threads_change_no_bit(
    past: int, dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, value = inputs((1, 2, 1, 450, 450 + past, 64), dtype, torch_rng)
    want = causal(query, key, value, threads=1)
    for threads in (2, 3, 16):
        for got, one, name in zip(
            causal(query, key, value, threads=threads), want, ("output", "lse"), strict=True
        ):
            assert_same_bits(got, one, f"{threads} threads: {name}")


@every_dtype
def test_no_bit_leaks_from_a_later_key(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, value = inputs((1, 2, 1, 60, 100, 16), dtype, torch_rng)
    clean = causal(query, key, value)
    for token in (45, 70, 98, 99):
        rows = token - 40  # queries before the token
        for which in (key, value):
            saved = which[:, :, token].clone()
            which[:, :, token] = 1e4
            for got, want in zip(causal(query, key, value), clean, strict=True):
                assert_same_bits(got[:, :, :rows], want[:, :, :rows], f"token {token}")
                assert not torch.equal(got[:, :, rows:], want[:, :, rows:]) or which is value
            which[:, :, token] = saved


@pytest.mark.parametrize("scale", (-0.5, 3e38, 0.0))
def test_scales(scale: float, cpu_level: str, torch_rng: torch.Generator) -> None:
    query, key, value = inputs((1, 2, 1, 5, 20, 8), torch.float32, torch_rng)
    query = query * 0 if scale > 1 else query
    want, want_lse = dense(query, key, value, None, scale)
    output, lse = causal(query, key, value, scale=scale)
    assert_close(output, want, 1e-5, 1e-5)
    assert_close(lse, want_lse, 2e-5, 2e-5)


def test_strided_memory(cpu_level: str, torch_rng: torch.Generator) -> None:
    query, key, value = inputs((2, 4, 2, 20, 50, 16), torch.bfloat16, torch_rng)
    want = causal(query, key, value)
    wide = [torch.full((2, 60, h, 20), float("nan"), dtype=torch.bfloat16) for h in (4, 2, 2)]
    views = [
        w[:, 3 : 3 + x.shape[2], :, 2:18].transpose(1, 2)
        for w, x in zip(wide, (query, key, value), strict=True)
    ]
    for view, x in zip(views, (query, key, value), strict=True):
        view.copy_(x)
    for got, one in zip(causal(*views), want, strict=True):
        assert_same_bits(got, one)


def test_nothing_to_do() -> None:
    for size in ((0, 2, 1, 3, 5, 8), (1, 2, 1, 0, 5, 8), (1, 2, 1, 0, 0, 8)):
        output, lse = causal(*inputs(size, torch.float32, torch.Generator()))
        assert output.shape == (*size[:2], size[3], 8) and lse.shape == (*size[:2], size[3])


def test_bad_arguments(torch_rng: torch.Generator) -> None:
    query, key, value = inputs((1, 4, 2, 5, 9, 16), torch.float32, torch_rng)
    output, lse = torch.zeros_like(query), torch.zeros(1, 4, 5)

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        arguments = dict(query=query, key=key, value=value, output=output, lse=lse, mask=None) | changes
        with pytest.raises(error, match=message):
            _C.causal_forward(*arguments.values(), 0.25, 1, allocate)  # type: ignore[arg-type]
        assert not output.any() and not lse.any()

    refused(
        ValueError,
        "key: expected at least the query's 5 tokens, got 4",
        key=key[:, :, :4],
        value=value[:, :, :4],
    )
    refused(ValueError, "output: expected an array, as value is given, got none", output=None)
    refused(ValueError, "value: expected an array, as output is given, got none", value=None)
    refused(ValueError, r"value: expected shape \(1, 2, 9, 16\)", value=value[:, :, :5])
    refused(ValueError, r"padding_mask: expected shape \(1, 9\)", mask=torch.ones(1, 5, dtype=torch.bool))
    refused(TypeError, "padding_mask: expected dtype bool", mask=torch.ones(1, 9))
    refused(ValueError, r"lse: expected shape \(1, 4, 5\)", lse=torch.zeros(1, 4, 9))
    refused(TypeError, "lse: expected an array, got None", lse=None)
    refused(TypeError, "key: expected dtype float32", key=key.half())
