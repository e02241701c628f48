"""The demo's section on caches: what a smaller cache costs, and a text far longer than the trained length.

Everything here is what a user of `model.generate` would write, with the text given instead of sampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..cache.h2o_cache import H2OCache
from ..evaluation.continuation import continuation_losses
from .cache_report import METHODS, CacheResults, CacheRow
from .settings import DemoSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = (1.0, 0.5, 0.2, 0.1, 0.05)
SINKS = 4
# Of the long texts so many tokens are read in each forward.
CHUNK = 128
TIMELINE_BUDGET = 0.2

Advance = Callable[[int], None]


def make_cache(method: str, config: Any, entries: int) -> H2OCache:
    """An empty cache that keeps `entries` tokens, at least SINKS + 2, by one of METHODS."""
    if method == "H2O":
        return H2OCache(config, heavy=entries // 2, recent=entries - entries // 2)
    if method == "recent only":
        return H2OCache(config, heavy=0, recent=entries)
    streaming: H2OCache = H2OCache.streaming(config, sinks=SINKS, recent=entries - SINKS)
    return streaming


def compare_caches(
    model: Any, texts: torch.Tensor, streams: torch.Tensor, settings: DemoSettings, advance: Advance
) -> CacheResults:
    """Perplexity and speed at each budget, and perplexity over long texts.

    Args:
        model: patched by sinklora.
        texts: int64 (F, context), continued together.
        streams: int64 (S, T), far longer than the context, read together.
        advance: called with the tokens computed; forward_tokens() of them in all.
    """
    length = texts.shape[1]
    continuation = min(settings.continuation_tokens, length // 2)
    prompt = length - continuation
    results = CacheResults(prompt, continuation, len(texts))
    for budget in BUDGETS:
        entries = max(SINKS + 2, int(budget * length))
        for method in METHODS:
            cache = make_cache(method, model.config, entries)
            losses, seconds = continuation_losses(model, texts, prompt, cache, on_tokens=advance)
            speed = losses[:, 1:].numel() / seconds
            perplexity = math.exp(losses.double().mean())
            results.rows.append(CacheRow(method, budget, entries, perplexity, speed, cache.memory_bytes()))
    chunk = min(CHUNK, settings.context // 2)
    for name, make in STREAMS.items():
        cache = make(model.config, settings.context)
        losses, _ = continuation_losses(model, streams, chunk, cache, chunk=chunk, on_tokens=advance)
        results.streams[name] = stretches(losses, chunk, settings.context)
    return results


def forward_tokens(texts: torch.Tensor, streams: torch.Tensor) -> int:
    """All tokens that compare_caches computes."""
    by_budget = len(BUDGETS) * len(METHODS) * (texts.numel() - len(texts))
    by_stream = len(STREAMS) * (streams.numel() - len(streams))
    return by_budget + by_stream


# Name in the results -> a cache for a model that was trained at `context` tokens. Those that evict leave room
# for a chunk: ranks then stay below the trained length.
STREAMS: dict[str, Callable[[Any, int], Any]] = {
    "plain cache": lambda config, context: DynamicCache(config=config),
    "StreamingLLM": lambda config, context: H2OCache.streaming(
        config, sinks=SINKS, recent=max(1, context // 2 - SINKS)
    ),
    "H2O, positions by rank": lambda config, context: H2OCache(
        config,
        heavy=max(0, context // 4 - SINKS),
        recent=max(1, context // 4),
        num_sink_tokens=SINKS,
        positions="cache",
    ),
}


def stretches(losses: torch.Tensor, prompt: int, length: int) -> dict[int, float]:
    """Perplexity of each stretch of `length` tokens, by the tokens read at its end.

    The prompt is missing from the first one; of what is left at the end there is none.

    Args:
        losses: float32 (S, T), of the tokens behind a prompt of less than `length`.
    """
    ends = range(length, prompt + losses.shape[1] + 1, length)
    begins = [0, *(end - prompt for end in ends)]
    return {
        prompt + end: math.exp(losses[:, begin:end].double().mean())
        for begin, end in itertools.pairwise(begins)
    }


@torch.no_grad()
def draw_kept(model: Any, text: torch.Tensor) -> Figure:
    """What the first layer's cache kept of a text and when: half of it read at once, the rest token by token.

    Args:
        text: int64 (1, T).
    """
    length = text.shape[1]
    entries = max(SINKS + 2, int(TIMELINE_BUDGET * length))
    cache = H2OCache(model.config, heavy=entries // 2, recent=entries - entries // 2, record=True)
    begins = [0, *range(length // 2, length)]
    for begin, end in itertools.pairwise([*begins, length]):
        model(input_ids=text[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache.plot(0)
