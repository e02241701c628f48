"""What a budget accepts, and what it comes to."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from sinklora.budget import MAX_ENTRIES, Budget


@pytest.mark.parametrize(
    ("budget", "tokens", "expected"),
    [
        (Budget(4, 2), 0, (4, 2, 0)),
        (Budget(4, 2, 3), 1000, (4, 2, 3)),
        (Budget(0, 1), 10, (0, 1, 0)),
        (Budget(0.1, 0.1), 100, (10, 10, 0)),
        (Budget(0.1, 0.1, 4), 109, (10, 10, 4)),  # sinks come on top
        (Budget(0.1, 0.1), 9, (0, 1, 0)),  # rounded down; recent is at least 1
        (Budget(0.5, 0.5), 0, (0, 1, 0)),
        (Budget(1, 1), 50, (1, 1, 0)),  # one entry
        (Budget(1.0, 1.0), 50, (50, 50, 0)),  # every token
        (Budget(0.5, 3), 11, (5, 3, 0)),
        (Budget(3, 0.5), 11, (3, 5, 0)),
        (Budget(1e-9, 1e-9), 10**6, (0, 1, 0)),
        (Budget(1e-9, 1e-9), 2 * 10**9, (2, 2, 0)),
        (Budget(MAX_ENTRIES, MAX_ENTRIES, MAX_ENTRIES), 7, (MAX_ENTRIES,) * 3),
    ],
)
def test_entries(budget: Budget, tokens: int, expected: tuple[int, int, int]) -> None:
    assert budget.entries(tokens) == expected


def test_fractions_are_the_decimals_that_were_written() -> None:
    """In binary 0.29 * 100 is 28.999999999999996."""
    for hundredths in range(1, 101):
        for tokens in (100, 700, 4100):
            heavy, _, _ = Budget(hundredths / 100, 1).entries(tokens)
            assert heavy == hundredths * tokens // 100
    assert Budget(1 / 3, 2 / 3).entries(3) == (1, 2, 0)


def test_a_budget_is_a_value() -> None:
    numbers: list[Any] = [np.int64(4), np.float32(0.5), np.int32(2)]
    budget = Budget(*numbers)
    assert budget == Budget(4, 0.5, 2)
    assert [type(x) for x in dataclasses.astuple(budget)] == [int, float, int]
    numbers[0] = Fraction(1, 4)
    assert Budget(*numbers).heavy == 0.25
    assert hash(budget) == hash(Budget(4, 0.5, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.heavy = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((4, 0), "recent: expected at least 1 entry, got 0: without a window"),
        ((4, 0.0), r"recent: expected a fraction in \(0, 1\] or an integer, got 0.0"),
        ((0.0, 4), r"heavy: expected a fraction in \(0, 1\] or an integer, got 0.0"),
        ((-1, 4), "heavy: expected an integer from 0 to 536870912, got -1"),
        ((-0.5, 4), "heavy: expected a fraction"),
        ((4, -1), "recent: expected an integer from 0"),
        ((math.nan, 4), "heavy: expected a fraction .* got nan"),
        ((4, math.nan), "recent: expected a fraction"),
        ((4, math.inf), "recent: expected a fraction"),
        ((1.5, 4), "heavy: expected a fraction .* got 1.5; an integer counts entries"),
        ((2.0, 4), "heavy: expected a fraction .* got 2.0; an integer counts entries"),
        ((4, 4, -1), "num_sink_tokens: expected an integer from 0"),
        ((MAX_ENTRIES + 1, 4), "heavy: expected an integer from 0 to 536870912"),
    ],
)
def test_refuses_values(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(*settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((True, 4), "heavy: expected an integer or a float, got <class 'bool'>"),
        ((4, "4"), "recent: expected an integer or a float, got <class 'str'>"),
        ((None, 4), "heavy: expected"),
        ((1j, 4), "heavy: expected"),
        ((4, 4, 1.0), "num_sink_tokens: expected an integer, got <class 'float'>"),
        ((4, 4, False), "num_sink_tokens: expected an integer, got <class 'bool'>"),
    ],
)
def test_refuses_kinds(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Budget(*settings)
