"""The operator for torch, NumPy and DLPack arrays: values, layouts, strides, kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, assert_close, assert_same_bits
from attention_support import PATTERN, by_rows, gradients, make
from producers import Producer

from sinklora import SFPattern, sf_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_accuracy(torch_rng: torch.Generator, cpu_level: str, dtype: torch.dtype, causal: bool) -> None:
    query, key, value = make(torch_rng, batch=1, dtype=dtype)
    grad = torch.randn(query.shape, generator=torch_rng).to(dtype)
    pattern = SFPattern(5, 2, 0.5, 2, causal)
    options: list[dict[str, Any]] = [
        {},
        {"scale": 0.7},
        {"cu_seqlens": torch.tensor([0, 3, 3, 19], dtype=torch.int32)},
        {"padding_mask": torch.rand(1, 19, generator=torch_rng) > 0.4},
        {"position_ids": torch.tensor([[3, 4, 5, *range(9), *range(7)]])},
    ]
    for option in options:
        assert_accurate(query, key, value, pattern, grad, **option)


def test_the_output_and_gradients_lie_by_rows(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, grad=True)
    output, lse = sf_attention(*tensors, PATTERN, return_lse=True)
    assert by_rows(output)
    assert all(by_rows(grad) for grad in gradients(output, tensors))
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 4, 19)
    assert not lse.requires_grad


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (1, 0), (2, 1)])
def test_empty_and_single(torch_rng: torch.Generator, batch: int, tokens: int) -> None:
    tensors = make(torch_rng, batch=batch, tokens=tokens, grad=True)
    output = sf_attention(*tensors, PATTERN)
    assert output.shape == tensors[0].shape
    for grad, tensor in zip(gradients(output, tensors), tensors, strict=True):
        assert grad.shape == tensor.shape
    if tokens == 1:
        assert_close(output, tensors[2].repeat_interleave(2, 1), 0)


def test_strided_views_are_read_in_place(torch_rng: torch.Generator) -> None:
    """As a fused projection has them: rows of 3 * H * D, keys of every second head, a time-reversed value."""
    fused = torch.randn(2, 19, 3, 4, 16, generator=torch_rng)
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(2))
    views = [query, key[:, ::2], value[:, 1::2]]
    dense = [x.contiguous() for x in views]
    for tensors in (views, dense):
        for tensor in tensors:
            tensor.requires_grad_()
    outputs = [sf_attention(*tensors, PATTERN) for tensors in (views, dense)]
    assert_same_bits(*outputs)
    for a, b in zip(gradients(outputs[0], views), gradients(outputs[1], dense), strict=True):
        assert_same_bits(a, b)


def test_a_last_dimension_that_is_not_contiguous_is_copied(torch_rng: torch.Generator) -> None:
    dense = make(torch_rng)
    wide = [x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in dense]
    assert wide[0].stride(-1) != 1
    expected = sf_attention(*dense, PATTERN)
    output = sf_attention(*wide, PATTERN)
    assert_same_bits(output, expected)
    for grad, tensor in zip(gradients(output, wide), wide, strict=True):
        assert grad.shape == tensor.shape
    numpy = sf_attention(*(x.detach().numpy() for x in wide), PATTERN)
    assert_same_bits(torch.from_numpy(numpy), expected)
    seqlens = torch.tensor([[0, 1], [7, 1], [19, 1]], dtype=torch.int32)[:, 0]
    first = [x[:1] for x in dense]
    assert_same_bits(
        sf_attention(*first, PATTERN, cu_seqlens=seqlens),
        sf_attention(*first, PATTERN, cu_seqlens=seqlens.contiguous()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numpy_and_dlpack_equal_torch(torch_rng: torch.Generator, dtype: torch.dtype) -> None:
    tensors = make(torch_rng, dtype=dtype)
    mask = torch.rand(2, 19, generator=torch_rng) > 0.3
    expected = sf_attention(*tensors, PATTERN, scale=0.5, padding_mask=mask, return_lse=True)
    arrays = [x.numpy() for x in tensors]
    for given in (arrays, [Producer(x) for x in arrays], [Producer(x, legacy=True) for x in arrays]):
        output, lse = sf_attention(*given, PATTERN, scale=0.5, padding_mask=mask.numpy(), return_lse=True)
        assert isinstance(output, np.ndarray)
        assert output.dtype == arrays[0].dtype
        assert output.transpose(0, 2, 1, 3).flags.c_contiguous
        assert_same_bits(torch.from_numpy(output), expected[0])
        assert_same_bits(torch.from_numpy(lse), expected[1])
    assert hasattr(output, "__dlpack__")


def test_numpy_reads_views_and_read_only_arrays(torch_rng: torch.Generator) -> None:
    arrays = [x.numpy() for x in make(torch_rng)]
    expected = sf_attention(*arrays, PATTERN)
    for array in arrays:
        array.flags.writeable = False
    assert (sf_attention(*arrays, PATTERN) == expected).all()
    reversed_twice = [np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1] for x in arrays]
    assert (sf_attention(*reversed_twice, PATTERN) == expected).all()


def test_bfloat16_producers_are_told_where_to_go(torch_rng: torch.Generator) -> None:
    tensor = make(torch_rng, dtype=torch.bfloat16)[0]

    class Wrapped:
        dtype = "bfloat16"

        def __dlpack_device__(self) -> Any:
            return tensor.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> Any:
            return tensor.__dlpack__(**options)

    with pytest.raises(NotImplementedError, match="query: bfloat16 is computed on torch tensors only"):
        sf_attention(Wrapped(), Wrapped(), Wrapped(), PATTERN)
