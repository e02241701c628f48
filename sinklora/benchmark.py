"""A short table of attention times on this machine: SF-Attn, full attention by SDPA, and LongLoRA's S2 form
over SDPA."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .ops import sf_attention
from .pattern import SFPattern
from .torch_s2 import s2_over_sdpa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """One shape: query (batch, heads, tokens, head_dim), key and value (batch, kv_heads, tokens,
    head_dim)."""

    tokens: int = 4096
    group_size: int = 1024
    num_sink_tokens: int = 4
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    rounds: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "group_size", "batch", "heads", "kv_heads", "head_dim", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.tokens % self.group_size:
            raise ValueError(
                f"tokens: the S2 form needs a multiple of group_size = {self.group_size}, got {self.tokens}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: expected a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median milliseconds of a forward without gradients, and of a forward with a backward."""

    name: str
    forward_ms: float
    training_ms: float


def run(settings: BenchmarkSettings, on_round: Callable[[int], None] | None = None) -> list[Timing]:
    """Times every attention once a round, in turn, so that a slow moment of the machine hits all; medians.

    Args:
        on_round: called with 1 after each round (for a progress bar); a first round that is not counted warms
            up.
    """
    pattern = SFPattern(group_size=settings.group_size, num_sink_tokens=settings.num_sink_tokens)
    grouped = settings.heads != settings.kv_heads
    attentions: dict[str, Attention] = {
        "SF-Attn (sinklora)": lambda q, k, v: sf_attention(q, k, v, pattern),
        "S2-Attn over SDPA": lambda q, k, v: s2_over_sdpa(q, k, v, settings.group_size),
        "full attention, SDPA": lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=grouped),
    }
    query, key, value, grad = _inputs(settings)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in attentions}
    for _ in range(settings.rounds + 1):
        for name, attention in attentions.items():
            seconds[name][0].append(_time_forward(attention, query, key, value))
            seconds[name][1].append(_time_training(attention, query, key, value, grad))
        if on_round is not None:
            on_round(1)
    return [
        Timing(name, 1e3 * statistics.median(forward[1:]), 1e3 * statistics.median(training[1:]))
        for name, (forward, training) in seconds.items()
    ]


def _inputs(settings: BenchmarkSettings) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)

    def normal(heads: int) -> torch.Tensor:
        shape = (settings.batch, heads, settings.tokens, settings.head_dim)
        return torch.randn(shape, generator=generator).to(DTYPES[settings.dtype])

    heads, kv_heads = settings.heads, settings.kv_heads
    return [normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)]


@torch.no_grad()
def _time_forward(attention: Attention, *tensors: torch.Tensor) -> float:
    begun = time.perf_counter()
    attention(*tensors)
    return time.perf_counter() - begun


def _time_training(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor
) -> float:
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    begun = time.perf_counter()
    torch.autograd.grad(attention(*leaves), leaves, grad)
    return time.perf_counter() - begun
