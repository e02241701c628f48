"""SF-Attn for torch tensors: the registered operators and their gradient. Imports torch.

Every call goes through the operators: the dispatcher is what makes negative bits, zero tensors, vmap levels and
modes right, before the kernels see plain memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, threads
from .pattern import SFPattern

_SEQUENCES = "Tensor? cu_seqlens, Tensor? padding_mask, Tensor? position_ids"
_SETTINGS = "int group_size, int shift, int num_sink_tokens, float shifted_fraction, bool causal, float scale"

torch.library.define(
    "sinklora::sf_attention",
    f"(Tensor query, Tensor key, Tensor value, {_SEQUENCES}, {_SETTINGS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "sinklora::sf_attention_backward",
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    f"{_SEQUENCES}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)


def _num_threads() -> int:
    return threads._chosen or torch.get_num_threads()


def _allocate(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last dimension is not contiguous: the only copy there is."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) <= 1 else tensor.contiguous()


def _empty_rows(name: str, like: Tensor) -> Tensor:
    """(B, H, N, D), uninitialised, lying in memory as (B, N, H, D): the transpose after attention copies nothing."""
    if like.dim() != 4:
        shape = tuple(like.shape)
        raise ValueError(f"{name}: expected 4 dimensions (batch, heads, tokens, head_dim), got shape {shape}")
    batch, heads, tokens, dim = like.shape
    return torch.empty_strided(
        (batch, heads, tokens, dim),
        (tokens * heads * dim, dim, heads * dim, 1),
        dtype=like.dtype,
        device=like.device,
    )


def _forward_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    position_ids: Tensor | None,
    group_size: int,
    shift: int,
    num_sink_tokens: int,
    shifted_fraction: float,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    output = _empty_rows("query", query)
    lse = torch.empty(output.shape[:3], dtype=torch.float32)
    _C.attention_forward(
        _rows(query),
        _rows(key),
        _rows(value),
        output,
        lse,
        cu_seqlens,
        padding_mask,
        position_ids,
        group_size,
        shift,
        num_sink_tokens,
        shifted_fraction,
        causal,
        scale,
        threads._chosen or torch.get_num_threads(),
        _allocate,
    )
    return output, lse


def _backward_cpu(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    position_ids: Tensor | None,
    group_size: int,
    shift: int,
    num_sink_tokens: int,
    shifted_fraction: float,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query = _empty_rows("query", query)
    grad_key = _empty_rows("key", key)
    grad_value = _empty_rows("value", value)
    _C.attention_backward(
        _rows(grad_output),
        _rows(query),
        _rows(key),
        _rows(value),
        _rows(output),
        lse.contiguous(),
        grad_query,
        grad_key,
        grad_value,
        cu_seqlens,
        padding_mask,
        position_ids,
        group_size,
        shift,
        num_sink_tokens,
        shifted_fraction,
        causal,
        scale,
        threads._chosen or torch.get_num_threads(),
        _allocate,
    )
    return grad_query, grad_key, grad_value


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    output = _empty_rows("query", query)
    return output, torch.empty(output.shape[:3], dtype=torch.float32, device=query.device)


def _backward_fake(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_rows("query", query), _empty_rows("key", key), _empty_rows("value", value)


torch.library.impl("sinklora::sf_attention", "cpu", _forward_cpu)
torch.library.impl("sinklora::sf_attention_backward", "cpu", _backward_cpu)
torch.library.register_fake("sinklora::sf_attention", _forward_fake)
torch.library.register_fake("sinklora::sf_attention_backward", _backward_fake)

_forward_op = torch.ops.sinklora.sf_attention.default
_backward_op = torch.ops.sinklora.sf_attention_backward.default


class _SFAttention(torch.autograd.Function):
    """Saves every tensor with save_for_backward: activation checkpointing works by hooks on exactly those."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output, lse = _forward_op(*args)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*args[:3], output, lse, *args[3:6])
        ctx.settings = args[6:]
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _backward_op(grad_output, *ctx.saved_tensors, *ctx.settings)
        return (*grads, *(None,) * 9)


def sf_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SFPattern,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SF-Attn over torch tensors, with gradients: output (B, H, N, D) in query's dtype and lse (B, H, N) in float32.

    As ``sinklora.sf_attention``, and ``position_ids``, int64 (B or 1, N): a sequence starts at token 0 and wherever
    a position is not greater than the one before.
    """
    dim = query.shape[-1]
    args = (
        query,
        key,
        value,
        cu_seqlens,
        padding_mask,
        position_ids,
        *pattern._settings,
        dim**-0.5 if scale is None else scale,
    )
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _SFAttention.apply(*args)
    return _forward_op(*args)
