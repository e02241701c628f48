"""A cache on the emulated CUDA kernels, step by step against the float64 simulation of SPEC section 2."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from simulation_support import Comparison, make
from test_h2o_simulation import (  # noqa: F401
    CHAT,
    PROMPT_AND_STEPS,
    test_a_cache_may_start_with_single_tokens,
    test_rows_of_a_batch_equal_each_alone,
    test_the_kept_set_moves,
    test_ties_keep_the_older,
)
from torch import Tensor

from sinklora import torch_h2o


def h2o_decode(query: Tensor, new_key: Tensor, new_value: Tensor, *cache: Tensor, **options: Any) -> Tensor:
    tensors = (query, new_key, new_value)
    return emulated.step(cache, *tensors, scale=query.shape[3] ** -0.5, **options)  # type: ignore[arg-type]


def h2o_select(key: Tensor, *rest: Tensor, num_sinks: int, capacity: int) -> tuple[Tensor, ...]:
    like = (key, *rest[:3])
    outputs = tuple(x.new_full((*x.shape[:2], capacity, *x.shape[3:]), 55) for x in like)
    emulated.select((key, *rest), outputs, num_sinks)
    return outputs


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_h2o, "h2o_decode", h2o_decode)
    monkeypatch.setattr(torch_h2o, "h2o_select", h2o_select)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("settings", [(6, 4), (0, 5, 4), (0.25, 0.25), (0.1, 0.4, 3), (1000, 1)], ids=str)
def test_kinds_of_budget(torch_rng: torch.Generator, settings: tuple[Any, ...], window: int | None) -> None:
    comparison = Comparison(settings, window=window)
    for tokens in CHAT:
        comparison.forward(*make(torch_rng, tokens))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(torch_rng: torch.Generator, dtype: torch.dtype, mean: bool) -> None:
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    comparison = Comparison((6, 4, 1), atol=atol, mean=mean)
    for tokens in PROMPT_AND_STEPS:
        comparison.forward(*make(torch_rng, tokens, dim=24, dtype=dtype, heads=8, batch=2))
