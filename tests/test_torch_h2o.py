"""The registered operators of the cache under torch's machinery, and full causal attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_close, assert_same_bits
from simulation_support import assert_unchanged, cache, copies, make
from torch import Tensor
from torch.autograd import forward_ad

from sinklora import h2o_ops, reference, torch_h2o

OPS = torch.ops.sinklora


# ---- torch's machinery ----


def test_opcheck(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, 19, batch=2)
    mask = torch.rand(2, 19, generator=torch_rng) > 0.3
    for queries in (query, query[:, :, -3:]):
        for padding in (None, mask):
            torch.library.opcheck(OPS.causal_attention.default, (queries, key, value, padding, 0.25))
            _, lse = OPS.causal_attention(queries, key, value, padding, 0.25)
            for given in (None, lse):
                args = (queries, key, given, padding, 4, True, 0.25)
                torch.library.opcheck(OPS.attention_scores.default, args)
    step = make(torch_rng, 1, batch=2)
    new_mask = torch.tensor([[True], [False]])
    for kept in (None, new_mask):
        args = (*step, *cache(torch_rng).values(), kept, 1, False, 0.25)
        torch.library.opcheck(OPS.h2o_decode.default, args)
    full = cache(torch_rng, used=8, budget=5)
    full.pop("free_slot")
    torch.library.opcheck(OPS.h2o_select.default, (*full.values(), 1, 5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(torch_rng: torch.Generator, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        output, lse = torch_h2o.causal_attention(query * 2, key, value)
        last, _ = torch_h2o.causal_attention(query[:, :, -1:], key, value, scale=0.5)
        return output + last, torch_h2o.attention_scores(query * 2, key, lse)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors = make(torch_rng, 19)
    for actual, expected in zip(compiled(*tensors), function(*tensors), strict=True):
        assert_same_bits(actual, expected)
        assert actual.stride() == expected.stride()


def test_compile_a_step(torch_rng: torch.Generator) -> None:
    """A compiled step writes the caller's buffers."""
    torch._dynamo.reset()
    function = lambda *x: torch_h2o.h2o_decode(*x, num_sinks=1) + 1  # noqa: E731
    step, buffers = make(torch_rng, 1, batch=2), cache(torch_rng)
    expected_buffers = copies(buffers)
    expected = function(*step, *expected_buffers.values())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*step, *buffers.values()), expected)
    assert_unchanged(buffers, expected_buffers)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_raises(torch_rng: torch.Generator, compiled: bool) -> None:
    """Gradients that are not computed must not come out as none at all."""
    torch._dynamo.reset()
    query, key, value = (x.requires_grad_() for x in make(torch_rng, 19))
    attend = lambda q, k, v: torch_h2o.causal_attention(q * 1, k, v)[0] * 2  # noqa: E731
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = attend(query, key, value)
        assert not expected.requires_grad
    for tensors in ((query, key, value), (query.detach(), key, value.detach())):
        output = attend(*tensors)
        assert_same_bits(output, expected)
        with pytest.raises(RuntimeError, match="computes no gradients, got a backward through it"):
            output.sum().backward()
    output, lse = torch_h2o.causal_attention(query, key, value)
    assert output.requires_grad and not lse.requires_grad
    step = [x.requires_grad_() for x in make(torch_rng, 1, batch=2)]
    output = torch_h2o.h2o_decode(*step, **cache(torch_rng))
    with pytest.raises(RuntimeError, match="computes no gradients"):
        output.sum().backward()
    assert not any(x.requires_grad for x in torch_h2o.h2o_select(**selectable(torch_rng, key)))


def selectable(rng: torch.Generator, key: Tensor) -> dict[str, Any]:
    full = cache(rng, used=8, budget=5, batch=1)
    full.pop("free_slot")
    full["key"] = full["key"] + key[:, :, :8]
    return {**full, "num_sinks": 1, "capacity": 6}


def test_forward_mode_raises(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, 19)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(RuntimeError, match="forward"):
            torch_h2o.causal_attention(dual, key, value)


def test_meta_tensors_give_shapes(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, 19)
    output, lse = torch_h2o.causal_attention(*(x.to("meta") for x in tensors))
    expected, expected_lse = torch_h2o.causal_attention(*tensors)
    assert (output.shape, output.stride(), output.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
    assert lse.shape == expected_lse.shape
    step, buffers = make(torch_rng, 1, batch=2), cache(torch_rng)
    output = torch_h2o.h2o_decode(
        *(x.to("meta") for x in step), **{name: x.to("meta") for name, x in buffers.items()}
    )
    assert output.shape == (2, 4, 1, 16)


# ---- attention ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_queries", [0, 1, 2, 8, 9, 30])
def test_causal_attention(
    torch_rng: torch.Generator, cpu_level: str, num_queries: int, dtype: torch.dtype
) -> None:
    query, key, value = make(torch_rng, 30, batch=2, dtype=dtype)
    query = query[:, :, 30 - num_queries :]
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    mask = torch.rand(2, 30, generator=torch_rng) > 0.3
    for padding in (None, mask):
        output, lse = torch_h2o.causal_attention(query, key, value, padding_mask=padding)
        expected, expected_lse = reference.causal_attention(query, key, value, padding_mask=padding)
        assert output.transpose(1, 2).is_contiguous()
        assert_close(output, expected, atol)
        assert_close(lse, expected_lse, 2e-5, 2e-5)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "decode"),
    [(1, 1, True), (1, 50, True), (2, 2, False), (2, 3, True), (8, 8, False), (8, 9, True), (9, 10, False)],
)
def test_shapes_choose_the_kernel(num_queries: int, num_keys: int, decode: bool) -> None:
    assert h2o_ops.is_decode(num_queries, num_keys) is decode
    assert not h2o_ops.is_decode(0, 0)


@pytest.mark.parametrize("num_queries", [1, 4, 20])
def test_bits_depend_on_the_live_keys_alone(torch_rng: torch.Generator, num_queries: int) -> None:
    """Not on strides, on padding before or behind, on slots that others use, nor on the batch."""
    query, key, value = make(torch_rng, 40)
    query = query[:, :, -num_queries:]
    expected = torch_h2o.causal_attention(query, key, value)
    buffers = [torch.full((3, 2, 64, 16), float("nan")) for _ in range(2)]
    for buffer, tensor in zip(buffers, (key, value), strict=True):
        buffer[1, :, 24:] = tensor[0]
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[1, 24:] = True
    wide = torch.full((3, 4, num_queries, 32), float("nan"))[..., :16]
    wide[1] = query[0]
    output, lse = torch_h2o.causal_attention(wide, *buffers, padding_mask=mask)
    assert_same_bits(output[1:2], expected[0])
    assert_same_bits(lse[1:2], expected[1])


def test_only_a_last_dimension_that_is_not_contiguous_is_copied(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, 19)
    wide = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    for last in (19, 3):
        expected = torch_h2o.causal_attention(tensors[0][:, :, -last:], *tensors[1:])[0]
        output = torch_h2o.causal_attention(wide[0][:, :, -last:], *wide[1:])[0]
        assert_same_bits(output, expected)
    step = make(torch_rng, 1, batch=2)
    buffers = cache(torch_rng)
    expected_buffers = copies(buffers)
    expected = torch_h2o.h2o_decode(*step, **expected_buffers)
    spread = [torch.stack([x, x], -1)[..., 0] for x in step]
    assert spread[0].stride(-1) == 2
    assert_same_bits(torch_h2o.h2o_decode(*spread, **buffers), expected)
    assert_unchanged(buffers, expected_buffers)
    # What is written cannot be a copy.
    buffers["key"] = buffers["key"].transpose(2, 3).contiguous().transpose(2, 3)
    before = copies(buffers)
    with pytest.raises(ValueError, match="key: "):
        torch_h2o.h2o_decode(*step, **buffers)
    assert_unchanged(buffers, before)


def test_refuses_attention(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, 9)
    with pytest.raises(TypeError, match="key: expected a torch tensor, got <class 'numpy"):
        torch_h2o.causal_attention(query, key.numpy(), value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key: expected a torch tensor, got <class 'NoneType'>"):
        torch_h2o.causal_attention(query, None, value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="padding_mask: expected a torch tensor, got <class 'list'>"):
        torch_h2o.causal_attention(query, key, value, padding_mask=[True] * 9)  # type: ignore[arg-type]
    for n in (9, 3):
        with pytest.raises(ValueError, match="value: "):
            torch_h2o.causal_attention(query[:, :, -n:], key, value[:, :, :8])
        with pytest.raises(TypeError, match="value: "):
            torch_h2o.causal_attention(query[:, :, -n:], key, value.half())
        with pytest.raises(ValueError, match="padding_mask: "):
            torch_h2o.causal_attention(query[:, :, -n:], key, value, padding_mask=torch.ones(1, 8).bool())
    with pytest.raises(ValueError, match="key: "):
        torch_h2o.causal_attention(query, key[:, :, :8], value[:, :, :8])
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        torch_h2o.causal_attention(query[0], key, value)
    with pytest.raises(ValueError, match="expected query's device meta, got cpu"):
        torch_h2o.causal_attention(query.to("meta"), key, value)
