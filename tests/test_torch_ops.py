"""The registered operators under torch's machinery: opcheck, compile, checkpointing, autograd, dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_close, assert_same_bits
from attention_support import PATTERN, gradients, make
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sinklora import SFPattern, sf_attention, torch_ops
from sinklora.settings import settings_text


def op_args(tensors: list[Tensor], **given: Tensor) -> tuple[Any, ...]:
    sequences = [given.get(name) for name in ("cu_seqlens", "padding_mask", "position_ids")]
    return (*tensors, settings_text(*PATTERN.settings, 0.25), *sequences)


def test_opcheck(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, batch=1)
    for given in (
        {},
        {"cu_seqlens": torch.tensor([0, 7, 19], dtype=torch.int32)},
        {"padding_mask": torch.rand(1, 19, generator=torch_rng) > 0.3},
        {"position_ids": torch.arange(19)[None] % 8},
    ):
        args = op_args(tensors, **given)
        torch.library.opcheck(torch.ops.sinklora.sf_attention.default, args)
        output, lse = torch.ops.sinklora.sf_attention(*args)
        back = (torch.ones_like(output), *tensors, output, lse, *args[3:])
        torch.library.opcheck(torch.ops.sinklora.sf_attention_backward.default, back)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("same", [False, True], ids=["three tensors", "one tensor"])
def test_compile(torch_rng: torch.Generator, same: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    tensors = make(torch_rng, grad=True)
    if same:
        tensors = [tensors[0]] * 3
    leaves = tensors[:1] if same else tensors
    positions = torch.arange(19)[None] % 8

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A pattern may be made where torch.compile traces, from symbols too.
        traced = SFPattern.from_dict({"group_size": query.shape[2] // 4, "num_sink_tokens": 2})
        packed, _ = torch_ops.sf_attention(query, key, value, PATTERN, position_ids=positions)
        return packed + sf_attention(query, key, value, traced, scale=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, output = function(*tensors), compiled(*tensors)
    assert_same_bits(output, expected)
    assert output.stride() == expected.stride()
    for a, b in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        assert_same_bits(a, b)
    with torch.no_grad():
        assert_same_bits(compiled(*tensors), expected)


@pytest.mark.slow
def test_compile_with_inductor(torch_rng: torch.Generator) -> None:
    torch._dynamo.reset()
    tensors = make(torch_rng, grad=True)
    function = lambda q, k, v: (sf_attention(q * 2, k, v, PATTERN) + 1).relu()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    expected, output = function(*tensors), compiled(*tensors)
    assert_close(output, expected, 1e-6)
    for a, b in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(torch_rng: torch.Generator, reentrant: bool) -> None:
    tensors = make(torch_rng, grad=True)
    function = lambda *x: sf_attention(*x, PATTERN)  # noqa: E731
    expected = gradients(function(*tensors), tensors)
    output = checkpoint(function, *tensors, use_reentrant=reentrant)
    grad = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    output.backward(grad)
    for tensor, want in zip(tensors, expected, strict=True):
        assert_same_bits(tensor.grad, want)


def test_everything_saved_goes_through_the_hooks(torch_rng: torch.Generator) -> None:
    """Offloading and checkpointing replace saved tensors; what is kept aside would escape them."""
    tensors = make(torch_rng, grad=True)
    expected = gradients(sf_attention(*tensors, PATTERN), tensors)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    mask = torch.ones(2, 19, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = sf_attention(*tensors, PATTERN, padding_mask=mask)
    assert len(packed) == 6  # query, key, value, output, lse, padding_mask
    for a, b in zip(gradients(output, tensors), expected, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("needs", [[0], [1], [2], [0, 2]])
def test_gradients_of_some_inputs(torch_rng: torch.Generator, needs: list[int]) -> None:
    tensors = make(torch_rng, grad=True)
    expected = gradients(sf_attention(*tensors, PATTERN), tensors)
    mixed = [x if i in needs else x.detach() for i, x in enumerate(tensors)]
    output = sf_attention(*mixed, PATTERN)
    for i, grad in zip(needs, gradients(output, [mixed[i] for i in needs]), strict=True):
        assert_same_bits(grad, expected[i])


def test_expanded_gradients_are_accepted(torch_rng: torch.Generator) -> None:
    """sum() sends back one number with strides of zero."""
    tensors = make(torch_rng, grad=True)
    output = sf_attention(*tensors, PATTERN)
    expected = torch.autograd.grad(output, tensors, torch.ones_like(output), retain_graph=True)
    for a, b in zip(torch.autograd.grad(output.sum(), tensors), expected, strict=True):
        assert_same_bits(a, b)


def test_differentiating_twice_raises(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, grad=True)
    for weight in (torch.ones(()), torch.ones((), requires_grad=True)):
        output = sf_attention(query, key, value, PATTERN)
        (grad,) = torch.autograd.grad((output * weight).sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (grad.sum() + query.sum()).backward()


def test_forward_mode_raises(torch_rng: torch.Generator) -> None:
    """Forward-mode differentiation has no formula here: zeros instead of tangents would be a wrong result."""
    query, key, value = make(torch_rng)
    with forward_ad.dual_level():
        assert_same_bits(sf_attention(query, key, value, PATTERN), sf_attention(query, key, value, PATTERN))
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(RuntimeError, match="forward"):
            sf_attention(dual, key, value, PATTERN)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda x: sf_attention(x, key, value, PATTERN), (query,), (query,))


def test_lse_is_not_differentiable(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, grad=True)
    _, lse = sf_attention(*tensors, PATTERN, return_lse=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()


def test_no_graph_without_need(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, grad=True)
    with torch.no_grad():
        assert not sf_attention(*tensors, PATTERN).requires_grad
    with torch.inference_mode():
        assert sf_attention(*tensors, PATTERN).is_inference()
    assert sf_attention(*(x.detach() for x in tensors), PATTERN).grad_fn is None


def test_dispatch_keys_are_resolved(torch_rng: torch.Generator) -> None:
    """Negative views, zero tensors and vmap levels hold no plain memory: the dispatcher makes them right."""
    query, key, value = make(torch_rng)
    expected = sf_attention(query, key, value, PATTERN)
    assert_same_bits(sf_attention(torch._neg_view(-query), key, value, PATTERN), expected)
    zero = torch._efficientzerotensor(query.shape)
    assert_same_bits(sf_attention(zero, key, value, PATTERN), sf_attention(query * 0, key, value, PATTERN))
    stacked = [torch.stack([x, x + 1]) for x in (query, key, value)]
    mapped = torch.vmap(lambda *x: sf_attention(*x, PATTERN))(*stacked)
    assert_same_bits(mapped[1], sf_attention(*(x[1] for x in stacked), PATTERN))


def test_meta_tensors_give_shapes(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng)
    output, lse = sf_attention(*(x.to("meta") for x in tensors), PATTERN, return_lse=True)
    expected = sf_attention(*tensors, PATTERN)
    assert output.is_meta
    assert (output.shape, output.stride(), output.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
    assert lse.shape == expected.shape[:3]


def test_subclasses_and_parameters(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng)
    parameters = [torch.nn.Parameter(x) for x in tensors]
    output = sf_attention(*parameters, PATTERN)
    assert_same_bits(output, sf_attention(*tensors, PATTERN))
    output.sum().backward()
    assert all(x.grad is not None for x in parameters)


@pytest.mark.parametrize("text", ["", "group_size=4", "group_size=x shift=0 num_sink_tokens=0"])
def test_refuses_other_settings(torch_rng: torch.Generator, text: str) -> None:
    with pytest.raises(ValueError, match="settings: expected a text of settings_text, got"):
        torch.ops.sinklora.sf_attention(*make(torch_rng), text)
