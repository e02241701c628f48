"""Where reading a tensor's values would wait for a device: a step reads none, a prompt reads once for all
layers, and what comes out is the same, bit for bit.

The device is played by the CPU: `cuda.readable` says no, and who reads from within sinklora is noted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_support import assert_same, patched, prefill
from hf_support import restarting, tokens
from transformers import DynamicCache

from sinklora import H2OCache, cuda
from sinklora.hf import masks

SMALL: dict[str, Any] = {"heavy": 4, "recent": 3, "num_sink_tokens": 1}
STREAMING: dict[str, Any] = {"heavy": 0, "recent": 6, "num_sink_tokens": 2, "positions": "cache"}
FULL: dict[str, Any] = {"heavy": 1.0, "recent": 500}

# What makes the host wait for a device, and what copies to it from pageable memory.
READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places in sinklora that have read values or made tensors of lists since the list was cleared."""
    monkeypatch.setattr(cuda, "readable", lambda tensor: False)
    found: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            if frame.f_globals.get("__name__", "").startswith("sinklora"):
                found.append(f"{frame.f_code.co_qualname}: {name}")
            return original(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in READS:
        watch(torch.Tensor, name)
    watch(torch, "tensor")
    return found


def padded(batch: int = 2, num_tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(batch, num_tokens), torch.ones(batch, num_tokens, dtype=torch.int64)
    ids[0, :5], mask[0, :5] = 0, 0
    return ids, mask


def step(model: Any, cache: Any, mask: torch.Tensor, *new: int, seed: int = 0) -> torch.Tensor:
    """One token, kept in the rows whose number in new is 1; returns the mask with it."""
    mask = torch.cat([mask, torch.tensor(new)[:, None]], 1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -1:]
    prefill(model, cache, tokens(len(new), 1, seed=seed), attention_mask=mask, position_ids=position_ids)
    return mask


@pytest.mark.parametrize("options", [SMALL, STREAMING, FULL], ids=["small", "streaming", "full"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_reads_nothing(reads: list[str], masked: bool, options: dict[str, Any]) -> None:
    model = patched(num_hidden_layers=3)
    cache = H2OCache(model.config, **options)
    ids, mask = padded()
    prefill(model, cache, ids, attention_mask=mask) if masked else prefill(model, cache, ids)
    step(model, cache, mask, 1, 1)  # a table of rotations may be made
    del reads[:]
    for i in range(5):
        if masked:
            mask = step(model, cache, mask if i else torch.cat([mask, mask[:, -1:]], 1), 1, i % 2, seed=i)
        else:
            prefill(model, cache, tokens(2, 1, seed=i))
    assert reads == []


def test_a_step_of_a_dynamic_cache_reads_nothing(reads: list[str]) -> None:
    model = patched()
    cache = DynamicCache(config=model.config)
    ids, mask = padded()
    prefill(model, cache, ids, attention_mask=mask)
    step(model, cache, mask, 1, 1)
    prefill(model, DynamicCache(config=model.config), tokens(1, 7))
    assert reads == []


def test_training_reads_nothing(reads: list[str]) -> None:
    model = patched().train()
    ids, mask = padded()
    model(ids, attention_mask=mask).logits.sum().backward()
    model(tokens(1, 12), position_ids=restarting(5, 7)).logits.sum().backward()
    assert reads == []


@pytest.mark.parametrize("options", [SMALL, STREAMING], ids=["small", "streaming"])
def test_the_first_layer_reads_for_all(reads: list[str], options: dict[str, Any]) -> None:
    """The same number of reads for any number of layers, also where steps came before that were not read."""
    counts = []
    for num_layers in (2, 5):
        model = patched(num_hidden_layers=num_layers)
        cache = H2OCache(model.config, **options)
        _, mask = padded()
        found = []
        for _ in range(2):
            del reads[:]
            more = torch.cat([mask, torch.ones(2, 4)], 1).long() if cache.get_seq_length() else mask
            new = more.shape[1] - cache.get_seq_length()
            places = (more.cumsum(1) - 1).clamp(min=0)[:, -new:]
            prefill(model, cache, tokens(2, new), attention_mask=more, position_ids=places)
            found.append([place for place in reads if not place.endswith("tensor")])
            mask = step(model, cache, more, 1, 0)
        counts.append(found)
    assert counts[0] == counts[1]
    assert all(1 <= len(found) <= 3 for found in counts[0]), counts


@pytest.mark.parametrize(
    "options",
    [SMALL, STREAMING, FULL, {**SMALL, "record": True}, {**SMALL, "heavy": [2, 6]}],
    ids=["small", "streaming", "full", "record", "each its own"],
)
def test_the_cache_comes_out_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, steps with padding in some rows, a prompt again, steps; then what the host is asked for."""
    model = patched()
    found = []
    for readable in (True, False):
        with monkeypatch.context() as patch:
            if not readable:
                patch.setattr(cuda, "readable", lambda tensor: False)
            cache = H2OCache(model.config, **options)
            ids, mask = padded()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            prefill(model, cache, ids, attention_mask=mask, position_ids=places)
            for i in range(6):
                mask = step(model, cache, mask, 1, i % 2, seed=i)
            mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -3:]
            prefill(model, cache, tokens(2, 3), attention_mask=mask, position_ids=places)
            for i in range(3):
                mask = step(model, cache, mask, i % 2, 1, seed=i)
            found.append(cache)
            unread = 0 if readable or options.get("record") else 3
            assert [layer.bounds.unread for layer in cache.layers] == [unread] * 2
    assert_same(found[1], found[0])
    for mine, theirs in zip(found[1].layers, found[0].layers, strict=True):
        assert mine.memory_bytes() == theirs.memory_bytes()
        assert mine.clean == theirs.clean
        assert mine.is_croppable == theirs.is_croppable
        assert mine.counts == theirs.counts
        assert torch.equal(mine.rows, theirs.rows)


def test_what_changes_a_cache_knows_unread_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = patched()
    found = []
    for readable in (True, False):
        with monkeypatch.context() as patch:
            if not readable:
                patch.setattr(cuda, "readable", lambda tensor: False)
            cache = H2OCache(model.config, **FULL)
            ids, mask = padded()
            prefill(model, cache, ids, attention_mask=mask)
            for i in range(3):
                mask = step(model, cache, mask, 1, 1, seed=i)
            cache.crop(-2)
            mask = step(model, cache, mask[:, :-2], 1, 1)
            with pytest.raises(ValueError, match="at least -9, as a row has padding before"):
                cache.crop(-10)
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
            step(model, cache, mask[[1, 0, 1]], 1, 0, 1)
            cache.save(tmp_path / str(readable))
            found.append(H2OCache.load(tmp_path / str(readable), device="cpu"))
    assert_same(found[1], found[0])
    assert found[1].layers[0].counts == found[0].layers[0].counts
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


def test_masks_that_hide_taken_tokens_are_refused_at_prompts(reads: list[str]) -> None:
    model = patched()
    cache = H2OCache(model.config, **SMALL)
    ids, mask = padded()
    prefill(model, cache, ids, attention_mask=mask)
    hiding = torch.cat([torch.zeros_like(mask), torch.ones(2, 4, dtype=torch.int64)], 1)
    with pytest.raises(NotImplementedError, match="cannot hide tokens that it has taken"):
        prefill(model, cache, tokens(2, 4), attention_mask=hiding)


def test_a_dense_mask_is_read_once(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_dense", None)
    dense = torch.ones(6, 6).tril().bool()[None, None]
    first = masks.padding_of_dense(dense, 6)
    count = len(reads)
    assert count > 0
    assert masks.padding_of_dense(dense, 6) is first
    assert len(reads) == count
    dense[..., 2, 3] = True  # a query sees the future
    assert masks.padding_of_dense(dense, 6) is None
    assert masks.padding_of_dense(dense.clone(), 6) is None
    assert len(reads) > count
