"""The kernels as a cache drives them, step by step against the float64 simulation of SPEC section 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_same_bits
from simulation_support import USED, Comparison, OperatorCache, make

from sinklora.budget import Budget

PROMPT_AND_STEPS = [20, *[1] * 60]
CHAT = [17, 1, 1, 1, 9, *[1] * 10, 3, 2, *[1] * 20, 33, *[1] * 20]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "settings",
    [
        (6, 4),
        (1, 1),
        (0, 5),  # a window
        (0, 5, 4),  # StreamingLLM
        (6, 3, 2),
        (0.25, 0.25),
        (0.1, 0.4, 3),
        (5, 0.2),
        (0.2, 1, 1),
        (1.0, 1.0),
        (1000, 1),  # a full budget
    ],
    ids=str,
)
def test_every_kind_of_budget(
    torch_rng: torch.Generator, settings: tuple[Any, ...], window: int | None
) -> None:
    comparison = Comparison(settings, window=window)
    for tokens in CHAT:
        comparison.forward(*make(torch_rng, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_and_dtype(
    torch_rng: torch.Generator, cpu_level: str, dtype: torch.dtype
) -> None:
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    comparison = Comparison((6, 4, 1), atol=atol)
    for tokens in PROMPT_AND_STEPS:
        comparison.forward(*make(torch_rng, tokens, dim=24, dtype=dtype))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_grouped_queries(torch_rng: torch.Generator, group: int, mean: bool) -> None:
    comparison = Comparison((6, 4), mean=mean)
    for tokens in PROMPT_AND_STEPS:
        comparison.forward(*make(torch_rng, tokens, heads=2 * group, batch=2))


def test_hundreds_of_steps(torch_rng: torch.Generator) -> None:
    comparison = Comparison((24, 8, 2))
    for tokens in [100, *[1] * 400]:
        comparison.forward(*make(torch_rng, tokens))
    assert comparison.cache.key.shape[2] == 24 + 8 + 2 + 1


def test_a_cache_may_start_with_single_tokens(torch_rng: torch.Generator) -> None:
    for settings in ((6, 4, 1), (0.5, 0.5)):
        comparison = Comparison(settings)
        for tokens in [*[1] * 20, 5, 1, 1]:
            comparison.forward(*make(torch_rng, tokens))


def test_the_kept_set_moves(torch_rng: torch.Generator) -> None:
    """With one recent entry a new token must be able to stay for its score: published code freezes here."""
    comparison = Comparison((5, 1))
    query, key, value = make(torch_rng, 2, heads=2)
    comparison.forward(query * 0, key, value)  # scores 1.5 and 0.5
    basis = torch.eye(16)[:, None, None, None].expand(16, 1, 2, 1, 16)
    for topic in basis[:5]:  # one token that the next eleven look back to, and to nothing else
        for step in range(12):
            value = torch.randn(topic.shape, generator=torch_rng)
            comparison.forward(topic * 4, topic * (16 if step == 0 else 0), value)
    for row, head in comparison.simulations:
        assert comparison.cache.kept(row, head)[0] == [2, 14, 26, 38, 50, 61]


def test_ties_keep_the_older(torch_rng: torch.Generator) -> None:
    """Keys that only their own query sees score 1 each; a query of zeros then adds the same to all."""
    far = (torch.eye(16) * 64)[None, None]
    value = torch.randn(1, 1, 16, 16, generator=torch_rng)
    comparison = Comparison((4, 3))
    comparison.forward(far[:, :, :10], far[:, :, :10], value[:, :, :10])
    assert comparison.cache.kept(0, 0)[0] == [0, 1, 2, 3, 7, 8, 9]
    for token in range(10, 16):
        one = slice(token, token + 1)
        comparison.forward(far[:, :, one], far[:, :, one], value[:, :, one])
        assert comparison.cache.kept(0, 0)[0] == [0, 1, 2, 3, token - 2, token - 1, token]
    # Equal keys: the older ones have received more, those of equal age in the cache the same.
    comparison.forward(far[:, :, :1] * 0, far[:, :, :1] * 0, value[:, :, :1])
    assert comparison.cache.kept(0, 0)[0] == [0, 1, 2, 3, 14, 15, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_rows_of_a_batch_equal_each_alone(torch_rng: torch.Generator, side: str, dtype: torch.dtype) -> None:
    """Bit for bit, whatever the others hold, however many slots stand behind, and while others wait."""
    budget = Budget(0.3, 0.2, 1)
    columns, lengths = 23, [23, 9, 16]
    prompt = make(torch_rng, columns, batch=3, dtype=dtype)
    mask = torch.zeros(3, columns, dtype=torch.bool)
    for row, length in enumerate(lengths):
        places = torch.randperm(columns, generator=torch_rng)[:length].sort()[0]
        mask[row, {"left": slice(columns - length, None), "right": slice(length), "holes": places}[side]] = 1
    together = OperatorCache(budget, spare=3)
    outputs = [together.forward(*(x.clone() for x in prompt), mask)]
    steps = [make(torch_rng, 1, batch=3, dtype=dtype) for _ in range(30)]
    masks = [torch.rand(3, 1, generator=torch_rng) > 0.3 for _ in steps]
    outputs += [together.forward(*step, kept) for step, kept in zip(steps, masks, strict=True)]
    for row in range(3):
        alone = OperatorCache(budget)
        expected = alone.forward(*(x[row : row + 1][:, :, mask[row]] for x in prompt))
        assert_same_bits(outputs[0][row : row + 1][:, :, mask[row]], expected)
        assert (outputs[0][row][:, ~mask[row]] == 0).all()
        for step, kept, output in zip(steps, masks, outputs[1:], strict=True):
            if kept[row]:
                assert_same_bits(output[row], alone.forward(*(x[row : row + 1] for x in step))[0])
            else:
                assert (output[row] == 0).all()
        used = int(alone.rows[0, USED])
        assert together.rows[row].tolist() == alone.rows[0].tolist()
        assert together.free_slot[row].tolist() == alone.free_slot[0].tolist()
        for name in ("positions", "scores", "key", "value"):
            ours, theirs = (getattr(x, name)[i, :, :used] for x, i in ((together, row), (alone, 0)))
            free = alone.free_slot[0, :, None] == torch.arange(used)
            assert_same_bits(ours[~free], theirs[~free], name)
