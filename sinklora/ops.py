"""The operator for every kind of array. torch is imported only when a torch tensor comes."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _C, threads
from .pattern import SFPattern

_Array = npt.NDArray[Any]

# The module torch_ops, once a torch tensor came: an import statement at every call costs as much as a small
# kernel.
_torch_ops: Any = None

# DLPack device types whose memory the CPU reads: plain, and page-locked for CUDA or ROCm.
_HOST_DEVICES = (1, 3, 11)


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
    """SF-Attn: every query attends to its group of tokens and to the sink tokens.

    From SinkLoRA (arXiv 2406.05678), without its look at future tokens under a causal mask.

    Time and memory grow linearly with N for a fixed ``pattern.group_size``. Nothing is copied but an input
    whose last dimension is not contiguous. The result is the same, bit for bit, for every number of threads.

    Args:
        query: (B, H, N, D), float32, float16 or bfloat16; D a multiple of 8 up to 256. A torch tensor (on
            the CPU, or on CUDA where that was built in), a NumPy array (no bfloat16) or another object in
            CPU memory that speaks DLPack; the other arguments are of the same kind.
        key, value: (B, Hkv, N, D), query's dtype and device; Hkv divides H, and consecutive query heads share
            one key/value head.
        pattern: who may see whom.
        scale: multiplies query . key; 1 / sqrt(D) by default.
        cu_seqlens: int32 (S + 1,), with B = 1: the N tokens are S packed sequences, which start at
            cu_seqlens[:-1]. First 0, never decreasing, last N; on CUDA these values are checked only where
            SINKLORA_CHECK=1 is set, since reading them waits for the device.
        padding_mask: bool (B, N), True = kept. The kept tokens of a row are one sequence, wherever the
            padding stands; padded rows of the output are 0.
        return_lse: also return the log-sum-exp of every row: float32 (B, H, N), not differentiable,
            -infinity in padding.

    Returns:
        output (B, H, N, D) in query's dtype and kind, or (output, lse). Its memory is (B, N, H, D):
        transpose(1, 2) of it is contiguous. For DLPack producers other than torch it is a NumPy array.

    Gradients flow to query, key and value; differentiating them again raises a RuntimeError. Under autocast
    nothing is cast here: pass tensors of one dtype.

    Raises:
        ValueError: shapes, settings, mixed devices, values of cu_seqlens.
        TypeError: a dtype or kind of array that is not listed here, or mixed ones.
        NotImplementedError: a head dimension or device that this build lacks.
        BufferError: memory that cannot be exchanged (byte-swapped, misaligned).
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(query, torch.Tensor):
        torch_ops = _torch_ops or _load_torch_ops()
        pair = torch_ops.attend(query, key, value, pattern, scale, cu_seqlens, padding_mask, None)
        return pair if return_lse else pair[0]
    read = _read_numpy if isinstance(query, np.ndarray) else _read_dlpack
    pair = _numpy_attention(
        [read("query", query), read("key", key), read("value", value)],
        pattern,
        scale,
        None if cu_seqlens is None else read("cu_seqlens", cu_seqlens),
        None if padding_mask is None else read("padding_mask", padding_mask),
    )
    return pair if return_lse else pair[0]


def check_pattern(pattern: object) -> None:
    if not isinstance(pattern, SFPattern):
        raise TypeError(f"pattern: expected an SFPattern, got {type(pattern)!r}")


def check_scale(scale: object) -> float:
    """scale as a float; that it is finite is the kernel's check."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.floating, np.integer)):
        raise TypeError(f"scale: expected a number or None, got {type(scale)!r}")
    try:
        return float(scale)
    except OverflowError:
        raise ValueError("scale: expected a finite float32 number, got a larger integer") from None


def _load_torch_ops() -> Any:
    global _torch_ops  # noqa: PLW0603 - a cache of an import
    from . import torch_ops

    _torch_ops = torch_ops
    return torch_ops


def _read_numpy(name: str, array: Any) -> _Array:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, as query is, got {type(array)!r}")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected a plain NumPy array, got a masked one, whose mask would be ignored"
        )
    return array


def _read_dlpack(name: str, array: Any) -> _Array:
    """A NumPy view of any DLPack producer's memory."""
    torch = sys.modules.get("torch")
    is_torch = torch is not None and isinstance(array, torch.Tensor)
    if is_torch or not hasattr(type(array), "__dlpack__") or not hasattr(type(array), "__dlpack_device__"):
        wanted = "a torch tensor, a NumPy array or another DLPack producer"
        if name != "query":
            wanted = "a DLPack producer, as query is"
        raise TypeError(f"{name}: expected {wanted}, got {type(array)!r}")
    device = array.__dlpack_device__()[0]
    if device not in _HOST_DEVICES:
        # The output would have to come from the array's own library, and in the order of its streams.
        raise NotImplementedError(
            f"{name}: arrays other than torch tensors are computed on in CPU memory only, got DLPack device "
            f"type {int(device)}; torch.from_dlpack makes a torch tensor of CUDA memory without a copy"
        )
    if "bfloat16" in str(getattr(array, "dtype", "")):
        raise NotImplementedError(
            f"{name}: bfloat16 is computed on torch tensors only (see torch.from_dlpack), got {type(array)!r}"
        )
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        raise BufferError(f"{name}: its memory could not be exchanged: {error}") from error


def _rows(array: _Array) -> _Array:
    """The array itself, or a copy where its last dimension is not contiguous: the only copy there is."""
    if array.ndim and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        return np.ascontiguousarray(array)
    return array


def _allocate(num_bytes: int) -> _Array:
    return np.empty(num_bytes, dtype=np.uint8)


def _numpy_attention(
    arrays: list[_Array],
    pattern: SFPattern,
    scale: float | None,
    cu_seqlens: _Array | None,
    padding_mask: _Array | None,
) -> tuple[_Array, _Array]:
    check_pattern(pattern)
    query, key, value = arrays
    if query.ndim != 4:
        raise ValueError(
            f"query: expected 4 dimensions (batch, heads, tokens, head_dim), got shape {query.shape}"
        )
    batch, heads, tokens, dim = query.shape
    output = np.empty((batch, tokens, heads, dim), dtype=query.dtype).transpose(0, 2, 1, 3)
    lse = np.empty((batch, heads, tokens), dtype=np.float32)
    _C.attention_forward(
        _rows(query),
        _rows(key),
        _rows(value),
        output,
        lse,
        None if cu_seqlens is None else _rows(cu_seqlens),
        padding_mask,
        None,
        *pattern.settings,
        (dim or 1) ** -0.5 if scale is None else check_scale(scale),
        threads.chosen or _C.default_threads(),
        _allocate,
    )
    return output, lse
