"""Small attention inputs and their gradients, for the tests of the Python side."""

from __future__ import annotations

import torch
from torch import Tensor

from sinklora import SFPattern

PATTERN = SFPattern(5, num_sink_tokens=2)


def make(
    rng: torch.Generator,
    *,
    batch: int = 2,
    tokens: int = 19,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> list[Tensor]:
    shapes = [(batch, heads, tokens, 16) for heads in (4, 2, 2)]
    return [torch.randn(s, generator=rng).to(dtype).requires_grad_(grad) for s in shapes]


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    grad = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    return torch.autograd.grad(output, tensors, grad)


def by_rows(tensor: Tensor) -> bool:
    """Does the (B, H, N, D) tensor lie in memory as (B, N, H, D)?"""
    return tensor.transpose(1, 2).is_contiguous()
