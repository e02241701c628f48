"""Changes of a cache's layer between forwards: other rows of the batch, tokens taken back, another device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch_h2o
from .layer import TENSORS, H2OLayer
from .past import LastForward


def select_rows(layer: H2OLayer, rows: Tensor) -> None:
    """Makes row b of the layer what row rows[b] was; rows is int64 (new batch,) or bool (batch,).

    Waits for the device where rows are on one, as beam search has them.
    """
    if not layer.is_initialized:
        return
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.arange(len(layer.counts.seen))[rows.cpu()]
        index = rows.to(layer.keys.device)
        found = {name: getattr(layer, name).index_select(0, index) for name in TENSORS}
        timeline = None if layer.timeline is None else layer.timeline.take(index)
    for name, tensor in found.items():
        setattr(layer, name, tensor)
    layer.counts, layer.timeline, layer.last = layer.counts.take(rows.tolist()), timeline, None


def move(layer: H2OLayer, device: torch.device | str) -> None:
    """Puts the layer's tensors on a device."""
    if not layer.is_initialized:
        return
    with torch.inference_mode(False), torch.no_grad():
        for name in TENSORS:
            setattr(layer, name, getattr(layer, name).to(device))
        if layer.timeline is not None and layer.timeline.evicted_at is not None:
            layer.timeline.evicted_at = layer.timeline.evicted_at.to(device)


def check_crop(layer: H2OLayer, num_tokens: int) -> None:
    """Raises where the last num_tokens columns cannot be taken back."""
    if num_tokens and layer.counts.evicted:
        raise RuntimeError(
            f"crop: expected a cache that has not evicted anything, but layer {layer.index} has; crop, and "
            "assisted generation that calls it, need heavy + recent of at least all tokens"
        )
    if num_tokens > layer.columns:
        raise ValueError(
            f"tokens_to_remove: expected at least -{layer.columns}, the tokens so far, got -{num_tokens}"
        )
    if num_tokens > layer.clean:
        raise ValueError(
            f"tokens_to_remove: expected at least -{layer.clean}, as a row has padding before that, got "
            f"-{num_tokens}"
        )


def crop(layer: H2OLayer, num_tokens: int) -> None:
    """Takes the last num_tokens columns back, after check_crop."""
    if not num_tokens or not layer.is_initialized:
        return
    with torch.inference_mode(False), torch.no_grad():
        counts = layer.counts.without_last(num_tokens, layer.budget)
        scores = _scores_before(layer, num_tokens)
        if scores is not None:
            layer.scores[:, :, : scores.shape[2]] = scores
        seen = torch.tensor(counts.seen, dtype=torch.int32, device=layer.keys.device)[:, None, None]
        gone = layer.positions >= seen
        layer.positions.masked_fill_(gone, -1)
        layer.scores.masked_fill_(layer.positions < 0, 0)
        layer.place(counts)
    if layer.timeline is not None:
        layer.timeline.crop(counts.seen)
    layer.columns -= num_tokens
    layer.clean -= num_tokens
    layer.last = None


def _scores_before(layer: H2OLayer, num_tokens: int) -> Tensor | None:
    """The scores as if the last num_tokens tokens had never come, where the last forward is kept."""
    last: LastForward | None = layer.last
    if last is None:
        return None
    if last.prompt is None:
        return last.scores if num_tokens == 1 else None
    query, key, lse = last.prompt
    left, num_keys = query.shape[2] - num_tokens, key.shape[2] - num_tokens
    if left < 0:
        return None
    found = key.new_zeros(*key.shape[:2], num_keys, dtype=torch.float32)
    if left:
        found += torch_h2o.attention_scores(
            *(query[:, :, :left], key[:, :, :num_keys], lse[:, :, :left].contiguous()),
            scale=last.scale,
            score_window=layer.settings.score_window if left > 1 else None,
            group_reduction=layer.settings.group_reduction,
        )
    num_before = num_keys - left
    if last.scores is not None and num_before:
        found[:, :, :num_before] += last.scores[:, :, :num_before]
    return found
