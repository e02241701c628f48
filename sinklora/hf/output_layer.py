"""Losses from the hidden states before a model's output layer, a few tokens at a time.

Logits are the largest tensor of a long row: 32768 tokens of a vocabulary of 128256 are 17 GB in float32, and
a loss over them holds three such tensors. Here the output layer is asked for a chunk of tokens, its loss is
taken, and the logits are dropped before the next chunk.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .settings import base_model

CHUNK_TOKENS = 1024
IGNORED = -100  # transformers' label of a token that is not scored
# Below this share of scored tokens it pays to take their hidden states out first.
_WORTH_GATHERING = 0.75
# Model -> the constant that it multiplies its logits by, or the reason why it cannot be asked in chunks.
_known: weakref.WeakKeyDictionary[torch.nn.Module, float | str] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def head_forward(head: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The output layer runs `forward` instead of its own, hooks and wrappers around it as ever."""
    before, own = head.forward, "forward" in head.__dict__
    head.forward = forward
    try:
        yield
    finally:
        head.forward = before
        if not own and not torch.compiler.is_compiling():  # torch.compile cannot trace deleting it
            del head.forward


class Hidden:
    """Stands in for the output layer: keeps what the layer was given, and returns logits of no vocabulary."""

    def __init__(self) -> None:
        self.states: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        self.states = states
        return states.new_empty((*states.shape[:-1], 0))


def sum_of_chunks(
    forward: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Sum of the negative log-likelihoods of `targets`, in nats: float32, differentiable.

    No more than chunk_tokens x vocabulary logits exist at a time: the backward computes each chunk's again.

    Args:
        forward: the output layer's own; to be called inside a call of the layer as a module, so that hooks
            which fetch its weights (FSDP2, DeepSpeed) have acted.
        hidden: (..., D), what the layer is given.
        targets: int64 (...), the token to be predicted from each; ignore_index where none is.
        scale: the logits are multiplied by it.
    """
    states, wanted = _scored_only(hidden, targets, ignore_index)

    def loss_of(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
        logits = _scaled(forward(chunk), scale)
        return functional.cross_entropy(logits, chunk_targets, ignore_index=ignore_index, reduction="sum")

    total = states.new_zeros((), dtype=torch.float32)
    # Without a scored token one chunk of none: gradients of zero must reach every weight.
    for begin in range(0, max(len(states), 1), chunk_tokens):
        part = states[begin : begin + chunk_tokens], wanted[begin : begin + chunk_tokens]
        if torch.is_grad_enabled():
            total = total + checkpoint(loss_of, *part, use_reentrant=False)
        else:
            total = total + loss_of(*part)
    return total


@torch.no_grad()
def token_losses(
    model: torch.nn.Module, targets: Tensor, *, chunk_tokens: int = CHUNK_TOKENS, **inputs: Any
) -> Tensor:
    """Negative log-likelihood in nats of each target, as model(**inputs) predicts it, without full logits:
    float32, of targets' shape, 0 where a target is -100.

    Args:
        model: a causal language model of transformers or a wrapper of one. One that changes its logits so
            that they cannot be asked for in chunks computes full logits.
        targets: int64 (B, N), the token that follows each token of input_ids; -100 where it is not wanted,
            which costs nothing.
        chunk_tokens: tokens whose logits exist at a time.
        inputs: of the model's forward, without labels.
    """
    try:
        scale = logits_scale(model)
    except (NotImplementedError, TypeError):  # TypeError: no model of transformers'
        logits = model(**inputs).logits.float().transpose(1, 2)
        return functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    head, hidden = base_model(model).get_output_embeddings(), Hidden()
    original = head.forward
    with head_forward(head, hidden):
        model(**inputs)
    assert hidden.states is not None
    targets = targets.to(hidden.states.device)
    states, wanted = _scored_only(hidden.states, targets, IGNORED)

    def losses_of_all(states: Tensor) -> Tensor:
        losses = states.new_empty(len(states), dtype=torch.float32)
        for begin in range(0, len(states), chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logits = _scaled(original(states[part]), scale)
            losses[part] = functional.cross_entropy(logits, wanted[part], reduction="none")
        return losses

    with head_forward(head, losses_of_all):
        losses: Tensor = head(states)
    if len(losses) == targets.numel():
        return losses.view(targets.shape)
    return losses.new_zeros(targets.shape).masked_scatter_(targets != IGNORED, losses)


def _scaled(logits: Tensor, scale: float) -> Tensor:
    return (logits if scale == 1.0 else logits * scale).float()


def _scored_only(hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Hidden states (T, D) and targets (T,), without the tokens that are not scored where leaving them out is
    worth a copy of the others."""
    states, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode((states, wanted)) is not None:
        return states, wanted  # how many they are is not known
    kept = (wanted != ignore_index).nonzero().squeeze(1)
    if len(kept) > _WORTH_GATHERING * len(wanted):
        return states, wanted
    return states[kept], wanted[kept]


def logits_scale(model: torch.nn.Module) -> float:
    """The constant by which a causal language model multiplies its output layer's logits; mostly 1.

    Found by giving the model made-up logits and looking at what becomes of them (Cohere and Granite scale,
    Gemma 2 caps); a model is asked once, on four tokens.

    Raises:
        NotImplementedError: a model that does something else to its logits, so that they cannot be asked for
            in chunks; the message says what was found.
    """
    base = base_model(model)
    if base not in _known:
        try:
            _known[base] = _measured_scale(base)
        except NotImplementedError as error:
            _known[base] = str(error)
    found = _known[base]
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found


def _measured_scale(base: Any) -> float:
    kind = type(base).__name__
    head = base.get_output_embeddings()
    if head is None:
        raise NotImplementedError(f"{kind} has no output layer of its own")
    given: list[Tensor] = []

    def made_up(states: Tensor) -> Tensor:
        vocabulary = base.config.get_text_config().vocab_size
        logits = torch.linspace(-1000.0, 1000.0, vocabulary, device=states.device)
        given.append(logits.expand(*states.shape[:-1], vocabulary).clone())
        return given[-1]

    try:
        with quiet_eval(base), head_forward(head, made_up):
            seen = base(input_ids=sample_tokens(base), use_cache=False).logits
    except Exception as error:
        raise NotImplementedError(f"{kind} does not run on a few tokens ({error})") from error
    if len(given) != 1 or seen.shape != given[0].shape:
        raise NotImplementedError(f"{kind} does not take its logits from one call of its output layer")
    before, after = given[0].double(), seen.double()
    scale = float((before * after).sum() / (before * before).sum())
    if not scale or not torch.allclose(after, scale * before, rtol=1e-4, atol=1e-3 * abs(scale)):
        raise NotImplementedError(f"{kind} changes its logits after the output layer, as soft-capping does")
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def sample_tokens(base: Any) -> Tensor:
    """Four tokens to try a model on: int64 (1, 4)."""
    vocabulary = base.config.get_text_config().vocab_size
    device = base.get_input_embeddings().weight.device
    return torch.arange(1, 5, device=device)[None].remainder(vocabulary)


@contextlib.contextmanager
def quiet_eval(base: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode that it was in.

    A model whose weights have several dtypes (frozen ones in bfloat16, trained ones in float32) runs only
    under autocast, so it gets it.
    """
    modes = [(module, module.training) for module in base.modules()]
    dtype = lowest_dtype(base)
    device = next(base.parameters()).device.type
    mixed = dtype != torch.float32 and any(weight.dtype == torch.float32 for weight in base.parameters())
    base.eval()
    try:
        with torch.no_grad(), torch.autocast(device, dtype) if mixed else contextlib.nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def lowest_dtype(base: torch.nn.Module) -> torch.dtype:
    """The least precise dtype among a model's weights: the one that it computes in."""
    dtypes = {parameter.dtype for parameter in base.parameters()}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)
