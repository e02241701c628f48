"""Losses of a continuation against one forward over the whole text, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sinklora.evaluation.continuation import continuation_losses


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


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("prompt", [1, 8, 19])
def test_equals_one_forward(
    small_model: LlamaForCausalLM, torch_rng: torch.Generator, prompt: int, chunk: int
) -> None:
    tokens = torch.randint(32, (3, 20), generator=torch_rng)
    counted: list[int] = []
    cache = DynamicCache(config=small_model.config)
    losses, seconds = continuation_losses(
        small_model, tokens, prompt, cache, chunk=chunk, on_tokens=counted.append
    )
    with torch.no_grad():
        logits = small_model(input_ids=tokens).logits[:, prompt - 1 : -1]
    expected = -logits.log_softmax(-1).gather(2, tokens[:, prompt:, None])[..., 0]
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert seconds >= 0
    assert sum(counted) == 3 * 19 == 3 * cache.get_seq_length()


def test_leaves_the_mode(small_model: LlamaForCausalLM) -> None:
    cache = DynamicCache(config=small_model.config)
    continuation_losses(small_model.train(), torch.arange(4)[None], 2, cache)
    assert small_model.training
    small_model.eval()


@pytest.mark.parametrize(
    ("shape", "prompt", "chunk", "name"),
    [((4,), 2, 1, "tokens"), ((1, 4), 0, 1, "prompt"), ((1, 4), 4, 1, "prompt"), ((1, 4), 2, 0, "chunk")],
)
def test_refuses(
    small_model: LlamaForCausalLM, shape: tuple[int, ...], prompt: int, chunk: int, name: str
) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        continuation_losses(small_model, tokens, prompt, DynamicCache(config=small_model.config), chunk=chunk)
