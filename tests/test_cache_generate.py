"""generate() and its relatives with an H2O cache: a full budget is DynamicCache bit for bit, a small one
goes on.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from cache_support import assert_same, kept, one_by_one, patched, prefill
from hf_support import tokens
from transformers import DynamicCache, TextIteratorStreamer

from sinklora import H2OCache
from sinklora.cache import link as cache_link

FULL: dict[str, Any] = {"heavy": 1.0, "recent": 500}
SMALL: dict[str, Any] = {"heavy": 4, "recent": 3, "num_sink_tokens": 1}


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, past_key_values=cache, **given)


def left_padded(padding: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


# ---- a full budget ----


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_full_budget_is_a_dynamic_cache(padded: bool, dtype: torch.dtype, positions: str) -> None:
    """Prompt, decoding, a second turn, and decoding again."""
    model = patched().to(dtype)
    ids, mask = left_padded() if padded else (tokens(2, 21), torch.ones(2, 21, dtype=torch.int64))
    full, other = DynamicCache(config=model.config), H2OCache(model.config, **FULL, positions=positions)
    turns = [ids, *tokens(2, 4, seed=5).split(1, 1), tokens(2, 7, seed=6), tokens(2, 1, seed=7)]
    for turn in turns:
        if mask.shape[1] < full.get_seq_length() + turn.shape[1]:
            mask = torch.cat([mask, torch.ones_like(turn)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -turn.shape[1] :]
        expected, found = (
            prefill(model, cache, turn, attention_mask=mask, position_ids=places) for cache in (full, other)
        )
        where = mask[:, -turn.shape[1] :].bool()
        if positions == "original":
            assert torch.equal(found[where], expected[where])
        elif dtype == torch.float32:  # un-rotated and rotated again
            torch.testing.assert_close(found[where], expected[where], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 2.0},
        {"num_beams": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 8},
        {"max_new_tokens": 1},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
@pytest.mark.parametrize("padded", [False, True])
def test_ways_to_generate(options: dict[str, Any], padded: bool) -> None:
    model = patched()
    ids, mask = left_padded() if padded else (tokens(2, 21), torch.ones(2, 21, dtype=torch.int64))
    torch.manual_seed(3)
    expected = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask, **options)
    torch.manual_seed(3)
    found = generate(model, ids, H2OCache(model.config, **FULL), attention_mask=mask, **options)
    assert torch.equal(found, expected)
    cache = H2OCache(model.config, **SMALL)
    torch.manual_seed(3)
    less = generate(model, ids, cache, attention_mask=mask, **options)
    assert less.shape == expected.shape
    assert cache.kept_positions(1).shape[2] == 8


def test_turns_by_generate() -> None:
    """The whole text so far goes in again, as transformers has it for a cache that is kept."""
    model, ids = patched(), tokens(1, 15)
    caches = [DynamicCache(config=model.config), H2OCache(model.config, **FULL)]
    texts = []
    for cache in caches:
        text = generate(model, ids, cache)
        text = generate(model, torch.cat([text, tokens(1, 6, seed=9)], 1), cache)
        texts.append(generate(model, torch.cat([text, tokens(1, 1, seed=8)], 1), cache))
    assert torch.equal(*texts) and caches[0].get_seq_length() == caches[1].get_seq_length()


# ---- a small budget ----


def test_chunks_evict_after_each() -> None:
    """The chunks of a prompt are forwards of their own, by generate or by hand."""
    model, ids = patched(), tokens(1, 30)
    by_hand, by_generate = H2OCache(model.config, **SMALL), H2OCache(model.config, **SMALL)
    parts = [prefill(model, by_hand, chunk) for chunk in ids.split(8, 1)]
    generate(model, ids, by_generate, prefill_chunk_size=8, max_new_tokens=1)
    assert_same(by_generate, by_hand)
    whole = H2OCache(model.config, **SMALL)
    first = prefill(model, whole, ids)
    assert torch.allclose(first[:, :8], parts[0], atol=1e-5) and not torch.allclose(
        first[:, -1], parts[-1][:, -1]
    )


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_a_loop_is_generate(positions: str) -> None:
    model, ids = patched(), tokens(1, 20)
    cache, other = (H2OCache(model.config, **SMALL, positions=positions) for _ in range(2))
    expected = generate(model, ids, cache, max_new_tokens=9)
    token, found = prefill(model, other, ids)[:, -1:].argmax(-1), ids
    for _ in range(9):
        found = torch.cat([found, token], 1)
        if found.shape[1] < expected.shape[1]:
            token = prefill(model, other, token)[:, -1:].argmax(-1)
    assert torch.equal(found, expected)
    assert_same(other, cache)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("heavy, recent", [(5, 4), (0.3, 0.2)])
def test_rows_equal_rows_alone(side: str, positions: str, heavy: float, recent: float) -> None:
    """Prompts of 21, 13 and 6 tokens in one batch, steps that some rows skip, and a second turn."""
    model = patched()
    options: dict[str, Any] = {"heavy": heavy, "recent": recent, "num_sink_tokens": 2, "positions": positions}
    cache = H2OCache(model.config, **options)
    alone = [H2OCache(model.config, **options) for _ in range(3)]
    turns = [
        [tokens(1, n, seed=n) for n in (21, 13, 6)],
        *(
            [tokens(1, n, seed=30 + i + n) for n in counts]
            for i, counts in enumerate([(1, 1, 1)] * 5 + [(1, 0, 1)] * 4)
        ),
        [tokens(1, n, seed=60 + n) for n in (3, 9, 5)],
        *([tokens(1, 1, seed=70 + i)] * 3 for i in range(3)),
    ]
    mask = torch.zeros(3, 0, dtype=torch.int64)
    for turn in turns:
        width = max(row.shape[1] for row in turn)
        ids, new = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
        for b, row in enumerate(turn):
            where = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
            ids[b, where], new[b, where] = row[0], 1
        mask = torch.cat([mask, new], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        together = prefill(model, cache, ids, attention_mask=mask, position_ids=places)
        for b, row in enumerate(turn):
            if row.shape[1]:
                expected = prefill(model, alone[b], row)
                torch.testing.assert_close(together[b][new[b].bool()], expected[0], atol=1e-4, rtol=1e-4)
    for b in range(3):
        for i in range(len(cache.layers)):
            expected = alone[b].kept_positions(i)[0]
            found = cache.kept_positions(i)[b]
            assert torch.equal(found[:, : expected.shape[1]], expected)
            assert (found[:, expected.shape[1] :] == -1).all()
            scores = cache.scores(i)[b]
            torch.testing.assert_close(
                scores[:, : expected.shape[1]], alone[b].scores(i)[0], atol=1e-4, rtol=1e-4
            )
            assert (scores[:, expected.shape[1] :] == 0).all()


# ---- copies ----


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_copies_go_on_by_themselves(positions: str) -> None:
    model, ids = patched(), tokens(1, 20)
    cache = H2OCache(model.config, **SMALL, positions=positions)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
    assert twin._config is cache._config
    first = one_by_one(model, cache, tokens(1, 6, seed=1))
    second = one_by_one(model, twin, tokens(1, 6, seed=1))
    assert torch.equal(first, second)
    assert_same(twin, cache)
    one_by_one(model, twin, tokens(1, 6, seed=2))
    assert kept(twin) != kept(cache)


def test_a_cache_that_records_for_crop_keeps_no_graph() -> None:
    model = patched()
    cache = H2OCache(model.config, **FULL)
    cache.activate_past_recording()
    model(tokens(1, 9), past_key_values=cache)
    assert not any(tensor.requires_grad for tensor in cache.layers[0].last.prompt)
    other = copy.deepcopy(cache)
    assert torch.equal(prefill(model, other, tokens(1, 2)), prefill(model, cache, tokens(1, 2)))


def test_rows_are_selected_and_repeated() -> None:
    model, ids = patched(), tokens(3, 20)
    cache = H2OCache(model.config, **SMALL)
    prefill(model, cache, ids)
    one_by_one(model, cache, tokens(3, 3, seed=1))
    before = [cache.kept_positions(1), cache.scores(1)]
    for change, rows in (
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        other = copy.deepcopy(cache)
        change(other)
        assert torch.equal(other.kept_positions(1), before[0][rows])
        assert torch.equal(other.scores(1), before[1][rows])
        step = tokens(3, 1, seed=4)[rows]
        expected = prefill(model, copy.deepcopy(cache), tokens(3, 1, seed=4))[rows]
        torch.testing.assert_close(prefill(model, other, step), expected, atol=1e-5, rtol=1e-5)


def test_reset_starts_anew() -> None:
    model = patched()
    cache, other = (H2OCache(model.config, **SMALL) for _ in range(2))
    prefill(model, cache, tokens(2, 20, seed=3))
    cache.reset()
    assert (cache.get_seq_length(), cache.memory_bytes()) == (0, 0) and cache.kept_positions(0).numel() == 0
    for each in (cache, other):
        prefill(model, each, tokens(1, 20))
    assert_same(cache, other)


@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_crop_takes_back(chunk: int) -> None:
    """Recorded, as assisted generation has it, a crop leaves no trace but rounding in the scores."""
    model, ids = patched(), tokens(1, 20)
    cache, other = (H2OCache(model.config, heavy=50, recent=50) for _ in range(2))
    prefill(model, cache, ids)
    prefill(model, other, ids)
    assert cache.is_croppable
    cache.activate_past_recording()
    prefill(model, cache, tokens(1, chunk, seed=5))
    left = (chunk - 1) // 2
    cache.crop(left - chunk)
    if left:
        prefill(model, other, tokens(1, chunk, seed=5)[:, :left])
    assert cache.get_seq_length() == other.get_seq_length() == 20 + left
    for i in range(2):
        assert torch.equal(cache.kept_positions(i), other.kept_positions(i))
        torch.testing.assert_close(cache.scores(i), other.scores(i), atol=1e-5, rtol=1e-5)
    last = tokens(1, 1, seed=6)
    torch.testing.assert_close(prefill(model, cache, last), prefill(model, other, last), atol=1e-5, rtol=1e-5)


def test_crop_takes_back_the_budget_too() -> None:
    """Fractions are of the tokens that are left of the prompt."""
    model = patched()
    cache = H2OCache(model.config, heavy=0.5, recent=0.6)
    prefill(model, cache, tokens(1, 20))
    cache.crop(-10)
    one_by_one(model, cache, tokens(1, 8, seed=1))
    assert cache.kept_positions(0).shape[2] == 5 + 6


def test_a_note_is_for_one_key_and_one_call() -> None:
    layer, keys = H2OCache(patched().config, heavy=1, recent=1).layers[0], [torch.zeros(1), torch.zeros(1)]
    cache_link.leave(layer, keys[0])
    assert [cache_link.take(keys[i]) for i in (1, 0, 0)] == [None, layer, None]


def test_assisted_generation_with_a_full_budget() -> None:
    model, assistant, ids = patched(), patched(hidden_size=32), tokens(1, 20)
    expected = generate(model, ids, DynamicCache(config=model.config))
    cache = H2OCache(model.config, **FULL)
    assert torch.equal(generate(model, ids, cache, assistant_model=assistant), expected)
    with pytest.raises(RuntimeError, match=r"crop.*evicted"):
        generate(model, ids, H2OCache(model.config, **SMALL), assistant_model=assistant)


# ---- around generate ----


class _Letters:
    """The least of a tokenizer that streamers ask for: a token is a character."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(chr(64 + int(i)) for i in torch.as_tensor(ids).reshape(-1))


def test_streamer_in_a_thread() -> None:
    model, ids = patched(), tokens(1, 20)
    expected = generate(model, ids, H2OCache(model.config, **SMALL))
    streamer = TextIteratorStreamer(_Letters(), skip_prompt=True, timeout=60)
    args = (model, ids, H2OCache(model.config, **SMALL))
    thread = threading.Thread(target=generate, args=args, kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == _Letters().decode(expected[0, 20:])


def test_threads_with_a_cache_each() -> None:
    model = patched()
    prompts = [tokens(1, 18, seed=i) for i in range(4)]
    expected = [generate(model, ids, H2OCache(model.config, **SMALL)) for ids in prompts]
    found: list[Any] = [None] * 4

    def run(i: int) -> None:
        for _ in range(3):
            found[i] = generate(model, prompts[i], H2OCache(model.config, **SMALL))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_after_training_in_the_same_process() -> None:
    model, ids = patched(), tokens(1, 20)
    expected = generate(model, ids, H2OCache(model.config, **SMALL))
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.eval()
    assert torch.equal(generate(model, ids, H2OCache(model.config, **SMALL)), expected)
