"""finetune.prepare: positions, what is trained, the attention, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sinklora import SFPattern, finetune

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes}))


def trained_names(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_positions_are_interpolated_and_saved(tmp_path: Path, torch_rng: torch.Generator) -> None:
    model = llama().eval()
    tokens = torch.randint(40, (1, 20), generator=torch_rng)
    plain_frequencies = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        # Interpolated by 4, positions 0, 4, 8, ... are what positions 0, 1, 2, ... were.
        before = model(tokens).logits
        assert finetune.extend_positions(model, 128) == 4.0
        after = model(tokens, position_ids=4 * torch.arange(20)[None]).logits
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        interpolated = model(tokens).logits
    assert not torch.allclose(interpolated, before, atol=1e-3)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain_frequencies / 4)
    assert model.model.rotary_emb.config is model.config
    assert model.config.max_position_embeddings == 128
    assert model.config.rope_parameters["rope_theta"] == 10000.0

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, interpolated)


def test_a_context_that_is_there_changes_nothing() -> None:
    model = llama()
    assert finetune.extend_positions(model, 32) == 1.0
    assert model.config.rope_parameters["rope_type"] == "default"
    assert model.config.max_position_embeddings == 32


def test_prepare_trains_lora_embeddings_and_norms() -> None:
    model = finetune.prepare(llama(), 128)
    kinds = {"lora_A", "lora_B", "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"}
    trained = trained_names(model)
    assert {kind for kind in kinds for name in trained if kind in name.split(".")} == kinds
    assert len([name for name in trained if "lora_A" in name]) == 2 * 4
    assert not any("mlp" in name or "lm_head" in name or "original_module" in name for name in trained)
    config = model.get_base_model().config
    assert config._attn_implementation == "sinklora"
    assert config.sinklora["group_size"] == 32
    assert model.peft_config["default"].r == 8
    assert model.peft_config["default"].lora_alpha == 16


def test_prepare_lora_alone_and_full_attention() -> None:
    model = finetune.prepare(
        llama(), 128, pattern="full", rope=None, lora_rank=2, train_embeddings_and_norms=False
    )
    assert all("lora_" in name for name in trained_names(model))
    config = model.get_base_model().config
    assert config._attn_implementation == "sdpa"
    assert config.rope_parameters["rope_type"] == "default"
    assert model.peft_config["default"].r == 2


def test_tied_embeddings_stay_tied_through_training_saving_and_merging(
    tmp_path: Path, torch_rng: torch.Generator
) -> None:
    model = finetune.prepare(llama(tie_word_embeddings=True), 64, pattern=SFPattern(16))
    tokens = torch.randint(40, (2, 64), generator=torch_rng)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model.get_base_model().get_input_embeddings().weight.clone()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    base = model.get_base_model()
    assert not torch.equal(base.get_input_embeddings().weight, before)
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "projections"),
    [
        (
            lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),
        (lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)), {"qkv_proj", "o_proj"}),
        (
            lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, attention_dropout=0.0, hidden_dropout=0.0)),
            {"query_key_value", "dense"},
        ),
    ],
    ids=["qwen3", "phi3", "gpt_neox"],
)
def test_other_families(model: Any, projections: set[str], torch_rng: torch.Generator) -> None:
    prepared = finetune.prepare(model(), 64, pattern=SFPattern(16))
    assert prepared.peft_config["default"].target_modules == projections
    tokens = torch.randint(40, (1, 64), generator=torch_rng)
    prepared.train()(input_ids=tokens, labels=tokens).loss.backward()
    grads = {name: p.grad for name, p in prepared.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert any("norm" in name for name in grads)
    assert any("embed" in name for name in grads)


def test_full_fine_tuning_trains_the_model_itself(torch_rng: torch.Generator) -> None:
    model = llama()
    assert finetune.prepare(model, 64, lora_rank=0, pattern=SFPattern(16)) is model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sinklora"
    assert model.config.max_position_embeddings == 64
    frozen = finetune.prepare(llama(), 64, lora_rank=0, train_embeddings_and_norms=False)
    names = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert names and all("norm" in name or "embed" in name for name in names)
    assert "model.layers.0.mlp.up_proj.weight" not in names


def test_target_modules() -> None:
    def targets(**options: Any) -> set[str]:
        prepared = finetune.prepare(llama(), 64, **options)
        assert isinstance(prepared, PeftModel)
        return {
            name.split(".lora_A")[0].rpartition(".")[2]
            for name in trained_names(prepared)
            if "lora_A" in name
        }

    assert targets(target_modules=["q_proj", "up_proj"]) == {"q_proj", "up_proj"}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert targets() == projections
    assert targets(target_modules="all-linear") == projections | {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("rank", "embeddings"), [(8, True), (8, False), (0, False)])
def test_gradients_through_checkpointing(
    rank: int, embeddings: bool, reentrant: bool, torch_rng: torch.Generator
) -> None:
    tokens = torch.randint(40, (1, 64), generator=torch_rng)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = finetune.prepare(
            llama(), 64, pattern=SFPattern(16), lora_rank=rank, train_embeddings_and_norms=embeddings
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_weights_in_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes is not needed here: what PEFT does for it is called, before its layers come."""
    from sinklora.finetune import prepare as module

    seen = []

    def stand_in(model: Any, use_gradient_checkpointing: bool) -> Any:
        seen.append(
            (any("lora_" in name for name, _ in model.named_parameters()), use_gradient_checkpointing)
        )
        return model

    monkeypatch.setattr(sys.modules[module.__module__], "prepare_model_for_kbit_training", stand_in)
    finetune.prepare(llama(), 64)
    assert seen == []
    model = llama()
    model.is_loaded_in_4bit = True
    finetune.prepare(model, 64)
    assert seen == [(False, False)]
    model = llama()
    model.is_loaded_in_4bit = True
    with pytest.raises(
        ValueError, match=r"^lora_rank: expected at least 1 for a model whose weights are quant"
    ):
        finetune.prepare(model, 64, lora_rank=0)


def test_models_without_rotary_positions_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=40))
    with pytest.raises(NotImplementedError, match="no rotary positions"):
        finetune.extend_positions(model, 2048)
    with pytest.raises(NotImplementedError, match="known are q_proj"):
        finetune.prepare(model, 2048)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"context": 0}, ValueError, "context"),
        ({"context": 1.5}, TypeError, "context"),
        ({"lora_rank": -1}, ValueError, "lora_rank"),
        ({"rope": "ntk"}, ValueError, "rope"),
        ({"rope": "llama3"}, ValueError, "rope"),
        ({"target_modules": ["q_proj", "wq"]}, ValueError, "target_modules"),
        ({"target_modules": "q_proj"}, TypeError, "target_modules"),
        ({"target_modules": ["q_proj"], "lora_rank": 0}, ValueError, "target_modules"),
        ({"lora_dropout": 0.1, "lora_rank": 0}, ValueError, "lora_dropout"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"pattern": 16}, TypeError, "pattern"),
        ({"pattern": "sdpa"}, TypeError, "pattern"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], name: str) -> None:
    model = llama()
    with pytest.raises(error, match=f"^{name}: expected"):
        finetune.prepare(model, **{"context": 64, **options})
    assert model.config._attn_implementation == "sdpa"


def test_a_peft_model_is_refused() -> None:
    prepared = finetune.prepare(llama(), 64)
    with pytest.raises(TypeError, match="not wrapped, got PeftModel"):
        finetune.prepare(prepared, 128)  # type: ignore[arg-type]
