"""SF-Attn for torch tensors: the registered operators and their gradient. Imports torch.

Every call goes through the operators: the dispatcher is what makes negative bits, zero tensors, vmap levels
and modes right, before the kernels see plain memory. The autograd.Function stands outside of them: an
operator with an autograd kernel of its own costs several microseconds more at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C, cuda, threads
from .ops import check_pattern, check_scale
from .pattern import SFPattern
from .settings import cached_settings_text, read_settings, settings_text
from .torch_memory import allocator, contiguous_rows, empty_rows

_FORWARD_NAMES = ("query", "key", "value", "settings", "cu_seqlens", "padding_mask", "position_ids")
_BACKWARD_NAMES = ("grad_output", "query", "key", "value", "output", "lse", *_FORWARD_NAMES[3:])

# The settings go as one text (see settings.py): each number of its own would cost every call a sixth of a
# microsecond in the dispatcher, which on a small input is as long as the kernel takes for a head.
_REST = "str settings, Tensor? cu_seqlens=None, Tensor? padding_mask=None, Tensor? position_ids=None"

torch.library.define(
    "sinklora::sf_attention", f"(Tensor query, Tensor key, Tensor value, {_REST}) -> (Tensor, Tensor)"
)
torch.library.define(
    "sinklora::sf_attention_backward",
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    f"{_REST}) -> (Tensor, Tensor, Tensor)",
)


def sf_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SFPattern,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SF-Attn over torch tensors, with gradients: output (B, H, N, D) and lse, float32 (B, H, N).

    As ``sinklora.sf_attention``, which documents arguments and errors, and ``position_ids``, int64 (B or 1,
    N): a sequence starts at token 0 and wherever a position is not greater than the one before. The kernel
    finds the starts itself; nothing is read on the host.
    """
    return attend(query, key, value, pattern, scale, cu_seqlens, padding_mask, position_ids)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SFPattern,
    scale: float | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``sf_attention`` by position only: on a small input, keywords would show in the time of a call."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        _refuse_kind(query=query, key=key, value=value)
    if type(pattern) is not SFPattern:
        check_pattern(pattern)
    if cu_seqlens is not None or padding_mask is not None or position_ids is not None:
        _check_sequences(cu_seqlens=cu_seqlens, padding_mask=padding_mask, position_ids=position_ids)
    if scale is None:
        # Wrong ranks and D = 0 are the kernel's to refuse; here they only must not fail first.
        shape = query.shape
        scale = (shape[-1] or 1) ** -0.5 if shape else 1.0
    else:
        scale = check_scale(scale)
    if torch.compiler.is_compiling():
        settings = settings_text(*_static((*pattern.settings, scale)))
    else:
        settings = cached_settings_text(*pattern.settings, scale)
    # Within forward-mode differentiation (torch has no public name for the question) the operator would drop
    # tangents silently; the autograd.Function refuses them.
    if forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    ):
        # torch.compile refuses one tensor passed twice to an autograd.Function; a view is another tensor.
        if key is query:
            key = key.view_as(key)
        if value is query or value is key:
            value = value.view_as(value)
        run: Callable[..., tuple[Tensor, Tensor]] = _SFAttention.apply
    else:
        run = _forward_op
    if cu_seqlens is None and padding_mask is None and position_ids is None:
        return run(query, key, value, settings)
    return run(query, key, value, settings, cu_seqlens, padding_mask, position_ids)


def _static(settings: tuple[float, ...]) -> Any:
    """Settings as constants of a compiled graph; torch.compile(dynamic=True) makes symbols of numbers."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return tuple(guard_scalar(number) for number in settings)


# ---- checks that the kernel cannot make ----


def _refuse_kind(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch tensor, as query is, got {type(tensor)!r}")


def _check_sequences(**tensors: Tensor | None) -> None:
    _refuse_kind(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def _check_devices(names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
    """ValueError unless all tensors are on query's device."""
    device = tensors[names.index("query")].device
    for name, tensor in zip(names, tensors, strict=False):
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"{name}: expected query's device {device}, got {tensor.device}")


def _check_rank(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise ValueError(
            f"{name}: expected 4 dimensions (batch, heads, tokens, head_dim), got shape {tuple(tensor.shape)}"
        )


# ---- the operators ----


def _check_starts(cu_seqlens: Tensor | None, num_tokens: int) -> None:
    """The check of values that kernels leave out on CUDA, since it waits for the device."""
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu" and cuda.checks_values():
        _C.check_cu_seqlens(cu_seqlens.cpu(), num_tokens)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: str,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if query.dim() != 4:
        _check_rank("query", query)
    # A small call is bound by these lines: no helper functions, and strides are asked for only where the
    # kernel refuses them.
    batch, heads, tokens, dim = query.shape
    shape, strides = (batch, heads, tokens, dim), (tokens * heads * dim, dim, heads * dim, 1)
    output = query.new_empty_strided(shape, strides)
    lse = query.new_empty_strided((batch, heads, tokens), (heads * tokens, tokens, 1), dtype=torch.float32)
    if cu_seqlens is not None:
        _check_starts(cu_seqlens, tokens)
    num_threads = threads.chosen or torch.get_num_threads()
    call: list[Any] = [
        *(query, key, value, output, lse, cu_seqlens, padding_mask, position_ids),
        *(*read_settings(settings), num_threads, allocator(query)),
    ]
    try:
        _C.attention_forward(*call)
    except ValueError:
        _check_devices(_FORWARD_NAMES, (query, key, value, settings, *call[5:8]))
        rows = list(call)
        for i in (0, 1, 2, 5):  # query, key, value, cu_seqlens
            rows[i] = contiguous_rows(call[i])
        if all(row is tensor for row, tensor in zip(rows, call, strict=True)):
            raise
    else:
        return output, lse
    _C.attention_forward(*rows)
    return output, lse


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    settings: str,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_rank(name, tensor)
    grads = empty_rows(query), empty_rows(key), empty_rows(value)
    read = [contiguous_rows(tensor) for tensor in (grad_output, query, key, value, output)]
    if query.device.type != "cpu":
        _check_devices(_BACKWARD_NAMES, (grad_output, query, key, value, output, lse))
        _check_starts(cu_seqlens, query.shape[2])
    num_threads = threads.chosen or torch.get_num_threads()
    call: list[Any] = [
        *(*read, lse.contiguous(), *grads, contiguous_rows(cu_seqlens), padding_mask, position_ids),
        *(*read_settings(settings), num_threads, allocator(query)),
    ]
    _C.attention_backward(*call)
    return grads


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    _check_devices(_FORWARD_NAMES, args)
    query = args[0]
    _check_rank("query", query)
    return empty_rows(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(_BACKWARD_NAMES, args)
    return empty_rows(args[1]), empty_rows(args[2]), empty_rows(args[3])


def _forward_elsewhere(*args: Any) -> NoReturn:
    _check_devices(_FORWARD_NAMES, args)
    raise NotImplementedError(
        f"query: this build computes on {cuda.computes_on()}, got device {args[0].device}"
    )


def _backward_elsewhere(*args: Any) -> NoReturn:
    _check_devices(_BACKWARD_NAMES, args)
    raise NotImplementedError(
        f"query: this build computes on {cuda.computes_on()}, got device {args[1].device}"
    )


REFUSED_DEVICES = tuple(kind for kind in ("cuda", "mps", "xpu") if kind not in cuda.DEVICE_TYPES)

for _name, _run, _fake, _elsewhere in (
    ("sinklora::sf_attention", _forward, _forward_fake, _forward_elsewhere),
    ("sinklora::sf_attention_backward", _backward, _backward_fake, _backward_elsewhere),
):
    torch.library.impl(_name, cuda.DEVICE_TYPES, _run)
    torch.library.impl(_name, REFUSED_DEVICES, _elsewhere)
    torch.library.register_fake(_name, _fake)

_forward_op = torch.ops.sinklora.sf_attention.default
_backward_op = torch.ops.sinklora.sf_attention_backward.default


# ---- the gradient ----


class _SFAttention(torch.autograd.Function):
    """Saves every tensor with save_for_backward: activation checkpointing works by hooks on exactly those."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output, lse = _forward_op(*args)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*args[:3], output, lse, *args[4:])
        ctx.settings = args[3]
        ctx.num_args = len(args)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            query, key, value, output, lse, *sequences = ctx.saved_tensors
            grads = _backward_op(grad_outputs[0], query, key, value, output, lse, ctx.settings, *sequences)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _FirstOrderOnly.apply(*(grad.requires_grad_() for grad in grads))
        return (*grads, *(None,) * (ctx.num_args - 3))


class _FirstOrderOnly(torch.autograd.Function):
    """Where a caller keeps the gradients' graph (create_graph=True), using it must not give silent zeros."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        raise RuntimeError(
            "sf_attention: its gradients cannot be differentiated again, got a second backward"
        )
