"""The cache's float64 definition: an example by hand, and a brute force written another way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from accuracy import assert_close

from sinklora import reference
from sinklora.budget import Budget
from sinklora.reference import H2OSimulation


def feed(simulation: H2OSimulation, queries: list[float], keys: list[float]) -> np.ndarray:
    """A forward of one-dimensional queries and keys, the values being 1, 10, 100, ... by position."""
    values = 10.0 ** np.arange(simulation.seen, simulation.seen + len(keys))
    return simulation.forward(np.reshape(queries, (1, -1, 1)), np.reshape(keys, (-1, 1)), values[:, None])


def test_an_example_by_hand() -> None:
    """Keys 0 weigh 1 each, ln 3 weighs 3, ln 8 weighs 8, against the query 1."""
    simulation = H2OSimulation(heavy=1, recent=1, scale=1.0)
    output = feed(simulation, [1, 1, 1], [0, math.log(3), 0])
    assert_close(output[0, :, 0], [1, (1 + 30) / 4, (1 + 30 + 100) / 5], 1e-12)
    # Scores 1 + 1/4 + 1/5, 3/4 + 3/5, 1/5: the newest stays, and of the rest the larger score.
    assert simulation.positions.tolist() == [0, 2]
    assert_close(simulation.scores, [1.45, 0.2], 1e-12)
    assert simulation.values[:, 0].tolist() == [1, 100]

    # Weights 1, 1, 8 of 10: 1.55 and 0.3 and 0.8. Position 3 is the newest, 0 outweighs 2.
    output = feed(simulation, [1], [math.log(8)])
    assert_close(output[0, 0, 0], (1 + 100 + 8000) / 10, 1e-9)
    assert simulation.positions.tolist() == [0, 3]
    assert_close(simulation.scores, [1.55, 0.8], 1e-12)

    # A query that turns it round: weights 1, 64, 1 of 66. 0.8 + 64/66 outweighs 1.55 + 1/66.
    feed(simulation, [2], [0])
    assert simulation.positions.tolist() == [3, 4]
    assert_close(simulation.scores, [0.8 + 64 / 66, 1 / 66], 1e-12)
    assert simulation.seen == 5


def test_ties_keep_the_older() -> None:
    simulation = H2OSimulation(heavy=2, recent=1, scale=1.0)
    # Each query sees itself alone: every score is 1.
    far = np.eye(6)[None] * 1e4
    simulation.forward(far, far[0], far[0])
    assert simulation.scores.tolist() == [1, 1, 1]
    assert simulation.positions.tolist() == [0, 1, 5]


def test_sinks_come_on_top_and_stay(rng: np.random.Generator) -> None:
    simulation = H2OSimulation(heavy=0, recent=3, num_sink_tokens=2)  # StreamingLLM's cache
    for n in (1, 1, 1, 4, 1, 1):
        simulation.forward(
            rng.standard_normal((2, n, 4)), rng.standard_normal((n, 4)), rng.standard_normal((n, 4))
        )
        expected = [p for p in range(simulation.seen) if p < 2 or p >= simulation.seen - 3]
        assert simulation.positions.tolist() == expected


def test_the_budget_grows_with_prompts_only(rng: np.random.Generator) -> None:
    simulation = H2OSimulation(heavy=0.25, recent=0.25)
    kept = []
    for n in (1, 1, 20, 1, 1, 1, 8, 1):
        simulation.forward(
            rng.standard_normal((1, n, 4)), rng.standard_normal((n, 4)), rng.standard_normal((n, 4))
        )
        kept.append(len(simulation.positions))
    assert kept == [1, 1, 10, 10, 10, 10, 14, 14]


def test_a_full_budget_is_plain_attention(rng: np.random.Generator) -> None:
    query, key, value = (rng.standard_normal((1, heads, 11, 8)) for heads in (3, 1, 1))
    expected, _ = reference.causal_attention(query, key, value)
    simulation = H2OSimulation(heavy=1.0, recent=20)
    for lo, hi in ((0, 4), (4, 5), (5, 6), (6, 11)):
        output = simulation.forward(query[0, :, lo:hi], key[0, 0, lo:hi], value[0, 0, lo:hi])
        assert_close(output, expected[0, :, lo:hi], 1e-12)
    assert simulation.positions.tolist() == list(range(11))
    assert_close(simulation.scores, reference.attention_scores(query, key)[0, 0], 1e-12)


def brute_force(
    budget: Budget, window: int | None, mean: bool, forwards: list[Any]
) -> tuple[dict[int, float], list[list[list[float]]]]:
    """Token by token with dictionaries, sorting the victims instead of the survivors, one at a time."""
    cache: dict[int, tuple[Any, Any]] = {}
    scores: dict[int, float] = {}
    outputs = []
    seen = prompt = 0
    for query, key, value in forwards:
        n = len(key)
        for i in range(n):
            cache[seen + i], scores[seen + i] = (key[i], value[i]), 0.0
        for head in query:
            for i, row in enumerate(head):
                visible = [p for p in cache if p <= seen + i]
                weights = [math.exp(float(row @ cache[p][0]) / math.sqrt(len(row))) for p in visible]
                shares = [w / sum(weights) for w in weights]
                outputs.append(sum(s * cache[p][1] for p, s in zip(visible, shares, strict=True)))
                if n == 1 or window is None or i >= n - window:
                    for p, share in zip(visible, shares, strict=True):
                        scores[p] += share / (len(query) if mean else 1)
        seen += n
        prompt += n if n > 1 else 0
        heavy, recent, sinks = budget.entries(prompt)
        while len(cache) > heavy + recent + sinks:
            newest = sorted(cache)[-recent:]
            victims = [p for p in cache if p >= sinks and p not in newest]
            victim = min(victims, key=lambda p: (scores[p], -p))
            del cache[victim], scores[victim]
    return scores, outputs


@pytest.mark.parametrize(
    ("settings", "window", "reduction"),
    [
        ((3, 2), None, "sum"),
        ((3, 1, 2), 2, "mean"),
        ((0.25, 0.25, 1), None, "mean"),
        ((0, 4, 2), 3, "sum"),
        ((0.5, 1), 1, "sum"),
        ((100, 1), None, "sum"),
    ],
)
def test_equals_a_brute_force(
    rng: np.random.Generator, settings: tuple[Any, ...], window: int | None, reduction: str
) -> None:
    lengths = [9, 1, 1, 1, 5, 1, 2, *[1] * 12]
    forwards = [
        (rng.standard_normal((2, n, 4)), rng.standard_normal((n, 4)), rng.standard_normal((n, 4)))
        for n in lengths
    ]
    expected, outputs = brute_force(Budget(*settings), window, reduction == "mean", forwards)
    simulation = H2OSimulation(*settings, score_window=window, group_reduction=reduction)
    given = [simulation.forward(*forward).reshape(-1, 4) for forward in forwards]
    assert_close(np.concatenate(given), outputs, 1e-12)
    assert simulation.positions.tolist() == sorted(expected)
    assert_close(simulation.scores, [expected[p] for p in sorted(expected)], 1e-12)


def test_refuses(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="recent: expected at least 1"):
        H2OSimulation(1, 0)
    with pytest.raises(ValueError, match="score_window: expected an integer >= 1"):
        H2OSimulation(1, 1, score_window=0)
    with pytest.raises(ValueError, match="group_reduction: expected"):
        H2OSimulation(1, 1, group_reduction="max")
    query, key = rng.standard_normal((2, 3, 4)), rng.standard_normal((3, 4))
    for given in ((query[0], key, key), (query, key[:2], key), (query, key, key[:2]), [query[:, :0]] * 3):
        with pytest.raises(ValueError, match="query, key, value: expected"):
            H2OSimulation(1, 1).forward(*given)
