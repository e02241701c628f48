"""Losses over sliding windows against one token at a time, and what is computed from losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinklora.evaluation.perplexity import (
    bootstrap_interval,
    file_losses,
    improvement_share,
    mean_loss,
    perplexity,
    windows,
)


@pytest.fixture(scope="module")
def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("window", "stride"), [(8, 1), (8, 3), (8, 7), (64, 16), (2, 1)])
def test_sliding_window_equals_one_token_at_a_time(
    small_model: LlamaForCausalLM, torch_rng: torch.Generator, window: int, stride: int
) -> None:
    lengths = [1, 2, 7, 8, 9, 30]
    files = [torch.randint(32, (length,), generator=torch_rng) for length in lengths]
    found = file_losses(small_model, files, window, stride, tokens_per_batch=3 * window)
    for tokens, losses in zip(files, found, strict=True):
        assert losses.shape == (len(tokens) - 1,)
        ends = [min(window, len(tokens))]
        while ends[-1] < len(tokens):
            ends.append(min(ends[-1] + stride, len(tokens)))
        for target in range(1, len(tokens)):
            begin = max(0, next(end for end in ends if end > target) - window)
            assert target - begin <= window - 1
            assert begin == 0 or target - begin >= window - stride
            with torch.no_grad():
                logits = small_model(input_ids=tokens[None, begin:target]).logits[0, -1]
            expected = -logits.log_softmax(-1)[tokens[target]]
            assert losses[target - 1].item() == pytest.approx(expected.item(), abs=1e-4)


def test_evaluation_leaves_the_mode(small_model: LlamaForCausalLM) -> None:
    small_model.train()
    counted: list[int] = []
    file_losses(small_model, [torch.arange(10)], 4, 2, on_tokens=counted.append)
    assert small_model.training
    small_model.eval()
    assert sum(counted) == sum(w.end - w.begin for w in windows([10], 4, 2)) == 16


@pytest.mark.parametrize(("window", "stride", "name"), [(1, 1, "window"), (8, 0, "stride"), (8, 8, "stride")])
def test_windows_refuse(window: int, stride: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        windows([10], window, stride)


def test_share_of_the_improvement() -> None:
    assert improvement_share(10.0, 6.0, 7.0) == pytest.approx(0.75)
    assert improvement_share(10.0, 6.0, 6.0) == 1
    assert improvement_share(10.0, 6.0, 12.0) == pytest.approx(-0.5)
    assert improvement_share(10.0, 10.0, 9.0) is None
    assert improvement_share(10.0, 11.0, 9.0) is None


def test_bootstrap_resamples_files(rng: np.random.Generator) -> None:
    reference = [torch.from_numpy(rng.normal(2, 1, size)) for size in (50, 200, 80, 120, 60, 90, 150, 70)]
    same = [losses + 0.25 for losses in reference]
    low, high = bootstrap_interval(same, reference)
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)
    # One file of eight is worse by 1: the mean is its share of the tokens; it may be drawn never or often.
    one = [losses + (1.0 if i == 1 else 0.0) for i, losses in enumerate(reference)]
    low, high = bootstrap_interval(one, reference, seed=1)
    mean = mean_loss(one) - mean_loss(reference)
    assert mean == pytest.approx(200 / 820)
    assert low == 0 < mean < high < 1
    assert (low, high) == bootstrap_interval(one, reference, seed=1)
    assert perplexity([torch.full((4,), math.log(3.0))]) == pytest.approx(3.0)
