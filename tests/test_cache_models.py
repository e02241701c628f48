"""The H2O cache in every architecture that SF-Attn is tested with, and around the model: wrappers,
pipelines.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_support import assert_same, one_by_one, patched, prefill
from hf_support import ARCHITECTURES, PATTERN, tiny, tokens
from transformers import DynamicCache, PreTrainedTokenizerFast, TextStreamer, pipeline
from transformers.cache_utils import StaticCache

import sinklora
from sinklora import H2OCache
from sinklora.reference_h2o import H2OSimulation

SMALL: dict[str, Any] = {"heavy": 5, "recent": 4, "num_sink_tokens": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_budget_is_a_dynamic_cache(architecture: str, dtype: torch.dtype) -> None:
    model, ids = patched(architecture).to(dtype), tokens(2, 21)
    full, cache = DynamicCache(config=model.config), H2OCache(model.config, heavy=100, recent=100)
    for turn in (ids, *tokens(2, 3, seed=1).split(1, 1), tokens(2, 9, seed=2)):
        assert torch.equal(prefill(model, cache, turn), prefill(model, full, turn))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_equal_rows_alone(architecture: str) -> None:
    model, ids = patched(architecture), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = H2OCache(model.config, **SMALL)
    alone = [H2OCache(model.config, **SMALL) for _ in range(2)]
    prefill(model, together, ids, attention_mask=mask, position_ids=places)
    for b, cache in enumerate(alone):
        prefill(model, cache, ids[b : b + 1, 8 * (1 - b) :])
    for i in range(5):
        step = tokens(2, 1, seed=i)
        mask = torch.cat([mask, mask[:, -1:]], 1)
        found = prefill(
            model, together, step, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1
        )
        for b, cache in enumerate(alone):
            expected = prefill(model, cache, step[b : b + 1])
            torch.testing.assert_close(found[b : b + 1], expected, atol=1e-4, rtol=1e-4)
    for b, cache in enumerate(alone):
        for i in range(2):
            assert torch.equal(together.kept_positions(i)[b : b + 1], cache.kept_positions(i))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_is_the_simulation(architecture: str) -> None:
    """The first layer's queries, keys and values, taken on their way, through the float64 simulation."""
    seen: list[tuple[torch.Tensor, ...]] = []

    class Watched(H2OCache):
        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            if layer_idx == 0:
                seen.append((key_states, value_states))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    model = patched(architecture)
    cache = Watched(model.config, **SMALL)
    queries: list[torch.Tensor] = []
    attend = cache.layers[0].attend

    def watch(new: Any) -> torch.Tensor:
        queries.append(new.query)
        return attend(new)

    cache.layers[0].attend = watch  # type: ignore[method-assign]
    for i, num_new in enumerate([20, 1, 1, 7, 1, 1, 1]):
        prefill(model, cache, tokens(1, num_new, seed=i))
    heads, kv_heads = queries[0].shape[1], seen[0][0].shape[1]
    scale = getattr(model.config, "attention_multiplier", None)
    for hk in range(kv_heads):
        simulation = H2OSimulation(5, 4, 1, scale=scale)
        mine = slice(hk * heads // kv_heads, (hk + 1) * heads // kv_heads)
        for query, (key, value) in zip(queries, seen, strict=True):
            simulation.forward(query[0, mine], key[0, hk], value[0, hk])
        assert cache.kept_positions(0)[0, hk].tolist() == simulation.positions.tolist()
        assert cache.scores(0)[0, hk].tolist() == pytest.approx(
            simulation.scores.tolist(), rel=2e-5, abs=2e-5
        )


# ---- every other cache runs the same kernels ----


def test_static_caches_have_the_bits_of_a_dynamic_one() -> None:
    """Outside of graphs: the slots behind the last token are cut off, not masked."""
    model, ids = patched(), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for padded in (False, True):
        caches = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)
        so_far = mask
        for i, turn in enumerate((ids, *tokens(2, 3, seed=1).split(1, 1), tokens(2, 6, seed=2))):
            so_far = mask if i == 0 else torch.cat([so_far, torch.ones_like(turn)], 1)
            options = {"attention_mask": so_far} if padded else {}
            dynamic, static = (prefill(model, cache, turn, **options) for cache in caches)
            where = so_far[:, -turn.shape[1] :].bool() if padded else torch.ones_like(turn, dtype=torch.bool)
            assert torch.equal(static[where], dynamic[where])


def test_eval_with_gradients_is_sdpa_over_past_tokens() -> None:
    """Our cached path has no gradient; where one is asked for, the old path gives it."""
    model, ids = patched(), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = DynamicCache(config=model.config)
    prefill(model, cache, ids[:, :15], attention_mask=mask[:, :15])
    logits = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    expected = DynamicCache(config=model.config)
    prefill(model, expected, ids[:, :15], attention_mask=mask[:, :15])
    found = prefill(model, expected, ids[:, 15:], attention_mask=mask)
    torch.testing.assert_close(logits, found, atol=1e-4, rtol=1e-4)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- around the model ----


def test_multimodal_configs() -> None:
    """The text model's config counts: layers, and the live attention name."""
    from transformers import LlavaConfig

    text = tiny().config
    config = LlavaConfig(text_config=text)
    cache = H2OCache(config, **SMALL)
    assert len(cache.layers) == text.num_hidden_layers and cache._config is config.get_text_config()


def test_peft_models() -> None:
    peft = pytest.importorskip("peft")
    model = tiny()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    sinklora.patch(wrapped, PATTERN).eval()
    cache = H2OCache(wrapped.config, **SMALL)
    ids = tokens(1, 20)
    out = wrapped.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 26) and cache.kept_positions(0).shape[2] == 10


def test_autocast() -> None:
    """Queries in float32 beside values in bfloat16: the cache holds what attention computes in."""
    model, ids = patched(), tokens(1, 20)
    caches = [DynamicCache(config=model.config), H2OCache(model.config, heavy=100, recent=100)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for turn in (ids, tokens(1, 1, seed=1), tokens(1, 5, seed=2)):
            first, second = (prefill(model, cache, turn) for cache in caches)
            assert torch.equal(first, second)
    assert caches[1].layers[0].keys.dtype == torch.bfloat16


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token is a word w2 .. w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 64)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def test_pipeline_and_streamer(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model, ids = patched(), tokens(1, 20)
    text = tokenizer.decode(ids[0])
    expected = model.generate(
        ids, past_key_values=H2OCache(model.config, **SMALL), max_new_tokens=6, do_sample=False
    )
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache = H2OCache(model.config, **SMALL)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    found = run(
        text,
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        streamer=streamer,
        return_full_text=False,
    )
    new = tokenizer.decode(expected[0, 20:])
    assert found[0]["generated_text"].split() == new.split() == capsys.readouterr().out.split()
    other = H2OCache(model.config, **SMALL)
    prefill(model, other, ids)
    one_by_one(model, other, expected[:, 20:-1])
    assert_same(cache, other)
