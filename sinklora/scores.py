"""How much attention each key receives: exact column sums, without the N x N matrix."""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np

from . import _C, threads
from .ops import _allocate, _Array, _read_dlpack, _read_numpy, _rows, check_scale

# The module torch_h2o, once a torch tensor came: an import statement at every call costs microseconds.
_torch_h2o: Any = None


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
    """The attention that every key receives: exact column sums of the causal attention matrix.

    What H2O (arXiv 2306.14048) keeps its heavy hitters by, and what fused attention (flash-attention, SDPA)
    cannot give, because it never has the matrix. Here a second pass over query . key makes

        scores[b, g, j] = sum over g's query heads h and the queries i of P[b, h, i, j],
        P[b, h, i, j] = exp(scale * query[b, h, i] . key[b, g, j] - lse[b, h, i]) for j up to i, else 0

    with memory linear in the number of tokens. Where there are fewer queries than keys, they are the last
    ones. The result is the same, bit for bit, for every number of threads, and detached: no gradient flows
    through it.

    Args:
        query: (B, H, n_query, D), float32, float16 or bfloat16; D a multiple of 8 up to 256. A torch tensor,
            a NumPy array (no bfloat16) or another object that speaks DLPack; the others are of its kind.
        key: (B, Hkv, n_key, D), query's dtype and device, n_key >= n_query; Hkv divides H, and consecutive
            query heads share one key/value head.
        lse: float32 (B, H, n_query), the log-sum-exp of every row of the same attention where it is known,
            as from an attention kernel of the same ``scale`` and mask; computed in one more pass by default.
        scale: multiplies query . key; 1 / sqrt(D) by default.
        score_window: sum over the last so many kept queries of each row only, as SnapKV does; at least 1,
            all by default.
        padding_mask: bool (B, n_key), True = kept. Padding scores 0 and adds nothing, whatever stands there.
        group_reduction: "sum" over the query heads of a key/value head, or "mean": the sum divided by
            H / Hkv, in the same order.

    Returns:
        float32 (B, Hkv, n_key), of query's kind (NumPy for DLPack producers other than torch). The scores of
        one row and key/value head add up to (H / Hkv) times the number of queries.

    Raises:
        ValueError: shapes, settings, mixed devices.
        TypeError: a dtype or kind of array that is not listed here, or mixed ones.
        NotImplementedError: a head dimension or device that this build lacks.
        BufferError: memory that cannot be exchanged (byte-swapped, misaligned).
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(query, torch.Tensor):
        torch_h2o = _torch_h2o or _load_torch_h2o()
        options = {"scale": scale, "score_window": score_window, "group_reduction": group_reduction}
        return torch_h2o.attention_scores(query, key, lse, padding_mask=padding_mask, **options)
    read = _read_numpy if isinstance(query, np.ndarray) else _read_dlpack
    return _numpy_scores(
        *(read("query", query), read("key", key), None if lse is None else read("lse", lse), scale),
        check_score_window(score_window),
        None if padding_mask is None else read("padding_mask", padding_mask),
        check_group_reduction(group_reduction),
    )


def check_score_window(score_window: object) -> int | None:
    """score_window as an integer >= 1, or None."""
    if score_window is None:
        return None
    if isinstance(score_window, bool) or not hasattr(score_window, "__index__"):
        raise TypeError(f"score_window: expected an integer or None, got {type(score_window)!r}")
    window = operator.index(score_window)
    if not 1 <= window < 2**63:
        raise ValueError(f"score_window: expected an integer >= 1, or None for all queries, got {window}")
    return window


def check_group_reduction(group_reduction: object) -> bool:
    """Is it "mean"? ValueError unless "sum" or "mean"."""
    if group_reduction not in ("sum", "mean"):
        raise ValueError(f'group_reduction: expected "sum" or "mean", got {group_reduction!r}')
    return group_reduction == "mean"


def _load_torch_h2o() -> Any:
    global _torch_h2o  # noqa: PLW0603 - a cache of an import
    from . import torch_h2o

    _torch_h2o = torch_h2o
    return torch_h2o


def _numpy_scores(
    query: _Array,
    key: _Array,
    lse: _Array | None,
    scale: float | None,
    window: int | None,
    padding_mask: _Array | None,
    mean: bool,
) -> _Array:
    for name, array in (("query", query), ("key", key)):
        if array.ndim != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, heads, tokens, head_dim), got shape {array.shape}"
            )
    query, key = _rows(query), _rows(key)
    number = (query.shape[3] or 1) ** -0.5 if scale is None else check_scale(scale)
    settings = (number, threads.chosen or _C.default_threads(), _allocate)
    if lse is None:
        lse = np.empty(query.shape[:3], dtype=np.float32)
        _C.causal_forward(query, key, None, None, lse, padding_mask, *settings)
    scores = np.empty(key.shape[:3], dtype=np.float32)
    _C.h2o_score(query, key, np.ascontiguousarray(lse), scores, padding_mask, window or 0, mean, *settings)
    return scores
