"""generate() with a patched model gives sdpa's tokens: caches, beams, padding, chunked prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_support import ARCHITECTURES, PATTERN, tiny, tokens
from transformers import DynamicCache, StaticCache

import sinklora


def _both(model: torch.nn.Module, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, **options)
    with sinklora.patched(model, PATTERN):
        return model.generate(ids, **options), expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padded", [False, True])
def test_dynamic_cache(architecture: str, padded: bool) -> None:
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :8] = 0
        ids[0, :8] = 0
    found, expected = _both(tiny(architecture), ids, attention_mask=mask)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX"])
def test_static_cache(architecture: str) -> None:
    found, expected = _both(
        tiny(architecture), tokens(2, 21), cache_implementation="static", disable_compile=True
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prefill_chunk_size": 8}, {"use_cache": False}, {"max_new_tokens": 1}],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    found, expected = _both(tiny(), tokens(2, 21), **options)
    assert torch.equal(found, expected)


def test_sliding_cache() -> None:
    found, expected = _both(tiny("Mistral", sliding_window=9), tokens(2, 21))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("capacity", [21, 32])
def test_static_cache_by_hand(capacity: int) -> None:
    """Its keys have the capacity's length: what lies behind the last token must not be attended to."""
    model, ids = tiny(), tokens(1, 21)
    with torch.no_grad():
        expected = model(ids).logits
        sinklora.patch(model, PATTERN)
        cache = StaticCache(config=model.config, max_cache_len=capacity)
        first = model(ids[:, :20], past_key_values=cache).logits
        last = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, last], 1), expected, atol=1e-5, rtol=1e-4)


def test_static_sliding_cache_by_hand() -> None:
    """Steps up to the window's end, over it, and after a prompt that is longer."""
    model, ids = tiny("Mistral", sliding_window=9), tokens(2, 21)
    with torch.no_grad():
        expected = model(ids).logits
        sinklora.patch(model, PATTERN)
        for first in (1, 6, 11):
            cache = StaticCache(config=model.config, max_cache_len=32)
            parts = [ids[:, :first], *ids[:, first:].split(1, 1)]
            found = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_chunks_by_hand() -> None:
    model, ids = tiny(), tokens(1, 30)
    with torch.no_grad():
        expected = model(ids).logits
        sinklora.patch(model, PATTERN)
        cache = DynamicCache(config=model.config)
        parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split(10, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)


def test_sf_over_cached_tokens_is_refused() -> None:
    model = sinklora.patch(tiny(), PATTERN, eval_attention="sf")
    with pytest.raises(NotImplementedError, match="past_key_values"):
        model.generate(tokens(1, 21), max_new_tokens=4)
    with pytest.raises(NotImplementedError, match="eval"):
        sinklora.patch(model, PATTERN, eval_attention="full").train().generate(
            tokens(1, 21), max_new_tokens=4
        )
