"""The attention function's part for a layer of an H2OCache: what it refuses, and how masks reach the
layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda
from ..cache.layer import H2OLayer
from ..cache.new import NewMask, NewTokens, read_mask
from ..cache.ranks import RankedLayer
from .full import aligned, as_module_output, needs_grad
from .masks import padding_of_dense


def h2o_attention(
    module: torch.nn.Module,
    layer: H2OLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None,
    causal: bool,
    eval_attention: str,
    sliding_window: int | None,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """The output, (B, n, H, D), of the new tokens over the layer's entries and themselves.

    Raises RuntimeError in training mode, NotImplementedError for what such a cache cannot honour; the layer
    is unchanged then.
    """
    try:
        num_new = query.shape[2]
        if module.training:
            raise RuntimeError(
                "past_key_values: an H2OCache is for inference, got a model in training mode; call "
                "model.eval(), or pass use_cache=False"
            )
        if layer.index == 0:  # what later layers would refuse, when this one has taken the tokens already
            _check_layers(layer, module.config)
            sliding_window = sliding_window or _window_of_later_layers(module.config)
        _refuse(layer, num_new, causal, eval_attention, sliding_window, position_bias, kwargs)
        mask = _told(layer, attention_mask, num_new, kwargs)
        new = NewTokens(*aligned(module, query, key, value), mask, scaling)
        if isinstance(layer, RankedLayer):
            positions = _positions(layer, mask.tensor, num_new, kwargs, key.device)
            new.rotation = layer.rotary.received(module, layer.index, positions, key)
        output = layer.attend(new)
        if needs_grad(query, key, value) and not output.requires_grad:
            output = _ForwardOnly.apply(output, query)
        return as_module_output(output, value.shape[-1])
    except Exception:
        # Nothing changed: kernels refuse before they write, and a prompt's buffers replace the old.
        layer.unfinished = False
        if not layer.columns:
            layer.reset()  # a first token's buffers would hold the next to this batch and dtype
        raise


class _ForwardOnly(torch.autograd.Function):
    """Ties an output to the query, so that a backward raises instead of dropping gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "past_key_values: an H2OCache is for inference, its attention has no gradient, got a backward; "
            "pass "
            "use_cache=False"
        )


def _check_layers(layer: H2OLayer, config: Any) -> None:
    """ValueError where the model has more layers than the cache, or fewer."""
    found = getattr(config, "num_hidden_layers", None)
    if found is not None and layer.num_layers is not None and found != layer.num_layers:
        raise ValueError(
            f"past_key_values: expected a model of {layer.num_layers} layers, as the H2OCache's config says, "
            f"got one of {found}"
        )


def _window_of_later_layers(config: Any) -> int | None:
    """The sliding window of a model only some of whose layers have one."""
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return getattr(config, "sliding_window", None) if sliding else None


def _refuse(
    layer: H2OLayer,
    num_new: int,
    causal: bool,
    eval_attention: str,
    sliding_window: int | None,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if not causal:
        raise NotImplementedError("is_causal: an H2OCache is for causal attention, got a non-causal layer")
    if eval_attention == "sf":
        raise NotImplementedError(
            'eval_attention: SF-Attn over cached tokens is not defined, got "sf" and an H2OCache; patch the '
            'model with eval_attention="full"'
        )
    reach = layer.reach(num_new)
    if sliding_window is not None and 0 < sliding_window < reach:
        raise NotImplementedError(
            f"sliding_window: expected none, or at least the {reach} tokens that the H2OCache's layer "
            f"{layer.index} looks back on, got {sliding_window}; load the model with sliding_window=None"
        )
    if position_bias is not None:
        raise NotImplementedError("position_bias: an H2OCache adds no bias to the scores")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "cu_seq_lens_q: packed sequences cannot share an H2OCache; pass them as padded rows of a batch"
        )


def _told(layer: H2OLayer, mask: Tensor | None, num_new: int, kwargs: dict[str, Any]) -> NewMask:
    """Which of the new tokens are kept: read by the first layer, for all that get the same mask."""
    first = layer if layer.first is None else layer.first
    told = first.told
    if layer is first or told is None or told[0] is not mask:
        told = mask, _mask_of_new(layer, mask, num_new, kwargs)
    first.told = None if layer.index + 1 == layer.num_layers else told
    return told[1]


def _mask_of_new(layer: H2OLayer, mask: Tensor | None, num_new: int, kwargs: dict[str, Any]) -> NewMask:
    if mask is None:
        _refuse_restarts(layer, num_new, kwargs)
        return NewMask()
    if mask.ndim > 2 and layer.columns == 0:
        padding = padding_of_dense(mask, num_new)
        if padding is None:
            raise NotImplementedError(_DENSE)
        mask = padding
    if mask.ndim != 2:
        raise NotImplementedError(_DENSE)
    if mask.shape[1] != layer.columns + num_new:
        raise ValueError(
            f"attention_mask: expected columns for all {layer.columns + num_new} tokens so far, the "
            f"{num_new} new ones included, got {mask.shape[1]}"
        )
    mask = mask.to(torch.bool)
    followed = num_new > 1 or layer.recording or layer.timeline is not None
    if not followed and not cuda.readable(mask):
        return NewMask(mask[:, layer.columns :], whole=mask)
    shown, new = read_mask(mask, layer.columns)
    if layer.index == 0 and layer.columns:
        for row, (number, seen) in enumerate(zip(shown, layer.counts.seen, strict=False)):
            if number < seen:
                raise NotImplementedError(
                    f"attention_mask: an H2OCache cannot hide tokens that it has taken, {seen} in row {row}, "
                    f"got a mask that keeps {number} of the {layer.columns} past columns; leave their "
                    "columns as they were, and start anew with cache.reset() to hide some"
                )
    return new


def _refuse_restarts(layer: H2OLayer, num_new: int, kwargs: dict[str, Any]) -> None:
    """NotImplementedError for packed rows; reads positions, once for each forward of more than one token."""
    position_ids: Any = kwargs.get("position_ids")
    told = layer.index == 0 and num_new > 1 and position_ids is not None and position_ids.ndim == 2
    if told and bool((torch.diff(position_ids, dim=1) <= 0).any()):
        raise NotImplementedError(
            "position_ids: expected positions that ascend, as rows of an H2OCache are one sequence each, "
            "got some that restart (packed rows); pass them as padded rows of a batch"
        )


def _positions(
    layer: H2OLayer, mask: Tensor | None, num_new: int, kwargs: dict[str, Any], device: torch.device
) -> Tensor:
    """int64 (B or 1, n): the positions that the model rotated the new tokens by."""
    position_ids: Tensor | None = kwargs.get("position_ids")
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == num_new:
        return position_ids
    if position_ids is not None or mask is not None or layer.clean != layer.columns:
        raise NotImplementedError(
            'positions: "cache" needs to know what keys were rotated by, but this model does not pass 2D '
            "position_ids to its attention, and rows of this batch are padded"
        )
    return torch.arange(layer.columns, layer.columns + num_new, device=device)[None]


_DENSE = (
    "attention_mask: an H2OCache takes a 2D padding mask (batch, tokens so far), or at first a causal 4D "
    "mask, got a mask that is more"
)
