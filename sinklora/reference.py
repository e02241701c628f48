"""The definition made executable: dense, float64, one sequence at a time. To test with and to read.

Memory grows as num_heads * num_tokens ** 2. torch tensors keep their gradients; torch is never imported here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _C
from .pattern import SFPattern
from .reference_h2o import H2OSimulation
from .scores import check_group_reduction, check_score_window

__all__ = ["H2OSimulation", "attention_scores", "causal_attention", "sf_attention"]

_Mask = npt.NDArray[np.bool_]


def sf_attention(
    query: Any,
    key: Any,
    value: Any,
    pattern: SFPattern,
    *,
    scale: float | None = None,
    cu_seqlens: Any = None,
    padding_mask: Any = None,
    position_ids: Any = None,
    return_lse: bool = False,
    roll: bool = False,
) -> Any:
    """SF-Attn by its definition, from and to the kind of array given (torch or NumPy), in float64.

    Args:
        query: (B, H, N, D). key, value: (B, Hkv, N, D), Hkv divides H. Any floating dtype.
        pattern: who may see whom.
        scale: multiplies query . key; 1 / sqrt(D) by default.
        cu_seqlens: (S + 1,) integers, the starts of packed sequences and the end; only with B = 1.
        padding_mask: bool (B, N), True = kept.
        position_ids: (B or 1, N) integers: a sequence starts where a position is not above the one before.
        return_lse: also return the log-sum-exp (B, H, N).
        roll: shift as LongLoRA's code does, by a cyclic roll of the tokens, with the causal mask in rolled
            order. The last group of a shifted head then holds the sequence's end followed by its beginning,
            so the first ``shift`` tokens SEE THE LAST ONES: future tokens leak into a language model's loss.
            It is here to reproduce published numbers and to show the leak; the kernels never do it.

    Returns:
        output (B, H, N, D) float64, or (output, lse). Padded rows are 0, their lse -infinity.

    Raises:
        ValueError: shapes that do not fit, more than one way of giving sequences, or with ``roll`` a sequence
            whose length is not a multiple of the group size. TypeError: pattern is no SFPattern.
    """
    if not isinstance(pattern, SFPattern):
        raise TypeError(f"pattern: expected an SFPattern, got {type(pattern)!r}")
    torch = sys.modules.get("torch")
    xp: Any = torch if torch is not None and isinstance(query, torch.Tensor) else np
    if query.ndim != 4 or key.ndim != 4 or tuple(key.shape) != tuple(value.shape):
        raise ValueError(
            f"query, key, value: expected (B, H, N, D) and two of (B, Hkv, N, D), got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}"
        )
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    if kv_heads < 1 or heads % kv_heads or tuple(key.shape) != (batch, kv_heads, tokens, dim):
        raise ValueError(f"key: expected (B, Hkv, N, D) like {tuple(query.shape)}, got {tuple(key.shape)}")
    q, k, v = (_double(xp, x) for x in (query, key, value))
    kv_head = _index(xp, np.arange(heads) // (heads // kv_heads), q)
    factor = 1 / math.sqrt(dim) if scale is None else float(scale)
    output = xp.zeros_like(q)
    lse = xp.zeros_like(q[..., 0]) - math.inf
    for row, where in _sequences(batch, tokens, cu_seqlens, padding_mask, position_ids):
        index = _index(xp, where, q)
        allowed = _index(xp, _allowed(pattern, heads, len(where), roll), q)
        out, row_lse = _dense(
            xp, q[row][:, index], k[row][kv_head][:, index], v[row][kv_head][:, index], allowed, factor
        )
        output[row][:, index] = out
        lse[row][:, index] = row_lse
    return (output, lse) if return_lse else output


def causal_attention(
    query: Any, key: Any, value: Any, *, scale: float | None = None, padding_mask: Any = None
) -> tuple[Any, Any]:
    """Full causal attention by its definition, in float64: output (B, H, n_query, D), lse (B, H, n_query).

    Args:
        query: (B, H, n_query, D). key, value: (B, Hkv, n_key, D), n_key >= n_query: the queries are the last
            ones. Torch or NumPy, any floating dtype.
        scale: multiplies query . key; 1 / sqrt(D) by default.
        padding_mask: bool (B, n_key), True = kept. Padded rows are 0, their lse -infinity.

    Raises:
        ValueError: shapes that do not fit.
    """
    xp, q, k, kv_head, factor = _causal_inputs(query, key, scale)
    if tuple(value.shape) != tuple(key.shape):
        raise ValueError(f"value: expected key's shape {tuple(key.shape)}, got {tuple(value.shape)}")
    v = _double(xp, value)
    output = xp.zeros_like(q)
    lse = xp.zeros_like(q[..., 0]) - math.inf
    for row, rows, columns, allowed in _causal_rows(xp, q, k, padding_mask):
        out, row_lse = _dense(
            xp, q[row][:, rows], k[row][kv_head][:, columns], v[row][kv_head][:, columns], allowed, factor
        )
        output[row][:, rows] = out
        lse[row][:, rows] = row_lse
    return output, lse


def attention_scores(
    query: Any,
    key: Any,
    lse: Any = None,
    *,
    scale: float | None = None,
    score_window: int | None = None,
    padding_mask: Any = None,
    group_reduction: str = "sum",
) -> Any:
    """``sinklora.attention_scores`` by its definition, dense and in float64: (B, Hkv, n_key).

    Arguments, errors and meaning as there; torch or NumPy, any floating dtype.
    """
    window, is_mean = check_score_window(score_window), check_group_reduction(group_reduction)
    xp, q, k, kv_head, factor = _causal_inputs(query, key, scale)
    scores = xp.zeros_like(k[..., 0])
    for row, rows, columns, allowed in _causal_rows(xp, q, k, padding_mask):
        logits, row_lse = _logits(xp, q[row][:, rows], k[row][kv_head][:, columns], allowed, factor)
        if lse is not None:
            row_lse = _double(xp, lse)[row][:, rows]
        received = xp.exp(logits - row_lse[..., None])[:, -(window or len(rows)) :].sum(1)
        scores[row][:, columns] = received.reshape(k.shape[1], -1, len(columns)).sum(1)
    return scores * k.shape[1] / q.shape[1] if is_mean else scores


def _dense(xp: Any, query: Any, key: Any, value: Any, allowed: Any, scale: float) -> tuple[Any, Any]:
    """(H, n, D) each and bool (H, n, n), every row with at least one True: output (H, n, D), lse (H, n)."""
    logits, lse = _logits(xp, query, key, allowed, scale)
    return xp.exp(logits - lse[..., None]) @ value, lse


def _logits(xp: Any, query: Any, key: Any, allowed: Any, scale: float) -> tuple[Any, Any]:
    logits = xp.where(allowed, scale * (query @ key.swapaxes(1, 2)), -math.inf)
    largest = xp.amax(logits, -1)
    return logits, largest + xp.log(xp.sum(xp.exp(logits - largest[..., None]), -1))


def _causal_inputs(query: Any, key: Any, scale: float | None) -> tuple[Any, Any, Any, Any, float]:
    """The array module, query and key in float64, each query head's key/value head, and the scale."""
    torch = sys.modules.get("torch")
    xp: Any = torch if torch is not None and isinstance(query, torch.Tensor) else np
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            "query, key: expected (B, H, n_query, D) and (B, Hkv, n_key, D), got "
            f"{tuple(query.shape)}, {tuple(key.shape)}"
        )
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    if (
        key.shape[0] != batch
        or kv_heads < 1
        or heads % kv_heads
        or num_keys < num_queries
        or key.shape[3] != dim
    ):
        raise ValueError(f"key: expected (B, Hkv, n_key, D) for {tuple(query.shape)}, got {tuple(key.shape)}")
    kv_head = _index(xp, np.arange(heads) // (heads // kv_heads), query)
    return (
        xp,
        _double(xp, query),
        _double(xp, key),
        kv_head,
        1 / math.sqrt(dim) if scale is None else float(scale),
    )


def _causal_rows(xp: Any, query: Any, key: Any, padding_mask: Any) -> Iterator[tuple[int, Any, Any, Any]]:
    """Each batch row with kept queries: which queries, which keys, who may see whom (1, queries, keys)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    for row in range(len(query)):
        kept = (
            np.ones(num_keys, bool) if padding_mask is None else np.asarray(padding_mask[row], dtype=np.bool_)
        )
        columns = np.flatnonzero(kept)
        rows = np.flatnonzero(kept[num_keys - num_queries :])
        if len(rows):
            allowed = np.tri(len(rows), len(columns), len(columns) - len(rows), dtype=np.bool_)
            yield row, *(_index(xp, array, query) for array in (rows, columns, allowed[None]))


def _allowed(pattern: SFPattern, heads: int, tokens: int, roll: bool) -> _Mask:
    if not roll:
        return pattern.mask(heads, tokens)
    group_size, shift, sinks, fraction, causal = pattern.settings
    if tokens % group_size:
        raise ValueError(f"roll: expected a multiple of group_size {group_size} tokens, got {tokens}")
    plain = np.empty((1, tokens, tokens), dtype=np.bool_)
    _C.pattern_mask(plain, group_size, 0, 0, 0.0, causal)
    sink = np.empty_like(plain)
    _C.pattern_mask(sink, 1, 0, sinks, 0.0, causal)  # groups of one token: each sees itself and the sinks
    first_shifted = heads - math.floor(heads * fraction)
    is_shifted = (np.arange(heads) >= first_shifted)[:, None, None]
    rolled = np.roll(plain, (shift, shift), axis=(1, 2))
    return np.where(is_shifted, rolled, plain) | sink


def _sequences(
    batch: int, tokens: int, cu_seqlens: Any, padding_mask: Any, position_ids: Any
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each non-empty sequence: its batch row, and where its tokens stand in the row."""
    if sum(x is not None for x in (cu_seqlens, padding_mask, position_ids)) > 1:
        raise ValueError("expected at most one of cu_seqlens, padding_mask and position_ids, got more")
    every = np.arange(tokens, dtype=np.int64)
    for row in range(batch):
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"cu_seqlens: expected a batch of 1 packed row, got a batch of {batch}")
            pieces = np.split(every, [int(x) for x in cu_seqlens][1:-1])
        elif padding_mask is not None:
            pieces = [every[np.asarray(padding_mask[row], dtype=np.bool_)]]
        elif position_ids is not None:
            position = np.asarray(position_ids[row if len(position_ids) > 1 else 0])
            pieces = np.split(every, np.flatnonzero(position[1:] <= position[:-1]) + 1)
        else:
            pieces = [every]
        yield from ((row, piece) for piece in pieces if len(piece))


def _double(xp: Any, array: Any) -> Any:
    return array.astype(np.float64) if xp is np else array.double()


def _index(xp: Any, array: npt.NDArray[Any], like: Any) -> Any:
    return array if xp is np else xp.from_numpy(array).to(like.device)
