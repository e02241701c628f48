"""What there is to choose for generation: the cache's budget, and how tokens are drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from ..budget import Budget
from ..cache.h2o_cache import H2OCache
from ..hf.rope import context_of
from ..hf.settings import text_config

Amount = int | float
POSITIONS = ("original", "cache")


def parse_amount(text: object) -> Amount:
    """ "512" is an integer, entries; "0.1" a fraction; the number itself (from a file) is as its text.
    Raises ValueError for anything else."""
    for kind in (int, float):
        try:
            return kind(str(text))
        except ValueError:
            continue
    raise ValueError(f"expected entries or a share of the tokens, such as 512 or 0.1, got {text}")


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """The cache to generate with; H2OCache says what its settings mean.

    full: transformers' DynamicCache instead, which keeps everything; for comparison.

    Raises:
        TypeError, ValueError: a budget that no H2OCache takes, or unknown positions.
    """

    heavy: Amount = 256
    recent: Amount = 256
    num_sink_tokens: int = 4
    positions: str = "original"
    full: bool = False

    def __post_init__(self) -> None:
        Budget(self.heavy, self.recent, self.num_sink_tokens)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions}")

    def make(self, model: PreTrainedModel) -> Cache:
        """An empty cache for a model. Raises H2OCache's errors."""
        config: Any = text_config(model.config)
        if self.full:
            return DynamicCache(config=config)
        bounded: Cache = H2OCache(
            config,
            heavy=self.heavy,
            recent=self.recent,
            num_sink_tokens=self.num_sink_tokens,
            positions=self.positions,
        )
        return bounded

    def fit(self, model: PreTrainedModel, sampling: Sampling) -> Sampling:
        """The sampling with pieces of the prompt so short that positions by rank stay inside the model's
        context.

        Shares of the prompt are not known before it is read: they leave the pieces as they are.
        """
        context = context_of(model.config)
        entries = (self.heavy, self.recent, self.num_sink_tokens)
        if self.full or self.positions != "cache" or context is None:
            return sampling
        if any(isinstance(amount, float) for amount in entries):
            return sampling
        room = int(context - sum(entries))
        return dataclasses.replace(sampling, chunk=max(2, min(sampling.chunk, room)))

    def beyond_context(self, model: PreTrainedModel, seen: int) -> str | None:
        """A warning once a text is longer than the positions that the model was trained on."""
        context = context_of(model.config)
        if context is None or seen <= context or (self.positions == "cache" and not self.full):
            return None
        return (
            f"{seen} tokens are more than the model's context of {context}: what it writes may fall apart "
            "(a bounded cache with --positions cache goes on)"
        )

    def describe(self) -> str:
        if self.full:
            return "everything kept"
        positions = "" if self.positions == "original" else f", positions {self.positions}"
        sinks = self.num_sink_tokens
        return f"heavy {self.heavy}, recent {self.recent}, {sinks} sink{'s'[: sinks != 1]}{positions}"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 takes the likeliest (top_p and seed then change nothing).

    seed: for torch's generator, set by whoever begins; None leaves it as it is.
    chunk: tokens of the prompt read at a time. A bounded cache evicts after each.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None
    chunk: int = 2048

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected from 0 to 2**63 - 1, got {self.seed}")
        if self.chunk < 2:
            raise ValueError(f"chunk: expected at least 2, got {self.chunk}")

    def begin(self) -> None:
        if self.seed is not None:
            torch.manual_seed(self.seed)

    def config(self, end_tokens: Sequence[int], pad_token: int | None) -> GenerationConfig:
        """Everything that generate is to do; nothing comes from a file beside the model unsaid."""
        drawn: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # transformers' own default would also cut to the 50 likeliest.
            drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(end_tokens) or None,
            pad_token_id=pad_token if pad_token is not None else next(iter(end_tokens), 0),
            **drawn,
        )
