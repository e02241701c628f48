"""What the tests of the H2O cache share: models, greedy loops, and what a cache holds as bits."""

from __future__ import annotations

from typing import Any

import torch
from hf_support import PATTERN, tiny

import sinklora
from sinklora import H2OCache
from sinklora.cache.layer import TENSORS


def patched(architecture: str = "Llama", **changes: Any) -> Any:
    return sinklora.patch(tiny(architecture, **changes), PATTERN)


def prefill(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The logits (B, n, vocabulary) of one forward without gradients."""
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options).logits


def one_by_one(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The logits (B, n, vocabulary) of forwards of one token each."""
    return torch.cat([prefill(model, cache, ids[:, i : i + 1], **options) for i in range(ids.shape[1])], 1)


def kept(cache: H2OCache) -> list[list[list[list[int]]]]:
    """Positions by layer, row and head."""
    return [cache.kept_positions(i).tolist() for i in range(len(cache.layers))]


def assert_same(found: H2OCache, expected: H2OCache) -> None:
    """Both hold the same entries and scores, bit for bit, and have seen as much."""
    assert found.get_seq_length() == expected.get_seq_length()
    for i in range(len(expected.layers)):
        assert torch.equal(found.kept_positions(i), expected.kept_positions(i))
        assert torch.equal(found.scores(i), expected.scores(i))


def tensors(cache: H2OCache) -> list[torch.Tensor]:
    return [getattr(layer, name) for layer in cache.layers for name in TENSORS if layer.is_initialized]
