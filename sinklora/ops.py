"""The operator for every kind of array."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _C, threads
from .pattern import SFPattern


def sf_attention(
    query: Any,
    key: Any,
    value: Any,
    pattern: SFPattern,
    *,
    scale: float | None = None,
    cu_seqlens: Any = None,
    padding_mask: Any = None,
    return_lse: bool = False,
) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(query, torch.Tensor):
        from . import torch_ops

        pair = torch_ops.sf_attention(
            query, key, value, pattern, scale=scale, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        )
        return pair if return_lse else pair[0]
    batch, heads, tokens, dim = query.shape
    output = np.empty((batch, tokens, heads, dim), dtype=query.dtype).transpose(0, 2, 1, 3)
    lse = np.empty((batch, heads, tokens), dtype=np.float32)
    _C.attention_forward(
        query,
        key,
        value,
        output,
        lse,
        cu_seqlens,
        padding_mask,
        None,
        *pattern.resolve(),
        dim**-0.5 if scale is None else scale,
        threads._chosen or _C.default_threads(),
        lambda num_bytes: np.empty(num_bytes, np.uint8),
    )
    return (output, lse) if return_lse else output
