"""Perplexity of whole files with a sliding window, and what is computed from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ..hf.output_layer import IGNORED, token_losses


class Window(NamedTuple):
    """Tokens [begin, end) of a file; the tokens from first_target on are predicted from what precedes them
    here."""

    file: int
    begin: int
    end: int
    first_target: int


def windows(lengths: Sequence[int], window: int, stride: int) -> list[Window]:
    """Windows that predict every token of every file but its first once, each from as much text as the stride
    leaves.

    A token that is far enough from its file's start sees from window - stride to window - 1 tokens before it;
    a token near the start sees all there is.

    Args:
        lengths: tokens of each file.
        window: most tokens the model sees at once, at least 2.
        stride: tokens that each window moves on, from 1 to window - 1.
    """
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    if not 1 <= stride < window:
        raise ValueError(f"stride: expected from 1 to window - 1 = {window - 1}, got {stride}")
    found = []
    for file, length in enumerate(lengths):
        end = min(window, length)
        if end > 1:
            found.append(Window(file, 0, end, 1))
        while end < length:
            first_target, end = end, min(end + stride, length)
            found.append(Window(file, end - window, end, first_target))
    return found


@torch.no_grad()
def file_losses(
    model: Any,
    files: Sequence[torch.Tensor],
    window: int,
    stride: int,
    *,
    tokens_per_batch: int = 8192,
    on_tokens: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """Negative log-likelihood in nats of every token but the first: float32 (T - 1,) for each int64 (T,)
    file.

    The model is a causal language model of transformers; it runs in eval mode and is left in the mode it was
    in. With a model that sinklora patched that means exact full attention. Logits exist for a chunk of tokens
    at a time, and only for those that a window is the first to predict.

    Args:
        tokens_per_batch: windows of one length are computed together, up to so many tokens.
        on_tokens: called with the number of computed tokens after each batch (for a progress bar).
    """
    losses = [torch.zeros(max(len(file) - 1, 0)) for file in files]
    todo = sorted(windows([len(file) for file in files], window, stride), key=lambda w: w.end - w.begin)
    was_training = model.training
    model.eval()
    try:
        for length, group in itertools.groupby(todo, key=lambda w: w.end - w.begin):
            for batch in batches(list(group), max(1, tokens_per_batch // length)):
                _score(model, files, batch, losses)
                if on_tokens is not None:
                    on_tokens(length * len(batch))
    finally:
        model.train(was_training)
    return losses


def batches(items: list[Window], size: int) -> list[list[Window]]:
    """The items in order, up to `size` together."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _score(
    model: Any, files: Sequence[torch.Tensor], batch: Sequence[Window], losses: list[torch.Tensor]
) -> None:
    tokens = torch.stack([files[w.file][w.begin : w.end] for w in batch]).to(model.device)
    targets = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    for w, row in zip(batch, targets, strict=True):
        row[: w.first_target - w.begin - 1] = IGNORED  # an earlier window's
    nll = token_losses(model, targets, input_ids=tokens, use_cache=False).cpu()
    for w, row in zip(batch, nll, strict=True):
        losses[w.file][w.first_target - 1 : w.end - 1] = row[w.first_target - w.begin - 1 : -1]


def mean_loss(losses: Sequence[torch.Tensor]) -> float:
    """Nats per token over all files."""
    return float(torch.cat(list(losses)).double().mean())


def perplexity(losses: Sequence[torch.Tensor]) -> float:
    return math.exp(mean_loss(losses))


def bootstrap_interval(
    losses: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    *,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the difference in nats per token, losses minus reference, by resampling files.

    Files, not tokens, are drawn with replacement: tokens of one file are not independent. The same files are
    drawn on both sides, so what makes a file hard for both cancels out.
    """
    difference = [float((a - b).double().sum()) for a, b in zip(losses, reference, strict=True)]
    return resampled_interval(
        difference, [len(a) for a in losses], level=level, num_samples=num_samples, seed=seed
    )


def resampled_interval(
    sums: Sequence[float],
    tokens: Sequence[int],
    *,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of sum(sums) / sum(tokens) over files that are drawn with replacement.

    Args:
        sums: of each file, nats or differences of nats. tokens: of each file.
    """
    numbers, counts = np.array(sums, dtype=np.float64), np.array(tokens, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(counts), size=(num_samples, len(counts)))
    means = numbers[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def improvement_share(before: float, full: float, this: float) -> float | None:
    """Share of full attention's improvement in perplexity over `before` that `this` reaches; 1 is all of it.

    None where full attention does not improve: a share of nothing means nothing.
    """
    return (before - this) / (before - full) if full < before else None
