"""Memory as the kernels take it, from torch: rows, outputs, scratch. Imports torch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself, or a copy where its last dimension is not contiguous: the only copy there is."""
    if tensor is None or not tensor.dim() or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def empty_rows(like: Tensor) -> Tensor:
    """(B, H, N, D) that lies in memory as (B, N, H, D): the transpose after attention then copies nothing."""
    batch, heads, tokens, dim = like.shape
    strides = (tokens * heads * dim, dim, heads * dim, 1)
    return torch.empty_strided((batch, heads, tokens, dim), strides, dtype=like.dtype, device=like.device)


def allocate(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def allocator(like: Tensor) -> Callable[[int], Tensor]:
    """What gives a kernel its scratch memory: on the tensor's device, of its current stream's blocks."""
    if like.is_cpu:
        return allocate
    return functools.partial(torch.empty, dtype=torch.uint8, device=like.device)
