"""The H2O cache's operations on NumPy arrays: attention with its lse, one step of decoding, selection.

SPEC.md, section 2; csrc/core/h2o.h says what each kernel reads and writes. ``torch_h2o`` has the same
functions for torch tensors, ``sinklora.attention_scores`` the scores of a prompt for both.

A cache is six arrays. key, value (B, Hkv, slots, D): a slot holds one token's; scores float32 and positions
int32 (B, Hkv, slots): what the token received, where it stood (-1: unused); free_slot int32 (B, Hkv): where
the next token goes; rows int32 (B, 4): each row's SEEN tokens, USED slots, BUDGET and RECENT entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _C, threads
from .ops import _allocate, _rows, check_scale

_Array = npt.NDArray[Any]

# SL_MAX_DECODE_QUERIES of csrc/core/h2o.h: more new tokens than this are a prompt.
MAX_DECODE_QUERIES = 8


def is_decode(num_queries: int, num_keys: int) -> bool:
    """Does the decode kernel compute this causal attention, rather than the forward kernel?

    The shapes alone decide, so that the same keys give the same bits whichever cache holds them.
    """
    return num_queries == 1 or (1 < num_queries <= MAX_DECODE_QUERIES and num_queries < num_keys)


def check_rank(name: str, array: Any) -> None:
    if array.ndim != 4:
        raise ValueError(
            f"{name}: expected 4 dimensions (batch, heads, tokens, head_dim), got shape {tuple(array.shape)}"
        )


def check_count(name: str, number: object) -> None:
    """TypeError unless an integer, ValueError unless at least 0."""
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(number)!r}")
    if not 0 <= number < 2**63:  # type: ignore[operator]
        raise ValueError(f"{name}: expected an integer from 0 to 2^63 - 1, got {number}")


def causal_attention(
    query: _Array,
    key: _Array,
    value: _Array,
    *,
    scale: float | None = None,
    padding_mask: _Array | None = None,
) -> tuple[_Array, _Array]:
    """Full causal attention of the last n_query of n_key tokens: output (B, H, n_query, D) and lse.

    Args:
        query: (B, H, n_query, D), float32 or float16. key, value: (B, Hkv, n_key, D), n_key >= n_query.
        scale: multiplies query . key; 1 / sqrt(D) by default.
        padding_mask: bool (B, n_key), True = kept; padded rows come out as 0, their lse as -infinity.

    Returns:
        output, whose memory is (B, n_query, H, D), and lse, float32 (B, H, n_query).

    Raises:
        ValueError, TypeError, NotImplementedError, BufferError: as ``sinklora.sf_attention``.
    """
    check_rank("query", query)
    check_rank("key", key)
    output, lse = _empty_output(query), np.empty(query.shape[:3], dtype=np.float32)
    tensors = (_rows(query), _rows(key), _rows(value), output, lse, padding_mask)
    settings = (_scale(query, scale), threads.chosen or _C.default_threads(), _allocate)
    if is_decode(query.shape[2], key.shape[2]):
        _C.h2o_decode(*tensors, None, 0, False, None, None, None, None, None, None, 0, *settings)
    else:
        _C.causal_forward(*tensors, *settings)
    return output, lse


def decode(
    query: _Array,
    new_key: _Array,
    new_value: _Array,
    key: _Array,
    value: _Array,
    scores: _Array,
    positions: _Array,
    free_slot: _Array,
    rows: _Array,
    *,
    new_mask: _Array | None = None,
    num_sinks: int = 0,
    mean: bool = False,
    scale: float | None = None,
) -> _Array:
    """One step of a cache, in place: the new token enters, attends and adds to the scores; one slot is freed.

    Args:
        query: (B, H, 1, D). new_key, new_value: (B, Hkv, 1, D), of the new token.
        key, value, scores, positions, free_slot, rows: the cache, with at least one slot more than is used.
            All are written.
        new_mask: bool (B, 1): False leaves a row as it is, its output 0.
        num_sinks: tokens at the start that are never evicted.
        mean: scores are means over the query heads of a key/value head instead of sums.
        scale: multiplies query . key; 1 / sqrt(D) by default.

    Returns:
        output (B, H, 1, D) in query's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError, BufferError: as ``sinklora.sf_attention``; the cache is
        then unchanged.
    """
    check_rank("query", query)
    output = _empty_output(query)
    _C.h2o_decode(
        *(_rows(query), key, value, output, None, None, scores, 0, mean),
        *(_rows(new_key), _rows(new_value), new_mask, positions, free_slot, rows, num_sinks),
        *(_scale(query, scale), threads.chosen or _C.default_threads(), _allocate),
    )
    return output


def select(
    key: _Array,
    value: _Array,
    scores: _Array,
    positions: _Array,
    rows: _Array,
    *,
    num_sinks: int,
    capacity: int,
) -> tuple[_Array, _Array, _Array, _Array]:
    """What the budget of each row keeps, moved to the first of ``capacity`` new slots.

    Per key/value head: the newest entries, the sinks, and of the rest those with the largest scores, ties to
    the older, in the order of their slots. The number kept is written to ``rows``; free_slot is then that.

    Args:
        key, value, scores, positions, rows: a cache.
        num_sinks: tokens at the start that are never evicted.
        capacity: slots of the result, at least what is kept.

    Returns:
        key, value, scores, positions; unused slots have position -1, their keys and values are not set.

    Raises:
        ValueError, TypeError, NotImplementedError, BufferError: as ``sinklora.sf_attention``; ``rows`` is
        then unchanged.
    """
    check_rank("key", key)
    check_count("capacity", capacity)
    batch, heads, _, dim = key.shape
    kept = (
        np.empty((batch, heads, capacity, dim), dtype=key.dtype),
        np.empty((batch, heads, capacity, dim), dtype=key.dtype),
        np.empty((batch, heads, capacity), dtype=np.float32),
        np.empty((batch, heads, capacity), dtype=np.int32),
    )
    _C.h2o_select(
        *(_rows(key), _rows(value), scores, positions, rows, *kept, num_sinks),
        *(threads.chosen or _C.default_threads(), _allocate),
    )
    return kept


def _empty_output(query: _Array) -> _Array:
    batch, heads, tokens, dim = query.shape
    return np.empty((batch, tokens, heads, dim), dtype=query.dtype).transpose(0, 2, 1, 3)


def _scale(query: _Array, scale: float | None) -> float:
    return (query.shape[3] or 1) ** -0.5 if scale is None else check_scale(scale)
