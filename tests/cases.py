"""The shape classes that every kernel is tested on, and random inputs for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinklora import _C, SFPattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


def each_level() -> Iterator[str]:
    """Selects every instruction set that this CPU has in turn, and goes back to the one before."""
    before = _C.cpu_level()
    try:
        for level in _C.cpu_levels():
            _C.select_cpu_level(level)
            yield level
    finally:
        _C.select_cpu_level(before)


@dataclass(frozen=True)
class Case:
    """One call: sizes, pattern, and further keyword arguments of the operator."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    pattern: SFPattern
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        group_size, shift, sinks, fraction, causal = self.pattern.settings
        sizes = f"B{self.batch}-H{self.heads}_{self.kv_heads}-N{self.tokens}-D{self.dim}"
        options = "".join(f"-{name}" for name in self.options)
        return f"{sizes}-G{group_size}-shift{shift}-s{sinks}-f{fraction}{'' if causal else '-full'}{options}"

    def inputs(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        q = (self.batch, self.heads, self.tokens, self.dim)
        k = (self.batch, self.kv_heads, self.tokens, self.dim)
        return Inputs(*(torch.randn(shape, generator=generator).to(dtype) for shape in (q, k, k, q)))


def case(
    sizes: tuple[int, int, int, int, int],
    group_size: int,
    sinks: int = 4,
    fraction: float = 0.25,
    shift: int | None = None,
    causal: bool = True,
    **options: Any,
) -> Case:
    """sizes: batch, heads, key/value heads, tokens, head_dim."""
    return Case(*sizes, SFPattern(group_size, sinks, fraction, shift, causal), options)


SHAPES = (
    # Nothing, one token, odd numbers of tokens, groups of one and groups beyond the sequence.
    case((0, 4, 4, 9, 16), 4),
    case((2, 4, 2, 0, 16), 4),
    case((1, 4, 4, 1, 8), 1),
    case((1, 4, 4, 1, 64), 2048),
    case((2, 4, 4, 7, 8), 1, sinks=0),
    case((4, 4, 4, 7, 16), 3, sinks=1, fraction=0.5),
    case((1, 4, 4, 63, 64), 1000),
    case((1, 4, 4, 65, 64), 16, sinks=0),
    case((1, 2, 2, 257, 64), 64, fraction=0.5),
    case((1, 2, 1, 257, 32), 1000, fraction=0.5),
    # Heads that share keys; how many heads are shifted.
    case((1, 4, 2, 65, 40), 20),
    case((1, 8, 2, 63, 16), 16, fraction=0.5),
    case((2, 8, 1, 65, 16), 32, fraction=1.0),
    case((1, 3, 3, 33, 24), 8, fraction=0.0),
    case((1, 3, 1, 65, 8), 17, sinks=1),
    # Head sizes.
    case((1, 4, 4, 40, 72), 16),
    case((1, 4, 2, 40, 80), 16),
    case((1, 4, 2, 65, 96), 24),
    case((1, 4, 1, 65, 128), 32),
    case((1, 2, 2, 40, 256), 16, fraction=0.5),
    case((1, 4, 4, 50, 104), 16),
    # Shifts, also those that mean none.
    case((1, 2, 2, 65, 16), 16, fraction=0.5, shift=1),
    case((1, 2, 2, 65, 16), 16, fraction=0.5, shift=15),
    case((1, 2, 2, 65, 16), 16, fraction=0.5, shift=0),
    case((1, 2, 2, 65, 16), 16, fraction=0.5, shift=16),
    case((1, 2, 2, 130, 16), 100, fraction=0.5, shift=77),
    # Sinks: as many as a group, more, more than one key tile, all tokens and beyond.
    case((1, 2, 2, 130, 16), 20, sinks=20, fraction=0.5),
    case((1, 2, 2, 130, 16), 20, sinks=65, fraction=0.5),
    case((1, 2, 2, 130, 16), 16, sinks=100, fraction=0.5),
    case((1, 2, 2, 65, 16), 16, sinks=65, fraction=0.5),
    case((1, 2, 2, 65, 16), 16, sinks=1000, fraction=0.5),
    # Both ways.
    case((1, 4, 2, 65, 16), 16, causal=False),
    case((1, 2, 2, 130, 40), 32, sinks=0, fraction=0.5, causal=False),
    case((1, 2, 1, 130, 16), 20, sinks=65, fraction=0.5, causal=False),
    case((4, 2, 2, 63, 16), 1, sinks=1, fraction=0.5, causal=False),
    case((1, 2, 2, 33, 16), 8, sinks=1000, fraction=0.5, causal=False),
    case((2, 4, 4, 65, 32), 1000, causal=False),
    # Scales.
    case((1, 4, 4, 65, 16), 16, scale=1.0),
    case((1, 4, 4, 65, 16), 16, scale=-0.5),
    # Several key tiles in one group, and sinks beside them.
    case((1, 2, 1, 900, 16), 800, sinks=70, fraction=0.5),
)
