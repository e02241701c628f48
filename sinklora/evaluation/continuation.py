"""Perplexity of what follows a prompt, read through a cache as when a model generates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from ..hf.output_layer import IGNORED, token_losses


@torch.no_grad()
def continuation_losses(
    model: Any,
    tokens: torch.Tensor,
    prompt: int,
    cache: Any,
    *,
    chunk: int = 1,
    on_tokens: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, float]:
    """Negative log-likelihood in nats of every token behind a prompt, each from what the cache then holds.

    The prompt is one forward; the tokens behind it are then fed `chunk` at a time, the true ones, whatever
    the model would have said. With chunk=1 that is decoding; longer chunks are faster, and a cache that
    evicts does so after each.

    Args:
        model: a causal language model of transformers; runs in eval mode and is left in the mode it was in.
        tokens: int64 (B, T), rows of one length.
        prompt: tokens of the prompt, from 1 to T - 1.
        cache: an empty cache of transformers for the model; it is filled.
        chunk: tokens of a forward behind the prompt, at least 1.
        on_tokens: called with the number of tokens of each forward (for a progress bar).

    Returns:
        Losses, float32 (B, T - prompt), and the seconds that all forwards but the prompt's took.

    Raises:
        ValueError: tokens that are not (B, T), or a number out of range.
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens: expected shape (B, T), got {tuple(tokens.shape)}")
    rows, length = tokens.shape
    if not 1 <= prompt < length:
        raise ValueError(f"prompt: expected from 1 to T - 1 = {length - 1} tokens, got {prompt}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
    tokens = tokens.to(model.device)
    losses = torch.empty(rows, length - prompt)
    was_training = model.training
    model.eval()
    try:
        # The last token is only ever predicted, and of the prompt's tokens only the last one predicts.
        targets = functional.pad(tokens[:, prompt : prompt + 1], (prompt - 1, 0), value=IGNORED)
        losses[:, :1] = token_losses(
            model, targets, input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True
        )[:, -1:].cpu()
        if on_tokens is not None:
            on_tokens(rows * prompt)
        begun = time.perf_counter()
        for begin in range(prompt, length - 1, chunk):
            end = min(begin + chunk, length - 1)
            targets = tokens[:, begin + 1 : end + 1]
            losses[:, begin + 1 - prompt : end + 1 - prompt] = token_losses(
                model, targets, input_ids=tokens[:, begin:end], past_key_values=cache, use_cache=True
            ).cpu()
            if on_tokens is not None:
                on_tokens(rows * (end - begin))
        seconds = time.perf_counter() - begun
    finally:
        model.train(was_training)
    return losses, seconds
