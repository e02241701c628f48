"""How many entries an H2O cache keeps: what may be asked for, and what it comes to for a prompt.

SPEC.md, section 2, "Budget". The cache and the simulation that tests it both count here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from fractions import Fraction

# More entries than this are refused, so that every sum of a row's counts fits the kernels' int32.
MAX_ENTRIES = 2**29


@dataclasses.dataclass(frozen=True)
class Budget:
    """Entries that each key/value head keeps: ``heavy`` + ``recent`` + ``num_sink_tokens``.

    Args:
        heavy: entries kept for their score: an integer from 0, or a fraction, a float in (0, 1], of the
            prompt's tokens, rounded down. 1 is one entry, 1.0 as many as the prompt has tokens.
        recent: newest entries, never evicted: an integer from 1, or a fraction as above, of which at least 1
            comes.
        num_sink_tokens: first tokens of the sequence, never evicted; on top of the others; from 0.

    Raises:
        TypeError: not a number, or a bool. ValueError: out of range, NaN, or above 2**29.
    """

    heavy: int | float
    recent: int | float
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "heavy", _entries_or_fraction("heavy", self.heavy))
        put(self, "recent", _entries_or_fraction("recent", self.recent))
        if self.recent == 0:
            raise ValueError(
                "recent: expected at least 1 entry, got 0: without a window of recent tokens a new token has "
                "no score yet, would be evicted at once, and the kept set would never change again"
            )
        sinks = self.num_sink_tokens
        if isinstance(sinks, bool) or not isinstance(sinks, numbers.Integral):
            raise TypeError(f"num_sink_tokens: expected an integer, got {type(sinks)!r}")
        put(self, "num_sink_tokens", _entries("num_sink_tokens", operator.index(sinks)))

    def entries(self, num_prompt_tokens: int) -> tuple[int, int, int]:
        """heavy, recent and sinks as counts, for a row with that many kept tokens in its prompts.

        A prompt is any forward of more than one token: chunks of it and the turns of a chat add up, single
        steps do not.
        """
        heavy, recent = (
            _share(part, num_prompt_tokens) if isinstance(part, float) else part
            for part in (self.heavy, self.recent)
        )
        return heavy, max(1, recent), self.num_sink_tokens


def _entries_or_fraction(name: str, value: object) -> int | float:
    """value as an int >= 0 or a float in (0, 1]; TypeError or ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected an integer or a float, got {type(value)!r}")
    if isinstance(value, numbers.Integral):
        return _entries(name, operator.index(value))
    fraction = float(value)
    if not 0 < fraction <= 1:  # NaN too
        hint = "; an integer counts entries" if fraction > 1 else ""
        raise ValueError(f"{name}: expected a fraction in (0, 1] or an integer, got {fraction}{hint}")
    return fraction


def _entries(name: str, number: int) -> int:
    if not 0 <= number <= MAX_ENTRIES:
        raise ValueError(f"{name}: expected an integer from 0 to {MAX_ENTRIES}, got {number}")
    return number


def _share(fraction: float, num_tokens: int) -> int:
    return math.floor(_exact(fraction) * num_tokens)


@functools.lru_cache(maxsize=256)
def _exact(fraction: float) -> Fraction:
    """0.29 is a little less than 29/100 in binary; rounding that down would give 28 of 100 tokens."""
    return Fraction(fraction).limit_denominator(1_000_000) or Fraction(fraction)
