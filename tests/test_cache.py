"""H2OCache: settings, one layer against the float64 simulation, and memory in real bytes."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from cache_support import one_by_one, patched, prefill, tensors
from hf_support import tiny, tokens
from transformers import DynamicCache

from sinklora import H2OCache
from sinklora.budget import Budget
from sinklora.cache.layer import H2OLayer, NewTokens, Settings
from sinklora.reference_h2o import H2OSimulation

CONFIG = tiny().config


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- one layer is the definition ----


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "heavy, recent, sinks", [(6, 3, 0), (0, 4, 2), (0.3, 0.2, 1), (5, 1, 0), (0, 1, 0), (100, 100, 4)]
)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (8, 1)])
def test_a_layer_is_the_simulation(
    heads: int, kv_heads: int, heavy: float, recent: float, sinks: int, window: int | None, reduction: str
) -> None:
    """Prompts, chunks and steps of two rows: positions and scores after every forward, and the output."""
    group = heads // kv_heads
    settings = Settings(score_window=window, group_reduction=reduction)
    layer = H2OLayer(0, Budget(heavy, recent, sinks), settings)
    options = {"score_window": window, "group_reduction": reduction}
    simulations = [
        [H2OSimulation(heavy, recent, sinks, **options) for _ in range(kv_heads)] for _ in range(2)
    ]
    for step, num_new in enumerate([23, 1, 1, 1, 9, 1, 1, 2, *[1] * 12]):
        query = 3 * _random(2, heads, num_new, 16, seed=step)
        key, value = (
            _random(2, kv_heads, num_new, 16, seed=100 + step),
            _random(2, kv_heads, num_new, 16, seed=200 + step),
        )
        output = layer.attend(NewTokens(query, key, value))
        positions, scores = layer.entries()
        for b, row in enumerate(simulations):
            for hk, simulation in enumerate(row):
                mine = slice(hk * group, (hk + 1) * group)
                expected = simulation.forward(query[b, mine], key[b, hk], value[b, hk])
                np.testing.assert_allclose(output[b, mine].numpy(), expected, atol=1e-5)
                assert positions[b, hk].tolist() == simulation.positions.tolist(), (step, b, hk)
                np.testing.assert_allclose(scores[b, hk].numpy(), simulation.scores, rtol=2e-5, atol=2e-5)


def test_the_kept_set_moves() -> None:
    """Later tokens take the places of heavy ones: the published failure is a set that never changes."""
    layer = H2OLayer(0, Budget(8, 4), Settings())
    for step, num_new in enumerate([16, *[1] * 200]):
        query, key = (4 * _random(1, 2, num_new, 16, seed=seed + step) for seed in (0, 1000))
        layer.attend(NewTokens(query, key, key))
    heavy = layer.entries()[0][..., :-4]
    assert (heavy >= 16).any(-1).all()


def test_poisoned_keys_do_not_come_back() -> None:
    """What was evicted has no effect on anything later, bit for bit, nor has what is not in use."""
    outputs = []
    for poison in (False, True):
        layer = H2OLayer(0, Budget(4, 4), Settings())
        for step, num_new in enumerate([20, *[1] * 5]):
            query, key = (_random(1, 2, num_new, 16, seed=seed + step) for seed in (0, 100))
            output = layer.attend(NewTokens(query, key, key))
            if poison:
                layer.keys[layer.positions < 0] = math.nan
                layer.values[layer.positions < 0] = 1e4
        outputs.append(output)
    assert torch.equal(*outputs)


# ---- settings ----


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"recent": 0}, ValueError, "recent.*at least 1"),
        ({"heavy": 0.0}, ValueError, "heavy"),
        ({"heavy": -1}, ValueError, "heavy.*-1"),
        ({"heavy": math.nan}, ValueError, "heavy.*nan"),
        ({"recent": 1.5}, ValueError, "recent.*1.5"),
        ({"heavy": [4]}, ValueError, "heavy.*2 layers, got 1"),
        ({"recent": (1, 2, 3)}, ValueError, "recent.*2 layers, got 3"),
        ({"heavy": [4, -2]}, ValueError, "heavy.*-2"),
        ({"heavy": "4"}, TypeError, "heavy"),
        ({"recent": True}, TypeError, "recent"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens"),
        ({"score_window": 0}, ValueError, "score_window.*0"),
        ({"score_window": 2.0}, TypeError, "score_window.*float"),
        ({"group_reduction": "max"}, ValueError, "group_reduction.*sum.*max"),
        ({"positions": "rank"}, ValueError, "positions.*cache.*rank"),
        ({"record": 1}, TypeError, "record"),
        ({"config": {"num_hidden_layers": 2}}, TypeError, "config.*dict"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        H2OCache(**{"config": CONFIG, "heavy": 4, "recent": 4, **options})


def test_layers_have_their_own_budgets() -> None:
    model = patched()
    cache = H2OCache(model.config, heavy=[2, 0.5], recent=[3, 0.25], num_sink_tokens=1)
    prefill(model, cache, tokens(1, 20))
    assert [cache.kept_positions(i).shape[2] for i in range(2)] == [2 + 3 + 1, 10 + 5 + 1]


def test_streaming_keeps_sinks_and_the_newest() -> None:
    model = patched()
    cache = H2OCache.streaming(model.config, sinks=3, recent=5)
    prefill(model, cache, tokens(2, 20))
    one_by_one(model, cache, tokens(2, 4, seed=1))
    expected = torch.tensor([0, 1, 2, 19, 20, 21, 22, 23]).expand(2, 2, -1)
    assert torch.equal(cache.kept_positions(1), expected)


def test_fractions_grow_with_prompts_alone() -> None:
    model = patched()
    cache = H2OCache(model.config, heavy=0.25, recent=0.25)
    sizes = []
    for num_new in (20, 1, 1, 1, 8, 1):
        prefill(model, cache, tokens(1, num_new, seed=num_new))
        sizes.append(cache.kept_positions(0).shape[2])
    assert sizes == [10, 10, 10, 10, 14, 14]


def test_questions_about_layers() -> None:
    cache = H2OCache(CONFIG, heavy=4, recent=4)
    assert cache.kept_positions(1).numel() == 0 and cache.memory_bytes() == 0 and cache.get_seq_length() == 0
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"layer.*0 to 1, got {layer}"):
            cache.scores(layer)


# ---- memory ----


def _storages(cache: H2OCache) -> int:
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(cache)
    }
    return sum(found.values())


def test_memory_is_what_the_tensors_take() -> None:
    model = patched(
        num_hidden_layers=1, hidden_size=1024, num_attention_heads=8, num_key_value_heads=2
    ).bfloat16()
    ids = tokens(1, 400)
    full, cache = DynamicCache(config=model.config), H2OCache(model.config, heavy=0.1, recent=0.1)
    for each in (full, cache):
        prefill(model, each, ids)
        one_by_one(model, each, ids[:, :3])
    all_of_it = sum(t.untyped_storage().nbytes() for layer in full.layers for t in (layer.keys, layer.values))
    assert cache.memory_bytes() == _storages(cache)
    assert 0.2 * all_of_it < cache.memory_bytes() <= 0.22 * all_of_it


def test_the_prompt_is_freed() -> None:
    """No reference to a prompt's keys or values survives its forward."""
    seen: list[weakref.ref[torch.Tensor]] = []

    class Watched(H2OCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(weakref.ref(x.untyped_storage()) for x in (key_states, value_states))
            return super().update(key_states, value_states, *args, **kwargs)

    model = patched()
    cache = Watched(model.config, heavy=4, recent=4)
    prefill(model, cache, tokens(1, 50))
    gc.collect()
    assert len(seen) == 4 and all(ref() is None for ref in seen)


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_memory_is_constant_while_decoding(positions: str) -> None:
    model = patched(max_position_embeddings=100_000)
    cache = H2OCache(model.config, heavy=8, recent=8, num_sink_tokens=2, positions=positions)
    prefill(model, cache, tokens(1, 40))
    one_by_one(model, cache, tokens(1, 1))
    before, buffers = cache.memory_bytes(), [tensor.data_ptr() for tensor in tensors(cache)]
    one_by_one(model, cache, tokens(1, 50))
    assert cache.memory_bytes() == before >= _storages(cache)
    assert [tensor.data_ptr() for tensor in tensors(cache)] == buffers


def test_ten_thousand_steps() -> None:
    """One layer without the model around it: nothing grows, and positions stay right."""
    layer = H2OLayer(0, Budget(10, 5, 1), Settings())
    layer.attend(NewTokens(*(_random(1, 2, 30, 8, seed=i) for i in range(3))))
    new = [_random(10_000, 1, 2, 1, 8, seed=i) for i in (3, 4, 5)]
    layer.attend(NewTokens(*(x[0] for x in new)))
    size = layer.memory_bytes()
    gc.collect()
    objects = len(gc.get_objects())
    for step in range(1, 10_000):
        layer.attend(NewTokens(*(x[step] for x in new)))
    gc.collect()
    assert layer.memory_bytes() == size and len(gc.get_objects()) < objects + 200
    positions, scores = layer.entries()
    assert positions[..., -5:].tolist() == [[[*range(10_025, 10_030)]] * 2]
    assert (positions[..., 0] == 0).all() and positions.shape == (1, 2, 16) and scores.isfinite().all()


def test_slots_are_added_in_steps() -> None:
    """Before the budget is reached memory grows now and then, never by a token."""
    model = patched()
    cache = H2OCache(model.config, heavy=500, recent=500)
    prefill(model, cache, tokens(1, 20))
    sizes = []
    for i in range(100):
        prefill(model, cache, tokens(1, 1, seed=i))
        sizes.append(cache.layers[0].keys.shape[2])
    assert sizes[-1] <= 20 + 100 + 64 and len(set(sizes)) <= 3 and cache.kept_positions(0).shape[2] == 120


def test_inference_mode_and_no_grad_mix() -> None:
    model, ids = patched(), tokens(1, 20)
    found = []
    for contexts in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        cache = H2OCache(model.config, heavy=4, recent=4)
        with contexts[0]():
            model(ids, past_key_values=cache)
        for i in range(4):
            with contexts[i % 2]():
                last = model(tokens(1, 1 + i % 3, seed=i), past_key_values=cache).logits.clone()
        assert not any(tensor.is_inference() for tensor in tensors(cache))
        found.append(last)
    assert torch.equal(*found)


# ---- pictures ----


@pytest.mark.parametrize("record", [False, True])
def test_plot(record: bool) -> None:
    pytest.importorskip("matplotlib")
    model = patched()
    cache = H2OCache(model.config, heavy=4, recent=4, record=record)
    with pytest.raises(ValueError, match="empty"):
        cache.plot(0)
    prefill(model, cache, tokens(2, 20))
    one_by_one(model, cache, tokens(2, 6, seed=1))
    figure = cache.plot(1, row=1)
    assert figure.axes and "layer 1" in figure.axes[0].get_title()
    with pytest.raises(ValueError, match=r"row.*0 to 1, got 2"):
        cache.plot(0, row=2)


def test_the_timeline_is_what_was_kept() -> None:
    model = patched()
    cache = H2OCache(model.config, heavy=4, recent=4, record=True)
    expected = []
    for i, num_new in enumerate([20, 1, 1, 1, 6, 1, 1]):
        prefill(model, cache, tokens(2, num_new, seed=i))
        expected.append(cache.kept_positions(1))
    cache.batch_select_indices(torch.tensor([1, 0]))
    timeline = cache.layers[1].timeline
    assert timeline is not None
    for moment, positions in enumerate(expected):
        for row in range(2):
            assert timeline.kept_at(row, moment).tolist() == positions[1 - row].tolist()
