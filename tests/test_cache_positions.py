"""positions="cache": kept tokens stand at their rank, for every rotary embedding that can be undone.

The oracle needs no cache: in a model of one layer a key depends on its token and position alone, so a step
over kept tokens is a fresh forward of those tokens and the new one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_support import one_by_one, patched, prefill
from hf_support import ARCHITECTURES, tokens
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    LlamaConfig,
    PersimmonConfig,
    PersimmonForCausalLM,
    Phi3Config,
    SmolLM3Config,
    StableLmConfig,
    StableLmForCausalLM,
)

import sinklora
from sinklora import H2OCache
from sinklora.cache.rotary import rotate, unrotate


def _one_layer(architecture: str = "Llama", **changes: Any) -> Any:
    """One key/value head, so that all heads keep the same tokens."""
    return patched(architecture, num_hidden_layers=1, num_key_value_heads=1, **changes)


def _check_steps(model: Any, cache: H2OCache, text: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Feeds text one by one; every step must be a fresh forward of the kept tokens and the new one."""
    for i in range(cache.get_seq_length(), text.shape[1]):
        positions = cache.kept_positions(0)[:, 0]
        fresh = torch.cat([text.gather(1, positions), text[:, i : i + 1]], 1)
        with torch.no_grad():
            expected = model(fresh, use_cache=False).logits[:, -1]
        found = prefill(model, cache, text[:, i : i + 1])[:, -1]
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "GPTNeoX"])
@pytest.mark.parametrize("heavy", [0, 3])
def test_a_step_is_a_fresh_forward(architecture: str, heavy: int) -> None:
    model, text = _one_layer(architecture), tokens(2, 60)
    cache = H2OCache(model.config, heavy=heavy, recent=5, num_sink_tokens=2, positions="cache")
    prefill(model, cache, text[:, :20])
    _check_steps(model, cache, text)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope(rope: dict[str, Any]) -> None:
    """The model's own frequencies; yarn also scales cos and sin, which un-rotating takes back."""
    model, text = _one_layer(rope_parameters={"rope_theta": 10_000.0, **rope}), tokens(1, 60)
    cache = H2OCache.streaming(model.config, sinks=2, recent=8)
    prefill(model, cache, text[:, :20])
    _check_steps(model, cache, text)


@pytest.mark.parametrize("family", ["GPTNeoX", "StableLm", "Phi3"])
def test_partial_rotary(family: str) -> None:
    """Rotated are the first dimensions of a head, by the function itself or by the layer around it."""
    text = tokens(1, 40)
    if family == "StableLm":
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = StableLmConfig(vocab_size=64, num_key_value_heads=1, partial_rotary_factor=0.5, **sizes)
        torch.manual_seed(1)
        model = sinklora.patch(StableLmForCausalLM(config)).eval()
    elif family == "Phi3":
        model = _one_layer("Phi3", num_attention_heads=2, partial_rotary_factor=0.5)
    else:
        model = patched("GPTNeoX", num_hidden_layers=1, num_attention_heads=2, rotary_pct=0.25)
    cache = H2OCache.streaming(model.config, sinks=2, recent=6)
    prefill(model, cache, text[:, :12])
    _check_steps(model, cache, text)


def test_prompts_and_turns_are_ranked_too() -> None:
    """A chunk over kept tokens is a fresh forward of them and the chunk."""
    model, text = _one_layer(), tokens(1, 100)
    cache = H2OCache(model.config, heavy=4, recent=6, num_sink_tokens=2, positions="cache")
    for begin, end in ((0, 16), (16, 40), (40, 41), (41, 70), (70, 73), (73, 100)):
        positions = cache.kept_positions(0)[:, 0] if begin else torch.empty(1, 0, dtype=torch.int64)
        fresh = torch.cat([text.gather(1, positions), text[:, begin:end]], 1)
        with torch.no_grad():
            expected = model(fresh, use_cache=False).logits[:, begin - end :]
        torch.testing.assert_close(prefill(model, cache, text[:, begin:end]), expected, atol=2e-5, rtol=2e-5)


def test_positions_of_a_first_prompt_are_ranks_too() -> None:
    """Whatever positions the model was given: un-rotated by those, rotated by ranks."""
    model, text = _one_layer(), tokens(1, 40)
    cache, other = (H2OCache.streaming(model.config, sinks=2, recent=30) for _ in range(2))
    expected = prefill(model, other, text[:, :20])
    found = prefill(model, cache, text[:, :20], position_ids=3 * torch.arange(20)[None])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    _check_steps(model, cache, text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_times_the_trained_length(dtype: torch.dtype) -> None:
    """No rank ever leaves the trained length, and kept keys do not drift, however long the text."""
    model, text = _one_layer(max_position_embeddings=32).to(dtype), tokens(1, 20 * 32 + 3)
    cache = H2OCache.streaming(model.config, sinks=4, recent=20)
    prefill(model, cache, text[:, :24])
    one_by_one(model, cache, text[:, 24:-3])
    _check_steps(model, cache, text, 1e-4 if dtype == torch.float32 else 2e-2)
    assert cache.kept_positions(0)[0, 0].tolist() == [0, 1, 2, 3, *range(623, 643)]


def test_another_model_after_a_reset() -> None:
    """Its rotation is undone, not that of the model before."""
    model = patched()
    other = patched(rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    cache, expected = (H2OCache.streaming(each.config, 1, recent=3) for each in (model, other))
    prefill(model, cache, tokens(1, 20))
    cache.reset()
    for turn in (tokens(1, 20), *tokens(1, 5, seed=1).split(1, 1)):
        assert torch.equal(prefill(other, cache, turn), prefill(other, expected, turn))


def test_unrotating_is_exact_for_rounded_cos_and_sin() -> None:
    generator = torch.Generator().manual_seed(0)
    x, angle = torch.randn(2, 4, 7, 16, generator=generator), 100 * torch.rand(7, 8, generator=generator)
    for scale in (1.0, 1.3):
        cos, sin = (
            (scale * f(torch.cat([angle, angle], 1))).bfloat16().float() for f in (torch.cos, torch.sin)
        )
        torch.testing.assert_close(unrotate(rotate(x, cos, sin), cos, sin), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(x, cos[:, :0], sin[:, :0]), x)


def test_models_that_keep_their_position_ids() -> None:
    """Persimmon passes no position_ids to its attention: rows without padding count for themselves."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = sinklora.patch(PersimmonForCausalLM(PersimmonConfig(vocab_size=64, **sizes))).eval()
    text, cache = tokens(2, 40), H2OCache.streaming(model.config, sinks=2, recent=6)
    prefill(model, cache, text[:, :12])
    _check_steps(model, cache, text)
    padded = torch.ones(2, 12, dtype=torch.int64)
    padded[0, :3] = 0
    cache.reset()
    with pytest.raises(NotImplementedError, match=r"position_ids.*padded"):
        prefill(model, cache, text[:, :12], attention_mask=padded)


_ROPE = {"rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "config, words",
    [
        (LlamaConfig(rope_parameters={**_ROPE, "rope_type": "dynamic", "factor": 2.0}), "length.*'dynamic'"),
        (
            Phi3Config(
                rope_parameters={
                    **_ROPE,
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 48,
                    "long_factor": [2.0] * 48,
                    "original_max_position_embeddings": 4096,
                }
            ),
            "length.*'longrope'",
        ),
        (GPT2Config(), "rotary"),
        (SmolLM3Config(), "layers that all rotate alike"),
    ],
    ids=["dynamic", "longrope", "gpt2", "smollm3"],
)
def test_configs_that_are_refused(config: Any, words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        H2OCache(config, heavy=4, recent=4, positions="cache")


def test_rotations_of_pairs_are_refused() -> None:
    """Cohere rotates neighbouring dimensions against each other; the cache is untouched."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = sinklora.patch(CohereForCausalLM(CohereConfig(vocab_size=64, **sizes))).eval()
    cache = H2OCache.streaming(model.config, recent=4)
    with pytest.raises(NotImplementedError, match=r"first half.*CohereAttention"):
        prefill(model, cache, tokens(1, 8))
    assert cache.get_seq_length() == 0
    prefill(model, H2OCache(model.config, heavy=4, recent=4), tokens(1, 8))
