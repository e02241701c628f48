"""Output, lse and gradients against float64 autograd of the reference, and what they may not depend on."""

from __future__ import annotations

import zlib

import pytest
import torch
from accuracy import NAMES, Yardstick, assert_close, assert_same_bits, assert_within_rule, exact, kernel
from cases import DTYPES, SHAPES, Case, case, each_level
from torch import Tensor

from sinklora import SFPattern, torch_ops


def check_rule(shape: Case, dtype: torch.dtype, generator: torch.Generator) -> None:
    query, key, value, grad = shape.inputs(dtype, generator)
    want = exact(query, key, value, shape.pattern, grad, **shape.options)
    yardstick = Yardstick(query, key, value, shape.pattern, grad, **shape.options)
    for level in each_level():
        actual = kernel(query, key, value, shape.pattern, grad, **shape.options)
        assert_within_rule(actual, want, yardstick, where=f"{level} ")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_rule(shape: Case, dtype: torch.dtype) -> None:
    # The same draws on every machine; the slow sweep draws anew.
    check_rule(shape, dtype, torch.Generator().manual_seed(zlib.crc32(str(shape).encode())))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (8, 16, 40, 64, 72, 80, 96, 128, 136, 256))
@pytest.mark.parametrize("tokens", (1, 7, 63, 65, 257))
def test_accuracy_rule_everywhere(
    tokens: int, dim: int, dtype: torch.dtype, torch_rng: torch.Generator
) -> None:
    for group_size in (1, 13, 64, 100, 1000):
        for sinks in (0, 4, 65, 100):
            for causal in (True, False):
                shape = case(
                    (4 if tokens < 100 else 1, 4, 2, tokens, dim), group_size, sinks, 0.5, causal=causal
                )
                check_rule(shape, dtype, torch_rng)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", (True, False))
def test_accuracy_rule_on_long_rows(causal: bool, dtype: torch.dtype, torch_rng: torch.Generator) -> None:
    for group_size, sinks in ((512, 4), (1500, 400), (4000, 1)):
        check_rule(case((1, 4, 2, 1601, 64), group_size, sinks, causal=causal), dtype, torch_rng)


def test_gradients_of_strided_views(cpu_level: str, torch_rng: torch.Generator) -> None:
    """Gradients of what a transformer passes: views of one projection, and a transposed, expanded grad."""
    packed = torch.randn(2, 65, 8, 16, generator=torch_rng)
    views = [x.transpose(1, 2) for x in (packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:])]
    grad = torch.randn(1, 65, 4, 16, generator=torch_rng).transpose(1, 2).expand(2, -1, -1, -1)
    got = kernel(*views, SFPattern(16), grad)
    want = kernel(*(x.contiguous() for x in views), SFPattern(16), grad.contiguous())
    for name in (*NAMES, "lse"):
        assert_same_bits(getattr(got, name), getattr(want, name), name)


@pytest.mark.parametrize("kind", ("last dimension strided", "expanded scalar"))
def test_grad_output_of_any_layout(kind: str, torch_rng: torch.Generator) -> None:
    shape = case((1, 2, 2, 33, 16), 8, fraction=0.5)
    query, key, value, grad = shape.inputs(torch.float32, torch_rng)
    odd = torch.ones(()).expand(grad.shape) if kind == "expanded scalar" else grad.mT.contiguous().mT
    got = kernel(query, key, value, shape.pattern, odd)
    want = kernel(query, key, value, shape.pattern, odd.contiguous())
    for name in NAMES:
        assert_same_bits(getattr(got, name), getattr(want, name), name)


def test_only_the_gradients_asked_for(torch_rng: torch.Generator) -> None:
    shape = case((1, 2, 2, 33, 16), 8, fraction=0.5)
    query, key, value, grad = shape.inputs(torch.float32, torch_rng)
    want = kernel(query, key, value, shape.pattern, grad)
    value = value.clone().requires_grad_()
    output, lse = torch_ops.sf_attention(query, key, value, shape.pattern)
    assert not lse.requires_grad
    assert_same_bits(torch.autograd.grad(output, value, grad)[0], want.grad_value)


def test_finite_differences(torch_rng: torch.Generator) -> None:
    """The forward's directional derivative by float32 differences at a step of 1e-2: needs no reference."""
    shape = case((1, 4, 2, 40, 16), 16)
    query, key, value, grad = shape.inputs(torch.float32, torch_rng)
    result = kernel(query, key, value, shape.pattern, grad)
    for which, name in enumerate(NAMES[1:]):
        point = [query, key, value]
        direction = torch.randn(point[which].shape, generator=torch_rng)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * 1e-2 * direction if i == which else x for i, x in enumerate(point)]
            output = torch_ops.sf_attention(*moved, shape.pattern)[0]
            ends.append((output.double() * grad.double()).sum())
        slope = (ends[0] - ends[1]) / 2e-2
        assert_close(slope, (getattr(result, name).double() * direction.double()).sum(), 0.05, 0.01, name)


# ---- the poison oracle for gradients ----

POISONED = (
    case((1, 4, 2, 100, 16), 32, sinks=2),
    case((1, 2, 2, 65, 24), 16, sinks=0, fraction=0.5),
    case((1, 2, 1, 100, 16), 20, sinks=0, fraction=0.5, causal=False),
    case((1, 2, 1, 130, 8), 120, sinks=1, fraction=0.5),
)


def poisoned_results(shape: Case, dtype: torch.dtype, generator: torch.Generator, tokens: list[int]):  # type: ignore[no-untyped-def]
    """(place, head, token, clean result, poisoned result) with one row of one argument overwritten."""
    inputs = shape.inputs(dtype, generator)
    clean = kernel(*inputs[:3], shape.pattern, inputs.grad)
    for token in tokens:
        for place, name in enumerate(inputs._fields):
            for poison in (1e4, 3e38) if dtype == torch.float32 else (1e4,):
                changed = [x.clone() for x in inputs]
                head = token % changed[place].shape[1]
                changed[place][:, head, token] = poison
                yield name, head, token, clean, kernel(*changed[:3], shape.pattern, changed[3])


def affected(shape: Case, name: str, head: int, token: int) -> tuple[Tensor, Tensor]:
    """Bool (H, N) query rows whose gradients may change, and (Hkv, N) key rows that those see."""
    mask = torch.from_numpy(shape.pattern.mask(shape.heads, shape.tokens))
    group = shape.heads // shape.kv_heads
    queries = torch.zeros(shape.heads, shape.tokens, dtype=torch.bool)
    if name in ("query", "grad"):
        queries[head, token] = True
    else:
        heads = slice(head * group, (head + 1) * group)
        queries[heads] = mask[heads, :, token]
    seen = (mask & queries[:, :, None]).any(1)
    return queries, seen.view(shape.kv_heads, group, shape.tokens).any(1)


@pytest.mark.parametrize("shape", POISONED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_of_a_gradient_leaks(
    shape: Case, dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    tokens = [0, shape.pattern.group_size - 1, shape.pattern.group_size + 1, shape.tokens - 1]
    for name, head, token, clean, result in poisoned_results(shape, dtype, torch_rng, tokens):
        queries, keys = affected(shape, name, head, token)
        where = f"{name} of head {head}, token {token}: "
        assert_same_bits(result.output[0][~queries], clean.output[0][~queries], where + "output")
        assert_same_bits(result.grad_query[0][~queries], clean.grad_query[0][~queries], where + "grad_query")
        assert_same_bits(result.grad_key[0][~keys], clean.grad_key[0][~keys], where + "grad_key")
        assert_same_bits(result.grad_value[0][~keys], clean.grad_value[0][~keys], where + "grad_value")
