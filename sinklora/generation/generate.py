"""Continues tokens over a cache: the prompt read piece by piece, then transformers' generate.

Used by `sinklora generate` and by each turn of `sinklora chat`, whose cache lives on from turn to turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from ..cache.h2o_cache import H2OCache
from .settings import Sampling
from .streaming import Interrupt, StopWhenInterrupted, TokenSink, TokenText


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What came: tokens without the end token; ended: the model wrote one; interrupted: Ctrl-C.

    read: tokens of the prompt that were fed. seconds to the first token, and from it to the last.
    """

    tokens: list[int]
    ended: bool
    interrupted: bool
    read: int
    read_seconds: float
    decode_seconds: float

    def speeds(self) -> str:
        reading = f"read {self.read} tokens at {_rate(self.read, self.read_seconds)} tokens/s"
        steps = len(self.tokens) + self.ended - 1
        if steps < 1 or self.decode_seconds <= 0:
            return f"{reading}, wrote {len(self.tokens)}"
        return f"{reading}, wrote {len(self.tokens)} at {_rate(steps, self.decode_seconds)} tokens/s"


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    cache: Cache,
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] = lambda text: None,
    on_read: Callable[[int, int], None] = lambda done, total: None,
    interrupt: Interrupt | None = None,
) -> Continuation:
    """Continues `tokens`, of which the cache may have seen a beginning; only the rest is fed.

    Afterwards the cache has seen the given tokens and the new ones but the last, or, where reading them was
    interrupted, a beginning of the given ones. It can go on from either.

    Args:
        on_text: gets the new text as it comes; never a part of a character.
        on_read: gets (tokens read, tokens to read) after each piece of the prompt.
        interrupt: looked at between forwards.

    Raises:
        ValueError: no token that the cache has not seen.
    """
    interrupt = interrupt or Interrupt()
    seen = int(cache.get_seq_length())
    total = len(tokens) - seen
    if total < 1:
        raise ValueError("prompt: expected some text, got none")
    begun = time.perf_counter()
    ids = torch.tensor([list(tokens)], device=model.device)
    read = _read(model, ids, cache, sampling.chunk, interrupt, lambda done: on_read(done, total))
    if interrupt.requested:
        return Continuation([], False, True, read, time.perf_counter() - begun, 0.0)

    text = TokenText(tokenizer, tokens)
    first: list[float] = []

    def on_token(token: int) -> None:
        if not first:
            first.append(time.perf_counter())
            on_read(total, total)
        if piece := text.push(token):
            on_text(piece)

    generate: Any = model.generate
    ends = end_tokens(model, tokenizer)
    with _nothing_stored(model):
        result = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=sampling.config(ends, tokenizer.pad_token_id),
            stopping_criteria=StoppingCriteriaList([StopWhenInterrupted(interrupt)]),
            streamer=TokenSink(on_token),
        )
    finished = time.perf_counter()
    if piece := text.finish():
        on_text(piece)
    new: list[int] = result[0, len(tokens) :].tolist()
    ended = bool(new) and new[-1] in ends
    interrupted = interrupt.requested and not ended
    return Continuation(
        new[:-1] if ended else new, ended, interrupted, total, first[0] - begun, finished - first[0]
    )


@contextlib.contextmanager
def _nothing_stored(model: PreTrainedModel) -> Iterator[None]:
    """The model's own generation settings do not act inside: generate would complete the given ones from
    them (a stored repetition_penalty, say)."""
    stored = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored


def _read(
    model: Any,
    ids: torch.Tensor,
    cache: Cache,
    chunk: int,
    interrupt: Interrupt,
    on_read: Callable[[int], None],
) -> int:
    """Feeds all but the last piece of what the cache has not seen; generate feeds that. Returns the tokens
    fed."""
    begin = first = int(cache.get_seq_length())
    # The output layer over a whole prompt would cost more memory than the cache.
    last_only = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    on_read(0)
    while ids.shape[1] - begin > chunk and not interrupt.requested:
        with torch.no_grad():
            model(input_ids=ids[:, begin : begin + chunk], past_key_values=cache, use_cache=True, **last_only)
        begin += chunk
        on_read(begin - first)
    return begin - first


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text, by the model's generation settings and by its tokenizer."""
    told: Any = getattr(model.generation_config, "eos_token_id", None)
    found = [*(told if isinstance(told, (list, tuple)) else [told]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


@dataclasses.dataclass(frozen=True)
class CacheFacts:
    """Tokens seen, the most that a head of any layer keeps of them, and the bytes that takes."""

    seen: int
    kept: int
    bytes: int

    def __str__(self) -> str:
        return f"cache {_size(self.bytes)}, {self.kept} of {self.seen} tokens kept"


def cache_facts(cache: Any) -> CacheFacts:
    """What a cache holds. cache: an H2OCache or a DynamicCache."""
    seen = int(cache.get_seq_length())
    if seen == 0:
        return CacheFacts(0, 0, 0)
    layers = range(len(cache.layers))
    if isinstance(cache, H2OCache):
        kept = max(int((cache.kept_positions(layer) >= 0).sum(-1).max()) for layer in layers)
        return CacheFacts(seen, kept, cache.memory_bytes())
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return CacheFacts(
        seen, max(tensor.shape[-2] for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    )


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:,.0f}" if seconds > 0 else "many"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
