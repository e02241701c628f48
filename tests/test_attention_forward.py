"""Forward: the NumPy path's accuracy, layouts in memory, and what a row may not see (the poison oracle)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_close, assert_same_bits, exact
from cases import DTYPES, SHAPES, Case, case, each_level
from torch import Tensor

import sinklora
from sinklora import SFPattern, torch_ops

# Two sequences' worth of groups, shifted and not, with sinks, for everything that asks who sees what.
POISONED = (
    case((1, 4, 2, 130, 16), 32),
    case((1, 2, 2, 65, 24), 16, sinks=0, fraction=0.5),
    case((1, 2, 1, 130, 16), 20, sinks=66, fraction=0.5),
    case((1, 2, 2, 65, 16), 16, fraction=0.5, causal=False),
    case((1, 2, 1, 200, 8), 190, sinks=2, fraction=0.5),
)


def forward(
    query: Tensor, key: Tensor, value: Tensor, pattern: SFPattern, **options: Any
) -> tuple[Tensor, Tensor]:
    return torch_ops.sf_attention(query, key, value, pattern, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numpy_matches_the_definition(shape: Case, torch_rng: torch.Generator) -> None:
    inputs = shape.inputs(torch.float32, torch_rng)
    query, key, value, _ = (x.numpy() for x in inputs)
    want = exact(*inputs[:3], shape.pattern, inputs.grad, **shape.options)
    for level in each_level():
        output, lse = sinklora.sf_attention(
            query, key, value, shape.pattern, return_lse=True, **shape.options
        )
        assert isinstance(output, np.ndarray) and output.dtype == np.float32 and lse.dtype == np.float32
        assert_close(output, want.output, 1e-5, 1e-5, name=f"{level} output")
        assert_close(lse, want.lse, 2e-5, 2e-5, name=f"{level} lse")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_numpy_and_torch_give_the_same_bits(dtype: torch.dtype, torch_rng: torch.Generator) -> None:
    shape = case((2, 4, 2, 65, 32), 16)
    query, key, value, _ = shape.inputs(dtype, torch_rng)
    output = sinklora.sf_attention(query.numpy(), key.numpy(), value.numpy(), shape.pattern)
    assert_same_bits(torch.from_numpy(output), forward(query, key, value, shape.pattern)[0])


def test_output_lies_in_memory_as_the_next_layer_reads_it(torch_rng: torch.Generator) -> None:
    shape = case((2, 4, 2, 17, 16), 8)
    query, key, value, _ = shape.inputs(torch.float32, torch_rng)
    assert forward(query, key, value, shape.pattern)[0].transpose(1, 2).is_contiguous()
    output = sinklora.sf_attention(query.numpy(), key.numpy(), value.numpy(), shape.pattern)
    assert output.transpose(0, 2, 1, 3).flags.c_contiguous


# ---- layouts: the same numbers elsewhere in memory give the same bits ----


def token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second_row(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), float("nan"))
    wide[:, :, ::2] = x
    return wide[:, :, ::2]


def slice_of_wider_rows(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:3], x.shape[3] + 5), float("nan"))
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def last_dimension_strided(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


LAYOUTS = (token_major, every_second_row, slice_of_wider_rows, last_dimension_strided, batch_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    shape = case((2, 4, 2, 65, 24), 20)
    query, key, value, _ = shape.inputs(dtype, torch_rng)
    want, want_lse = forward(query, key, value, shape.pattern)
    got, got_lse = forward(layout(query), layout(key), layout(value), shape.pattern)
    assert_same_bits(got, want)
    assert_same_bits(got_lse, want_lse, "lse")


def test_expanded_heads_and_batch(cpu_level: str, torch_rng: torch.Generator) -> None:
    shape = case((1, 4, 1, 65, 16), 16)
    query, key, value, _ = shape.inputs(torch.float32, torch_rng)
    want = forward(query, key, value, shape.pattern)[0]
    assert_same_bits(
        forward(query, key.expand(1, 4, -1, -1), value.expand(1, 4, -1, -1), shape.pattern)[0], want
    )
    many = forward(
        query.expand(3, -1, -1, -1), key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1), shape.pattern
    )
    for row in many[0]:
        assert_same_bits(row[None], want)


def test_negative_strides(cpu_level: str, rng: np.random.Generator) -> None:
    query, key, value = (rng.standard_normal((2, heads, 65, 16)).astype(np.float32) for heads in (4, 2, 2))
    pattern = SFPattern(16)
    flips = (slice(None, None, -1), slice(None, None, -1), slice(None, None, -1))
    copies = [np.ascontiguousarray(x[flips]) for x in (query, key, value)]
    want = sinklora.sf_attention(*copies, pattern)
    got = sinklora.sf_attention(query[flips], key[flips], value[flips], pattern)
    np.testing.assert_array_equal(got, want)


# ---- the poison oracle ----


def visible_rows(shape: Case, key_head: int, token: int) -> Tensor:
    """Bool (H, N): may row i of head h see this token of this key/value head?"""
    mask = torch.from_numpy(shape.pattern.mask(shape.heads, shape.tokens))
    reads = torch.arange(shape.heads) // (shape.heads // shape.kv_heads) == key_head
    return mask[:, :, token] & reads[:, None]


def poison_values(dtype: torch.dtype) -> tuple[float, ...]:
    return (1e4, 3e38) if dtype == torch.float32 else (1e4,)


@pytest.mark.parametrize("shape", POISONED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_leaks_from_what_a_row_may_not_see(
    shape: Case, dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, value, _ = shape.inputs(dtype, torch_rng)
    clean, clean_lse = forward(query, key, value, shape.pattern)
    group = shape.pattern.group_size
    tokens = {
        0,
        1,
        group // 2,
        group - 1,
        group,
        63,
        64,
        shape.tokens // 2,
        shape.tokens - 2,
        shape.tokens - 1,
    }
    for token in sorted(t for t in tokens if t < shape.tokens):
        head = token % shape.kv_heads
        blind = ~visible_rows(shape, head, token)
        for poison in poison_values(dtype):
            for which in (key, value):
                saved = which[:, head, token].clone()
                which[:, head, token] = poison
                output, lse = forward(query, key, value, shape.pattern)
                which[:, head, token] = saved
                where = f"token {token} of head {head} = {poison:g}: "
                assert_same_bits(output[:, blind], clean[:, blind], where + "output")
                assert_same_bits(lse[:, blind], clean_lse[:, blind], where + "lse")
                if which is value:
                    assert (output[:, ~blind] != clean[:, ~blind]).any(), (
                        where + "reached no row that sees it"
                    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_every_row_that_may_see_it(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    shape = case((1, 4, 2, 300, 16), 64)
    for token in (0, 70, 150, 299):
        for place in range(3):
            query, key, value, _ = (x.clone() for x in shape.inputs(dtype, torch_rng))
            (query, key, value)[place][:, 0, token, 3] = float("nan")
            output, _ = forward(query, key, value, shape.pattern)
            if place == 0:
                sees = torch.zeros(shape.heads, shape.tokens, dtype=torch.bool)
                sees[0, token] = True
            else:
                sees = visible_rows(shape, 0, token)
            broken = output[0].isnan().any(-1)
            assert broken[sees].all(), f"token {token}, argument {place}: a row that sees NaN came out finite"
            # Rows of the same tile may be hit too (0 * NaN); other groups and other heads may not.
            group = torch.arange(shape.tokens) // shape.pattern.group_size
            far = (group - token // shape.pattern.group_size).abs() > 1
            assert not (broken & far & ~sees).any(), f"token {token}, argument {place}: NaN in a far group"


def test_large_scores_do_not_overflow(cpu_level: str) -> None:
    query = torch.full((1, 2, 65, 16), 100.0)
    key = torch.full((1, 2, 65, 16), 100.0) * torch.linspace(-1, 1, 65)[:, None]
    value = torch.ones(1, 2, 65, 16)
    output, lse = forward(query, key, value, SFPattern(16))
    assert_close(output, torch.ones_like(output), 1e-5)
    assert lse.isfinite().all()
    output, lse = forward(query, -key.abs() - 100, value, SFPattern(16))
    assert_close(output, torch.ones_like(output), 1e-5)
    assert lse.isfinite().all()


@pytest.mark.parametrize("scale", [3e38, -3e38])
def test_the_largest_scales_leave_zero_scores_zero(cpu_level: str, scale: float) -> None:
    query = torch.zeros(1, 2, 5, 8, requires_grad=True)
    key, value = torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8)
    output, lse = forward(query, key, value, SFPattern(8), scale=scale)
    assert_close(output, torch.ones_like(output), 1e-5)
    assert_close(lse, torch.arange(1, 6).log().expand(1, 2, 5), 1e-5)
    output.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [2**40, 2**57])
def test_an_empty_batch_needs_no_memory(tokens: int) -> None:
    query = torch.empty(0, 2, tokens, 8, requires_grad=True)
    output, lse = forward(query, query, query, SFPattern(2**60, 2**60, causal=False))
    assert output.shape == query.shape and lse.shape == query.shape[:3]
    output.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape


@pytest.mark.parametrize("size", [1e8, 1e12])
def test_huge_scores_choose_one_key(cpu_level: str, size: float) -> None:
    """The softmax of scores far apart is 1 at the largest, exactly, and so is its gradient."""
    rng = torch.Generator().manual_seed(0)  # other numbers may hold scores too close for float32 to order
    query, key, value = (torch.randn(1, 1, 40, 64, generator=rng) for _ in range(3))
    query, key = query * size**0.5, key * size**0.5
    value.requires_grad_()
    output, _ = forward(query, key, value, SFPattern(64, 0, 0.0))
    wanted = exact(query, key, value, SFPattern(64, 0, 0.0), torch.ones_like(query)).output
    assert_close(output.detach(), wanted, 1e-5)
    (grad,) = torch.autograd.grad(output.sum(), value)
    # Every query gives all its weight, so the weights of all keys sum to the number of queries.
    assert_close(grad.sum(2), torch.full((1, 1, 64), 40.0), 1e-4)
