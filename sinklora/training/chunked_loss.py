"""A causal language model's own loss, computed in chunks: full logits never exist."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from ..hf.output_layer import (
    CHUNK_TOKENS,
    head_forward,
    logits_scale,
    lowest_dtype,
    quiet_eval,
    sample_tokens,
    sum_of_chunks,
)
from ..hf.settings import base_model

logger = logging.getLogger("sinklora")

_HANDLE = "_sinklora_chunked_loss"


class ChunkedLoss:
    """What use_chunked_loss did to a model; undo() takes it back.

    active: False where the model computes its loss through full logits, because it cannot do otherwise or
    after undo().
    """

    def __init__(self, base: Any, chunk_tokens: int) -> None:
        self.base = base
        self.chunk_tokens = chunk_tokens
        self.scale = 1.0
        self.active = False
        # A forward and a loss function of the instance's own, which another library or the user put there.
        self.previous = base.__dict__.get("forward")
        self.own_loss = "_loss_function" in base.__dict__

    def undo(self) -> None:
        """The model computes its loss as before. Does nothing the second time."""
        self.active = False
        if self.base.__dict__.get(_HANDLE) is not self:
            return
        ours = getattr(self.base.__dict__.get("forward"), "__func__", None)
        if getattr(ours, "is_chunked_loss", False):  # else wrapped by another library, and passing through
            if self.previous is None:
                del self.base.forward
            else:
                self.base.forward = self.previous
            delattr(self.base, _HANDLE)
            if not self.own_loss:
                self.base.__dict__.pop("_loss_function", None)


def use_chunked_loss(
    model: torch.nn.Module, chunk_tokens: int = CHUNK_TOKENS, *, check: bool = True
) -> ChunkedLoss:
    """From now on model(labels=...) computes its loss chunk_tokens tokens at a time; its value and gradients
    stay what they were, to rounding, and `outputs.logits` is None.

    Without labels (generating, scoring by logits) nothing changes. Ignored labels (-100) cost nothing. The
    memory of the loss falls from three times tokens x vocabulary to three times chunk_tokens x vocabulary;
    the backward computes the output layer once more.

    Args:
        model: a causal language model of transformers or a wrapper of one (PEFT, torch.compile, DDP). May be
            wrapped and sharded after this, and adapters may be added.
        chunk_tokens: tokens whose logits exist at a time.
        check: compare both losses on four tokens first; needs weights that are there.

    A model that does more to its logits than to scale them (soft-capping), or has a loss of its own, keeps
    its plain loss; a warning says so, and the handle's `active` is False. Calling this again replaces the
    number of tokens.

    Raises:
        TypeError, ValueError: not such a model; chunk_tokens that is no number from 1.
    """
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int):
        raise TypeError(f"chunk_tokens: expected an integer, got {type(chunk_tokens).__name__}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    base = base_model(model)
    standing = base.__dict__.get(_HANDLE)
    if standing is not None:
        standing.undo()
    handle = ChunkedLoss(base, chunk_tokens)
    try:
        handle.scale = logits_scale(base) if check else 1.0
        if base.loss_function is not ForCausalLMLoss:
            raise NotImplementedError(f"{type(base).__name__} has a loss function of its own")
        expected = _plain_loss(base) if check else None
        _install(handle)
        if expected is not None:
            _compare(base, expected)
    except NotImplementedError as error:
        handle.undo()
        logger.warning("the loss needs full logits of every token: %s", error)
    return handle


def _install(handle: ChunkedLoss) -> None:
    base = handle.base
    original = type(base).forward
    position = list(inspect.signature(original).parameters).index("labels") - 1

    @functools.wraps(original)  # Trainer and generate read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # By self, not from outside: a copy of the model has a handle of its own.
        handle: ChunkedLoss = getattr(self, _HANDLE)
        plain = handle.previous or functools.partial(original, self)
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if labels is None or not handle.active or self.loss_function is not ForCausalLMLoss:
            return plain(*args, **kwargs)
        return _scored(handle, plain, args, kwargs, labels)

    forward.is_chunked_loss = True  # type: ignore[attr-defined]
    setattr(base, _HANDLE, handle)
    base.forward = types.MethodType(forward, base)
    handle.active = True


def _scored(handle: ChunkedLoss, plain: Any, args: Any, kwargs: Any, labels: Tensor) -> Any:
    base = handle.base
    # Looked up here: PEFT may have wrapped it since.
    head = base.get_output_embeddings()
    own_forward = head.forward
    ignore_index = kwargs.get("ignore_index", -100)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]

    def loss_of_hidden(states: Tensor) -> Tensor:
        # Inside the only call of the layer: what fetches, frees and reduces its weights around a call and its
        # backward (FSDP2, DeepSpeed) may rely on there being one, also where embedding and norm share it.
        total = sum_of_chunks(
            own_forward,
            states,
            targets,
            scale=handle.scale,
            chunk_tokens=handle.chunk_tokens,
            ignore_index=ignore_index,
        )
        return total + total.new_zeros(1, 1, 1)  # no view: FSDP2 hangs a hook on it

    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Tensor:
        """As transformers' ForCausalLMLoss; logits is the loss, times what the model scales logits by."""
        total = logits.float().sum() / handle.scale
        if num_items_in_batch is None:
            num_items_in_batch = (targets != ignore_index).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    base.loss_function = loss_function
    try:
        with head_forward(head, loss_of_hidden):
            outputs = plain(*args, **kwargs)
    finally:
        base.loss_function = ForCausalLMLoss  # not deleted: torch.compile cannot trace that
    if isinstance(outputs, tuple):
        return outputs
    # Nobody is to take the stand-in for logits.
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})


def _plain_loss(base: Any) -> float:
    tokens = sample_tokens(base)
    with quiet_eval(base):
        return float(base(input_ids=tokens, labels=tokens, use_cache=False).loss)


def _compare(base: Any, expected: float) -> None:
    got = _plain_loss(base)
    tolerance = 1e-4 if lowest_dtype(base) == torch.float32 else 1e-2
    if not abs(got - expected) <= tolerance * max(1.0, abs(expected)):
        raise NotImplementedError(
            f"{type(base).__name__} has a loss of {expected:.6f} on four tokens, and {got:.6f} in chunks"
        )
