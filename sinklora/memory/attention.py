"""Scratch memory that attention takes while it runs, which no tensor outside of it shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import _C, cuda, threads
from ..settings import read_settings

_FORWARD = "sinklora::sf_attention"
_BACKWARD = "sinklora::sf_attention_backward"
_SDPA_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
_FLOAT = 4  # bytes


def plain_attention() -> str:
    """The name of an attention for transformers: its sdpa, without the masks that it only makes where it
    cannot look at the data."""
    name = "sinklora_estimate"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, _windows_only)
    return name


def _windows_only(**kwargs: Any) -> Tensor | None:
    window = kwargs.get("local_size")
    return None if window is None or kwargs["kv_length"] < window else sdpa_mask(**kwargs)


class _AskedError(Exception):
    """Ends a call once it has said how much scratch memory it wants."""


def workspace_of(device: str) -> Callable[[Any, Any], int]:
    """A function of an operator and its arguments that gives the bytes that it takes on a kind of device.

    The library is asked itself where it computes on that device here; for CUDA elsewhere it is an upper
    bound of what the kernels' and FlashAttention's float32 sums need.
    """

    def workspace(operator: Any, args: Any) -> int:
        name = operator._schema.name
        if name in (_FORWARD, _BACKWARD):
            backward = name == _BACKWARD
            query, key = args[1:3] if backward else args[:2]
            if device == "cuda" and not cuda.runs():
                return _rows(query) * (query.shape[-1] + 1) * _FLOAT if backward else 0
            settings = args[6] if backward else args[3]
            return _asked(query, key, settings, backward, device)
        if name == _SDPA_BACKWARD and device == "cuda":
            query = args[1]
            return _rows(query) * (int(query.shape[-1]) + 1) * _FLOAT
        return 0

    return workspace


def _rows(query: Tensor) -> int:
    batch, heads, tokens, _ = query.shape
    return batch * heads * tokens


def _asked(query: Tensor, key: Tensor, settings: str, backward: bool, device: str) -> int:
    """What the kernels say: called with arrays of the right shapes over one row of memory, and stopped."""

    def row(like: Tensor) -> Tensor:
        memory = torch.zeros(like.shape[-1], dtype=query.dtype, device=device)
        return memory.as_strided(tuple(like.shape), (0, 0, 0, 1))

    wanted = 0

    def allocate(num_bytes: int) -> Tensor:
        nonlocal wanted
        wanted = num_bytes
        raise _AskedError

    with unset_fake_temporarily(), _disable_current_modes():
        q, k = row(query), row(key)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
        arrays = (q, q, k, k, q, lse, q, k, k) if backward else (q, k, k, q, lse)
        num_threads = threads.chosen or torch.get_num_threads()
        call: Callable[..., None] = _C.attention_backward if backward else _C.attention_forward
        # Below 64 KB the kernels do not ask but compute, which is then as small.
        with contextlib.suppress(_AskedError):
            call(*arrays, None, None, None, *read_settings(settings), num_threads, allocate)
    return wanted
