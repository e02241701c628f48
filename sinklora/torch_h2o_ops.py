"""The registered operators of full causal attention and of the H2O cache. Imports torch.

``torch_h2o`` calls them; csrc/core/h2o.h says what each kernel reads and writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _C, cuda, threads
from .h2o_ops import check_rank, is_decode
from .torch_memory import allocator, contiguous_rows, empty_rows
from .torch_ops import REFUSED_DEVICES

_SCHEMAS = {
    "causal_attention": "(Tensor query, Tensor key, Tensor value, Tensor? padding_mask, float scale) "
    "-> (Tensor, Tensor)",
    "attention_scores": "(Tensor query, Tensor key, Tensor? lse, Tensor? padding_mask, int window, "
    "bool mean, float scale) -> Tensor",
    "h2o_decode": "(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) key, Tensor(b!) value, "
    "Tensor(c!) scores, Tensor(d!) positions, Tensor(e!) free_slot, Tensor(f!) rows, Tensor? new_mask, "
    "int num_sinks, bool mean, float scale) -> Tensor",
    "h2o_select": "(Tensor key, Tensor value, Tensor scores, Tensor positions, Tensor(a!) rows, "
    "int num_sinks, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    # The gradient that is not there: an operator, so that a compiled graph holds it and raises when it runs.
    "no_gradient": "(Tensor grad, SymInt[] shape) -> Tensor",
}
# The tensors among an operator's arguments; they come first.
TENSORS = {
    name: tuple(re.findall(r"Tensor\S* (\w+)", text.partition("->")[0])) for name, text in _SCHEMAS.items()
}


def _run(kernel: Any, tensors: list[Any], copied: Sequence[int], settings: Sequence[Any]) -> None:
    """Calls a kernel; those of ``copied`` that it refused for their last dimension are copied, nothing else.

    A kernel writes nothing before its checks have passed, so that calling it again is safe.
    """
    settings = (*settings, threads.chosen or torch.get_num_threads(), allocator(tensors[0]))
    try:
        kernel(*tensors, *settings)
    except ValueError:
        given = list(tensors)
        for i in copied:
            tensors[i] = contiguous_rows(tensors[i])
        if all(a is b for a, b in zip(given, tensors, strict=True)):
            raise
        kernel(*tensors, *settings)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    check_rank("query", query)
    check_rank("key", key)
    output, lse = empty_rows(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    tensors = [query, key, value, output, lse, padding_mask]
    if is_decode(query.shape[2], key.shape[2]):
        without_cache = (None, 0, False, None, None, None, None, None, None, 0)
        _run(_C.h2o_decode, tensors, (0, 1, 2), (*without_cache, scale))
    else:
        _run(_C.causal_forward, tensors, (0, 1, 2), (scale,))
    return output, lse


def _scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    padding_mask: Tensor | None,
    window: int,
    mean: bool,
    scale: float,
) -> Tensor:
    check_rank("query", query)
    check_rank("key", key)
    if lse is None:
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        _run(_C.causal_forward, [query, key, None, None, lse, padding_mask], (0, 1), (scale,))
    scores = key.new_empty(key.shape[:3], dtype=torch.float32)
    _run(_C.h2o_score, [query, key, lse.contiguous(), scores, padding_mask], (0, 1), (window, mean, scale))
    return scores


def _decode(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    positions: Tensor,
    free_slot: Tensor,
    rows: Tensor,
    new_mask: Tensor | None,
    num_sinks: int,
    mean: bool,
    scale: float,
) -> Tensor:
    check_rank("query", query)
    output = empty_rows(query)
    tensors = [
        *(query, key, value, output, None, None, scores, 0, mean),
        *(new_key, new_value, new_mask, positions, free_slot, rows),
    ]
    _run(_C.h2o_decode, tensors, (0, 9, 10), (num_sinks, scale))
    return output


def _select(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    positions: Tensor,
    rows: Tensor,
    num_sinks: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = _empty_slots(key, capacity)
    _run(_C.h2o_select, [key, value, scores, positions, rows, *kept], (0, 1), (num_sinks,))
    return kept


def _empty_slots(key: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rank("key", key)
    batch, heads, _, dim = key.shape
    slots = (batch, heads, capacity)
    return (
        key.new_empty((*slots, dim)),
        key.new_empty((*slots, dim)),
        key.new_empty(slots, dtype=torch.float32),
        key.new_empty(slots, dtype=torch.int32),
    )


def _no_gradient(grad: Tensor, shape: list[int]) -> NoReturn:
    raise RuntimeError(
        "sinklora: full causal attention computes no gradients, got a backward through it: it is for "
        "inference. Call the model under torch.no_grad(), or train it in training mode"
    )


def _fake(name: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator returns, without computing it, where all tensors are on one device."""

    def fake(*args: Any) -> Any:
        _check_devices(TENSORS[name], args)
        return shapes(*args)

    return fake


def _elsewhere(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any) -> NoReturn:
        names = TENSORS[name]
        _check_devices(names, args)
        raise NotImplementedError(
            f"{names[0]}: this build computes on {cuda.computes_on()}, got device {args[0].device}"
        )

    return refuse


def _check_devices(names: Sequence[str], tensors: Sequence[Any]) -> None:
    for name, tensor in zip(names, tensors, strict=False):
        if tensor is not None and tensor.device != tensors[0].device:
            raise ValueError(f"{name}: expected {names[0]}'s device {tensors[0].device}, got {tensor.device}")


def _causal_shapes(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    check_rank("query", query)
    return empty_rows(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _scores_shapes(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    check_rank("key", key)
    return key.new_empty(key.shape[:3], dtype=torch.float32)


def _decode_shapes(query: Tensor, *_: Any) -> Tensor:
    check_rank("query", query)
    return empty_rows(query)


def _select_shapes(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_slots(args[0], args[-1])


def _no_gradient_shapes(grad: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(shape)


for _name, _compute, _shapes in (
    ("causal_attention", _causal, _causal_shapes),
    ("attention_scores", _scores, _scores_shapes),
    ("h2o_decode", _decode, _decode_shapes),
    ("h2o_select", _select, _select_shapes),
    ("no_gradient", _no_gradient, _no_gradient_shapes),
):
    torch.library.define(f"sinklora::{_name}", _SCHEMAS[_name])
    torch.library.impl(f"sinklora::{_name}", cuda.DEVICE_TYPES, _compute)
    torch.library.impl(f"sinklora::{_name}", REFUSED_DEVICES, _elsewhere(_name))
    torch.library.register_fake(f"sinklora::{_name}", _fake(_name, _shapes))

causal_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.sinklora.causal_attention.default
scores_op: Callable[..., Tensor] = torch.ops.sinklora.attention_scores.default
decode_op: Callable[..., Tensor] = torch.ops.sinklora.h2o_decode.default
select_op: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = torch.ops.sinklora.h2o_select.default
no_gradient_op: Callable[..., Tensor] = torch.ops.sinklora.no_gradient.default
