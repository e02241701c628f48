"""Masks between transformers and the operator: what the mask interface hands over, and dense masks for SDPA.

transformers builds one mask per forward through the function registered here and passes it to every layer.
Where no more than causality is asked for, with past tokens or without, ours hands over O(N): the 2D padding
mask, or nothing. Everything else (windows that bite, custom masks, a static cache in a graph) is the dense
mask that "sdpa" would get.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .. import cuda

# What create_*_mask of transformers combines with and_masks: packing, and the sliding window or chunk
# overlay.
_AND_MASKS_NAME = "and_mask"


class Rows(NamedTuple):
    """Which tokens are sequences: at most one of the three is given, none means that each row is one."""

    cu_seqlens: torch.Tensor | None = None  # int32 (S + 1,)
    padding_mask: torch.Tensor | None = None  # bool (B, N), True = kept
    position_ids: torch.Tensor | None = None  # int64 (B or 1, N)


def sinklora_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function of the name "sinklora" in transformers' AttentionMaskInterface.

    Returns None (causal), the bool (B, n_key) padding mask, or an empty int64 tensor: "causal, and packed as
    position_ids say", so that a model that does not pass position_ids on cannot lose the packing silently.
    A padding mask may be shorter than the keys: a static cache has empty slots behind. Where more than
    causality is asked for, and in a graph where a static cache's length cannot be read, what `sdpa_mask`
    returns: a bool (B, 1, n_query, n_key) mask or None.
    """
    n_key = _keys_so_far(q_length, kv_length, q_offset, kv_offset)
    is_2d = attention_mask is None or attention_mask.ndim == 2
    if n_key is not None and is_2d and _is_causal(mask_function, n_key, q_length, q_offset, kwargs):
        if attention_mask is None and n_key == kv_length:
            # No skip over past tokens means one token over a static cache's window: rows are packed without
            # a cache only.
            packed = n_key == q_length and not kwargs.get("allow_is_causal_skip", True)
            packed = packed and not _is_static(q_offset)
            return torch.empty(0, dtype=torch.int64, device=kwargs.get("device")) if packed else None
        if attention_mask is None:
            return torch.ones(batch_size, n_key, dtype=torch.bool, device=kwargs.get("device"))
        if n_key == q_length and kv_offset == 0:
            return _fit(attention_mask, n_key)
        if n_key == q_length and kwargs.get("local_size") != 1:
            # An evicting cache: the past columns too, for it to see that none of its tokens is hidden.
            kv_offset, n_key, kv_length = 0, kv_offset + n_key, kv_offset + kv_length
        return _fit_past(attention_mask, kv_offset, n_key, may_drop=n_key == kv_length)
    dense: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor from static caches, as transformers passes it
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return dense


def is_packing_marker(mask: torch.Tensor) -> bool:
    """Is this `sinklora_mask`'s way of saying that position_ids restart?"""
    return mask.ndim == 1


def _keys_so_far(q_length: int, kv_length: int, q_offset: int | torch.Tensor, kv_offset: int) -> int | None:
    """The number of keys up to the last query's, from kv_offset on; None where it cannot be told."""
    if isinstance(q_offset, torch.Tensor):  # a static cache's: reading it would break a graph
        if torch.compiler.is_compiling() or q_offset.device.type != "cpu":
            return None
        q_offset = int(q_offset)
    n_key = q_offset + q_length - kv_offset
    return n_key if q_length <= n_key <= kv_length else None


def _is_static(q_offset: int | torch.Tensor) -> bool:
    return isinstance(q_offset, torch.Tensor)


def _is_causal(
    mask_function: Callable[..., Any],
    n_key: int,
    q_length: int,
    q_offset: int | torch.Tensor,
    kwargs: dict[str, Any],
) -> bool:
    """Does mask_function mean causal attention (packed or not), for rows of n_key tokens?

    transformers folds packing and windows into closures. Only what is known to be harmless is recognised: a
    function it does not know makes a dense mask, which is slower but right.
    """
    skip = kwargs.get("allow_is_causal_skip", True)
    if mask_function is causal_mask_function:
        # Skip off: the caller wants a mask to combine with others. transformers also turns it off for one
        # token over a static cache, for the sake of graphs.
        return bool(skip) or (_is_static(q_offset) and q_length == 1)
    if kwargs.get("use_vmap", False) or mask_function.__name__ != _AND_MASKS_NAME:
        return False  # a user's or a model's own mask; blocks (or_mask); bidirectional
    local_size = kwargs.get("local_size")
    if local_size is None:
        return not skip and n_key == q_length  # transformers itself found packing
    return bool(n_key <= local_size)  # a window or chunk that does not bite, packed or not


def _fit(mask: torch.Tensor, n_key: int) -> torch.Tensor:
    """The bool (B, n_key) part of a 2D mask that belongs to the keys; keys beyond it are padding."""
    part = mask[:, :n_key].to(torch.bool)
    missing = n_key - part.shape[1]
    return torch.nn.functional.pad(part, (0, missing)) if missing > 0 else part


def _fit_past(mask: torch.Tensor, kv_offset: int, n_key: int, may_drop: bool) -> torch.Tensor | None:
    """The bool (B, n_key) part of a 2D mask over past and new tokens; None where it hides nothing."""
    if mask.shape[1] < kv_offset + n_key:
        raise ValueError(
            f"attention_mask: expected a column for each of the {kv_offset + n_key} tokens so far, those in "
            f"the cache included, got shape {tuple(mask.shape)}"
        )
    part = mask[:, kv_offset : kv_offset + n_key].to(torch.bool)
    return None if may_drop and cuda.readable(part) and bool(part.all()) else part


def past_mask(
    padding_mask: torch.Tensor | None, n_query: int, n_key: int, device: torch.device
) -> torch.Tensor:
    """The bool (B or 1, 1, n_query, n_key) mask of the last n_query of n_key tokens, causal, as SDPA takes
    it.

    A padded query sees itself, so that its softmax has a sum.
    """
    key = torch.arange(n_key, device=device)
    query = key[n_key - n_query :, None]
    causal = (query >= key)[None, None]
    if padding_mask is None:
        return causal
    return (causal & padding_mask[:, None, None, :]) | (query == key)


def find_rows(attention_mask: torch.Tensor | None, num_tokens: int, kwargs: dict[str, Any]) -> Rows:
    """How the rows of a call with as many queries as keys are padded or packed, from a mask that is not
    dense.

    An attention mask wins over position_ids (left-padded batches carry both). Positions are handed on unread:
    the operator finds the restarts itself, and 0..N-1 has none. Raises NotImplementedError where rows are
    packed and the model keeps position_ids from its attention.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    packed = attention_mask is not None and is_packing_marker(attention_mask)
    padding_mask = None if packed else attention_mask
    if cu_seqlens is not None:
        other = kwargs.get("cu_seq_lens_k")
        if other is not None and other.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seq_lens_k: expected the sequences of cu_seq_lens_q, shape {tuple(cu_seqlens.shape)}, "
                f"got shape {tuple(other.shape)}"
            )
        return Rows(cu_seqlens=cu_seqlens.to(torch.int32), padding_mask=padding_mask)
    if padding_mask is not None or num_tokens <= 1:
        return Rows(padding_mask=padding_mask)
    position_ids = kwargs.get("position_ids")
    # Multi-axis positions (3D) say where an image patch stands, not where a sequence starts.
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == num_tokens:
        return Rows(position_ids=position_ids.to(torch.int64))
    if packed:
        raise NotImplementedError(
            "position_ids: the rows are packed, but this model does not pass position_ids to its attention; "
            "pass cu_seq_lens_q and cu_seq_lens_k, or an attention_mask with one sequence a row"
        )
    return Rows()


def dense_mask(rows: Rows, num_tokens: int, device: torch.device) -> torch.Tensor | None:
    """The bool (B or 1, 1, N, N) mask of causal attention over these rows; None where that is all of it."""
    index = torch.arange(num_tokens, device=device)
    causal = (index[:, None] >= index)[None, None]
    if rows.padding_mask is not None:
        return causal & rows.padding_mask[:, None, None, :]
    if rows.cu_seqlens is not None:
        sequence = torch.searchsorted(rows.cu_seqlens, index.to(torch.int32), right=True)[None]
    elif rows.position_ids is not None:
        starts = torch.diff(rows.position_ids, dim=1) <= 0
        if not torch.compiler.is_compiling() and not starts.any():
            return None
        sequence = torch.nn.functional.pad(starts, (1, 0)).cumsum(1)
    else:
        return None
    return causal & (sequence[:, None, :, None] == sequence[:, None, None, :])


def padding_of_dense(mask: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
    """The bool (B, N) padding mask that a dense mask (B, 1, N, N), bool or additive, means; None if it means
    more.

    Accepted is exactly "key j is kept and j <= i" in the rows of kept tokens. Reads the values, which waits
    for the device: once for a mask that all layers get.
    """
    global _dense  # noqa: PLW0603 - the last answer
    if cuda.readable(mask) or mask.is_inference():
        return _read_dense(mask, num_tokens)
    last = _dense
    if last is None or last[0]() is not mask or last[1:3] != (mask._version, num_tokens):
        last = _dense = weakref.ref(mask), mask._version, num_tokens, _read_dense(mask, num_tokens)
    return last[3]


# The mask that padding_of_dense answered about last, its version, the tokens, and the answer.
_dense: tuple[weakref.ref[torch.Tensor], int, int, torch.Tensor | None] | None = None


def _read_dense(mask: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != (num_tokens, num_tokens):
        return None
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((allowed | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None  # an additive mask with other values is a bias
    allowed = allowed[:, 0]
    kept = torch.diagonal(allowed, dim1=1, dim2=2)
    expected = torch.tril(kept[:, None, :].expand(-1, num_tokens, -1))
    same = (allowed == expected) | ~kept[:, :, None]
    return kept.contiguous() if bool(same.all()) else None
