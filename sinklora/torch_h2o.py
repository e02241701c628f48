"""Full causal attention and the H2O cache's operations for torch tensors. Imports torch.

SPEC.md, section 2; ``h2o_ops`` says what a cache consists of. None has a gradient: a backward through the
attention raises, scores are detached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .h2o_ops import check_count
from .ops import check_scale
from .scores import check_group_reduction, check_score_window
from .torch_h2o_ops import TENSORS, causal_op, decode_op, no_gradient_op, scores_op, select_op
from .torch_ops import _static


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Full causal attention of the last n_query of n_key tokens: output (B, H, n_query, D) and lse.

    Shapes and dtypes alone choose the kernel, and a row's result depends on nothing but its kept keys and
    values in their order and on n_query: caches that hold the same keys give the same bits.

    Args:
        query: (B, H, n_query, D), float32, float16 or bfloat16. key, value: (B, Hkv, n_key, D),
            n_key >= n_query, Hkv divides H.
        scale: multiplies query . key; 1 / sqrt(D) by default.
        padding_mask: bool (B, n_key), True = kept; padded rows come out as 0, their lse as -infinity.

    Returns:
        output, whose memory is (B, n_query, H, D), and lse, float32 (B, H, n_query). Where an input requires
        grad the output does too, and a backward through it raises a RuntimeError.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``sinklora.sf_attention``.
    """
    _check_kinds(query=query, key=key, value=value)
    _check_optional_kinds(padding_mask=padding_mask)
    args = (query, key, value, padding_mask, _scale(query, scale))
    if not _needs_graph(query, key, value):
        return causal_op(*args)
    with torch.no_grad():
        output, lse = causal_op(*args)
    return _forward_only(output, query, key, value), lse


def attention_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None = None,
    *,
    scale: float | None = None,
    score_window: int | None = None,
    padding_mask: Tensor | None = None,
    group_reduction: str = "sum",
) -> Tensor:
    """``sinklora.attention_scores`` for torch tensors: float32 (B, Hkv, n_key), detached."""
    _check_kinds(query=query, key=key)
    _check_optional_kinds(lse=lse, padding_mask=padding_mask)
    window, mean = check_score_window(score_window) or 0, check_group_reduction(group_reduction)
    lse = None if lse is None else lse.detach()
    return scores_op(query.detach(), key.detach(), lse, padding_mask, window, mean, _scale(query, scale))


def h2o_decode(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    positions: Tensor,
    free_slot: Tensor,
    rows: Tensor,
    *,
    new_mask: Tensor | None = None,
    num_sinks: int = 0,
    mean: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``h2o_ops.decode`` for torch tensors: one step of a cache, in place; output (B, H, 1, D).

    Where an input requires grad the output does too, and a backward through it raises a RuntimeError.
    """
    tensors = (query, new_key, new_value, key, value, scores, positions, free_slot, rows)
    # Called for every layer and token: the kinds are looked at only where something has refused them.
    try:
        args = (*tensors, new_mask, num_sinks, mean, _scale(query, scale))
        if not _needs_graph(query, new_key, new_value):
            return decode_op(*args)
        with torch.no_grad():
            output = decode_op(*args)
    except (AttributeError, RuntimeError):
        _check_kinds(**dict(zip(TENSORS["h2o_decode"][:9], tensors, strict=True)))
        _check_optional_kinds(new_mask=new_mask)
        check_count("num_sinks", num_sinks)
        raise
    return _forward_only(output, query, new_key, new_value)


def h2o_select(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    positions: Tensor,
    rows: Tensor,
    *,
    num_sinks: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``h2o_ops.select`` for torch tensors: new key, value, scores, positions; ``rows`` is written."""
    _check_kinds(key=key, value=value, scores=scores, positions=positions, rows=rows)
    check_count("num_sinks", num_sinks)
    check_count("capacity", capacity)
    return select_op(key.detach(), value.detach(), scores, positions, rows, num_sinks, capacity)


def _needs_graph(*tensors: Tensor) -> bool:
    """Would a gradient be asked for, or a tangent (torch has no public name for that question)?"""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _ForwardOnly(torch.autograd.Function):
    """Ties an output to the inputs that it came from, so that a backward raises instead of dropping them."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in inputs]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *(no_gradient_op(grad, shape) for shape in ctx.shapes)


_forward_only: Callable[..., Tensor] = _ForwardOnly.apply


def _check_kinds(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch tensor, got {type(tensor)!r}")


def _check_optional_kinds(**tensors: object) -> None:
    _check_kinds(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def _scale(query: Tensor, scale: float | None) -> float:
    # Wrong ranks and D = 0 are the kernel's to refuse; here they only must not fail first.
    number = ((query.shape or (1,))[-1] or 1) ** -0.5 if scale is None else check_scale(scale)
    if torch.compiler.is_compiling():
        (number,) = _static((number,))
    return number
