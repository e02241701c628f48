"""Exact full causal attention in eval mode: which of our kernels runs, and where SDPA has to.

Without gradients every cache runs the same operation, chosen by shapes alone, so caches that hold the same
keys give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import cuda, torch_h2o, torch_ops
from ..pattern import SFPattern
from .masks import Rows, dense_mask, find_rows, past_mask

# Full causal attention is the pattern of one group that no sequence fills.
FULL = SFPattern(group_size=2**31 - 1, num_sink_tokens=0, shifted_fraction=0.0)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def full_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    causal: bool,
    dropout: float,
    scaling: float | None,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """The output, (B, n_query, H, D), of the last n_query of n_key tokens over all of them.

    attention_mask is `sinklora_mask`'s, or a caller's own dense mask. Raises NotImplementedError where packed
    sequences meet past tokens.
    """
    mask = attention_mask
    n_query = query.shape[2]
    if causal and (mask is None or mask.ndim <= 2):
        if mask is not None and mask.ndim == 2:  # a static cache has empty slots behind
            key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
        by_kernel = position_bias is None and kernel_takes(query, key, value)
        if n_query == key.shape[2]:
            rows = find_rows(mask, n_query, kwargs)
            if by_kernel and not needs_grad(query, key, value) and not _is_packed(rows):
                return _run_causal(module, query, key, value, scaling, rows.padding_mask)
            if by_kernel:
                return run_kernel(module, query, key, value, FULL, scaling, rows)
            mask = dense_mask(rows, n_query, query.device)
        else:
            _refuse_packed(kwargs)
            if by_kernel and not needs_grad(query, key, value):
                return _run_causal(module, query, key, value, scaling, mask)
            mask = past_mask(mask, n_query, key.shape[2], query.device)
    elif causal:
        _refuse_packed(kwargs)
    output, _ = sdpa_attention_forward(
        *(module, query, key, value, mask),
        dropout=dropout,
        scaling=scaling,
        is_causal=causal,
        position_bias=position_bias,
    )
    return output


def kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Can our kernel run here? SDPA is used where it cannot (other devices, float64, odd sizes)."""
    dim = query.shape[-1]
    return (
        cuda.takes(query.device)
        and all(tensor.dtype in _KERNEL_DTYPES for tensor in (query, key, value))
        and dim % 8 == 0
        and 0 < dim <= 256
        and value.shape[-1] <= dim
    )


def run_kernel(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SFPattern,
    scaling: float | None,
    rows: Rows,
) -> Tensor:
    """Attention by the pattern where the queries are all the keys: (B, N, H, D). Has gradients."""
    value_dim = value.shape[-1]
    query, key, value = aligned(module, query, key, value)
    output, _ = torch_ops.sf_attention(
        *(query, key, value, pattern),
        scale=scaling,
        cu_seqlens=rows.cu_seqlens,
        padding_mask=rows.padding_mask,
        position_ids=rows.position_ids,
    )
    return as_module_output(output, value_dim)


def _run_causal(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    padding_mask: Tensor | None,
) -> Tensor:
    value_dim = value.shape[-1]
    tensors = aligned(module, query, key, value)
    output, _ = torch_h2o.causal_attention(*tensors, scale=scaling, padding_mask=padding_mask)
    return as_module_output(output, value_dim)


def aligned(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype and with one head dimension, as the kernels take them."""
    dtype = _target_dtype(module, query)
    missing = query.shape[-1] - value.shape[-1]
    if missing > 0:  # latent attention (DeepSeek): zero columns add nothing and are cut off again
        value = torch.nn.functional.pad(value, (0, missing))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def as_module_output(output: Tensor, value_dim: int) -> Tensor:
    """(B, H, n, D) -> (B, n, H, value_dim), a copy only where columns are cut off."""
    return output[..., :value_dim].transpose(1, 2).contiguous()


def needs_grad(*tensors: Tensor) -> bool:
    """Would a result of these have a gradient?"""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_packed(rows: Rows) -> bool:
    """May a row be more than one sequence? Where positions are not read it may: the kernel sees."""
    if rows.cu_seqlens is not None or rows.position_ids is None:
        return rows.cu_seqlens is not None
    positions = rows.position_ids
    return not cuda.readable(positions) or bool((torch.diff(positions, dim=1) <= 0).any())


def _refuse_packed(kwargs: dict[str, Any]) -> None:
    if kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "cu_seq_lens_q: packed sequences cannot go on from past tokens in a cache; pass use_cache=False, "
            "and an attention mask of at most 2 dimensions"
        )


def _target_dtype(module: torch.nn.Module, query: Tensor) -> torch.dtype:
    """The one dtype of query, key and value, as transformers' flash-attention wrapper chooses it.

    A float32 query beside weights of another dtype comes from rotary embeddings under autocast or from norms
    that PEFT keeps in float32.
    """
    if query.dtype != torch.float32:
        return query.dtype
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    config: Any = module.config
    if hasattr(config, "_is_quantized"):
        dtype: torch.dtype = config.dtype
        return dtype
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            return layer.weight.dtype
    return query.dtype
