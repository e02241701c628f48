"""The attention pattern as a value; what it means is defined once, in csrc/core/pattern.h."""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from . import _C

Settings = tuple[int, int, int, float, bool]


@dataclasses.dataclass(frozen=True)
class SFPattern:
    """Who may see whom in SF-Attn: groups of tokens, some of them shifted, and global sink tokens.

    SinkLoRA (arXiv 2406.05678), Algorithm 1. A query sees the keys of its own group and the first
    ``num_sink_tokens`` of its sequence. The last ``floor(num_heads * shifted_fraction)`` query heads use
    groups that begin ``shift`` tokens later.

    Args:
        group_size: tokens in a group, at least 1.
        num_sink_tokens: tokens at the start of every sequence that every query may see, at least 0.
        shifted_fraction: share of the query heads, from the last, whose groups are shifted; in [0, 1].
        shift: how far those groups are shifted, from 0 to ``group_size``; ``None`` is ``group_size // 2``.
        causal: a query sees no later token. Without it, sink tokens also see everything.

    Raises:
        TypeError: a setting of the wrong kind. ValueError: a setting out of its range.
    """

    group_size: int = 2048
    num_sink_tokens: int = 4
    shifted_fraction: float = 0.25
    shift: int | None = None
    causal: bool = True

    # group_size, shift (never None), num_sink_tokens, shifted_fraction, causal: the order of every kernel
    # call, kept ready because the operator reads it at each. No field: it follows from the fields.
    settings: ClassVar[Settings]

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not _is_traced():
            shift = 0 if self.shift is None else self.shift
            # The C definition's own check: the ranges are written once.
            _C.pattern_pairs(
                0, 0, self.group_size, shift, self.num_sink_tokens, self.shifted_fraction, self.causal
            )
            put(self, "group_size", operator.index(self.group_size))
            put(self, "num_sink_tokens", operator.index(self.num_sink_tokens))
            put(self, "shifted_fraction", float(self.shifted_fraction))
            put(self, "shift", None if self.shift is None else operator.index(self.shift))
        shift = self.group_size // 2 if self.shift is None else self.shift
        settings = (self.group_size, shift, self.num_sink_tokens, self.shifted_fraction, self.causal)
        put(self, "settings", settings)

    @classmethod
    def from_ratio(
        cls,
        num_tokens: int,
        ratio: float = 0.25,
        *,
        num_sink_tokens: int = 4,
        shifted_fraction: float = 0.25,
        causal: bool = True,
    ) -> SFPattern:
        """Groups of ``ratio`` times the context of ``num_tokens``, rounded up, as LongLoRA sizes them.

        Raises:
            ValueError: ``num_tokens`` below 1, or ``ratio`` outside (0, 1]. TypeError: another kind.
        """
        _require_int("num_tokens", num_tokens, 1)
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float, Fraction)):
            raise TypeError(f"ratio: expected a number, got {type(ratio)!r}")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected a number in (0, 1], got {ratio}")
        # 0.07 is a little more than 7/100 in binary; rounding that up would give 8 for 100 tokens.
        exact = Fraction(ratio).limit_denominator(1_000_000) or Fraction(ratio)
        return cls(
            group_size=math.ceil(num_tokens * exact),
            num_sink_tokens=num_sink_tokens,
            shifted_fraction=shifted_fraction,
            causal=causal,
        )

    @classmethod
    def s2(cls, group_size: int, *, causal: bool = True) -> SFPattern:
        """LongLoRA's S2-Attn (arXiv 2309.12307): half of the heads shifted by half a group, no sinks."""
        return cls(group_size=group_size, num_sink_tokens=0, shifted_fraction=0.5, causal=causal)

    def mask(self, num_heads: int, num_tokens: int) -> npt.NDArray[np.bool_]:
        """Bool (num_heads, num_tokens, num_tokens): may query i (axis 1) of a head see key j (axis 2)?"""
        num_heads = _require_int("num_heads", num_heads, 0)
        num_tokens = _require_int("num_tokens", num_tokens, 0)
        mask = np.empty((num_heads, num_tokens, num_tokens), dtype=np.bool_)
        _C.pattern_mask(mask, *self.settings)
        return mask

    def pairs(self, num_heads: int, num_tokens: int) -> int:
        """Number of allowed (query, key) pairs, summed over the heads."""
        return _C.pattern_pairs(num_heads, num_tokens, *self.settings)

    def flops(self, num_heads: int, num_tokens: int, head_dim: int) -> int:
        """FLOPs of one forward over one sequence: 4 * head_dim a pair. A backward is 2.5 times that."""
        return 4 * _require_int("head_dim", head_dim, 0) * self.pairs(num_heads, num_tokens)

    def plot(self, num_heads: int, num_tokens: int, **options: Any) -> Any:
        """Draws the mask with matplotlib (extra "plot"); see ``sinklora.plots.plot_pattern``."""
        from .plots import plot_pattern

        return plot_pattern(self, num_heads, num_tokens, **options)

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """The settings as plain JSON values; ``from_dict`` reads them back."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SFPattern:
        """A pattern from ``to_dict``'s result; absent settings get their defaults.

        Raises:
            ValueError: an unknown name. TypeError: not a mapping.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings: expected a mapping of pattern settings, got {type(settings)!r}")
        unknown = [str(name) for name in settings if name not in _FIELDS]
        if unknown:
            raise ValueError(f"settings: expected names among {', '.join(_FIELDS)}, got {', '.join(unknown)}")
        return cls(**settings)


_FIELDS = tuple(field.name for field in dataclasses.fields(SFPattern))


def _is_traced() -> bool:
    """Is torch.compile tracing? It cannot call C, and numbers may be symbols: the operator checks them."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def _require_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value)!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {number}")
    return number
