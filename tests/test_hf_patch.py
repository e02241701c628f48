"""patch, unpatch, patched: what they change, say and refuse."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from hf_support import PATTERN, tiny, tokens
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinklora
from sinklora.hf.attention import sinklora_attention

SETTINGS = {
    "group_size": 8,
    "num_sink_tokens": 2,
    "shifted_fraction": 0.25,
    "shift": None,
    "causal": True,
    "eval_attention": "full",
}


def _name(model: torch.nn.Module) -> str:
    return model.config._attn_implementation


def _logits(model: torch.nn.Module, ids: torch.Tensor, training: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return model.train(training)(ids, use_cache=False).logits


def test_register_is_idempotent() -> None:
    sinklora.register()
    sinklora.register()
    assert ALL_ATTENTION_FUNCTIONS["sinklora"] is sinklora_attention


def test_patch_and_unpatch() -> None:
    model = tiny(attn_implementation="eager")
    forwards = {type(module).forward for module in model.modules()}
    assert sinklora.patch(model, PATTERN) is model
    assert _name(model) == "sinklora" and model.config.sinklora == SETTINGS
    assert sinklora.patch(model, PATTERN) is model  # once more changes nothing
    assert model.config.sinklora == SETTINGS
    assert {type(module).forward for module in model.modules()} == forwards
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert sinklora.unpatch(model) is model
    assert _name(model) == "eager" and not hasattr(model.config, "sinklora")
    assert sinklora.unpatch(model) is model and _name(model) == "eager"


def test_patched_nests_and_restores() -> None:
    model = tiny()
    with sinklora.patched(model, PATTERN) as outer:
        assert outer is model and model.config.sinklora["group_size"] == 8
        with pytest.raises(KeyError), sinklora.patched(model, sinklora.SFPattern(group_size=4)):
            assert model.config.sinklora["group_size"] == 4
            raise KeyError
        assert model.config.sinklora == SETTINGS and _name(model) == "sinklora"
        with sinklora.patched(model, PATTERN):
            sinklora.unpatch(model)
        assert _name(model) == "sinklora"
    assert _name(model) == "sdpa" and not hasattr(model.config, "sinklora")
    sinklora.patch(model, PATTERN)
    with sinklora.patched(model, sinklora.SFPattern(group_size=4)):
        pass
    sinklora.unpatch(model)
    assert _name(model) == "sdpa" and not hasattr(model.config, "sinklora")


def test_switching_at_run_time() -> None:
    model, ids = tiny(), tokens(1, 40)
    full = _logits(model, ids)
    sinklora.patch(model, PATTERN)
    sparse = _logits(model, ids)
    assert not torch.allclose(sparse, full, atol=1e-3)
    model.set_attn_implementation("sdpa")
    assert torch.equal(_logits(model, ids), full)
    model.set_attn_implementation("sinklora")
    assert torch.equal(_logits(model, ids), sparse)


def test_copies_are_independent() -> None:
    model = sinklora.patch(tiny(), PATTERN)
    clone = copy.deepcopy(model)
    sinklora.unpatch(clone)
    assert _name(clone) == "sdpa" and _name(model) == "sinklora"


# ---- what it says ----


def test_one_line_says_what_is_active(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sinklora")
    model = sinklora.patch(tiny(), PATTERN)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    for part in ("LlamaForCausalLM", "group_size 8", "2 sink", "2 of 8 heads shifted by 4", "full causal"):
        assert part in record.getMessage()
    caplog.clear()
    _logits(model, tokens(1, 40))
    assert not caplog.records


def test_short_rows_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    model = sinklora.patch(tiny(), PATTERN)
    _logits(model, tokens(1, 8), training=False)
    assert not caplog.records
    for _ in range(2):
        _logits(model, tokens(1, 8))
    (record,) = caplog.records
    assert "8 tokens is no longer than a group of 8" in record.getMessage()


def test_few_heads_warn(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(num_attention_heads=2, num_key_value_heads=2)
    sinklora.patch(model, PATTERN)
    assert "no head is shifted" in caplog.text
    caplog.clear()
    sinklora.patch(model, sinklora.SFPattern(group_size=8, shifted_fraction=0.0))
    assert not caplog.records


def test_name_alone_uses_defaults_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sinklora")
    sinklora.register()
    model = tiny(attn_implementation="sinklora")
    _logits(model, tokens(1, 12), training=False)
    _logits(model, tokens(1, 12), training=False)
    (record,) = caplog.records
    assert "defaults" in record.getMessage() and "2048" in record.getMessage()
    sinklora.unpatch(model)
    assert _name(model) == "sdpa"


# ---- settings ----


def test_group_ratio() -> None:
    model = sinklora.patch(tiny(), group_ratio=1 / 4)
    assert model.config.sinklora["group_size"] == 32  # of max_position_embeddings, 128
    sinklora.patch(model, group_ratio=1 / 4, context=50)
    assert model.config.sinklora["group_size"] == 13


def test_settings_are_saved_with_the_model(tmp_path: Path) -> None:
    model = sinklora.patch(tiny(), PATTERN, eval_attention="sf")
    model.save_pretrained(tmp_path)
    saved = {**SETTINGS, "eval_attention": "sf"}
    assert json.loads((tmp_path / "config.json").read_text())["sinklora"] == saved
    assert not (tmp_path / "sinklora.json").exists()
    ids = tokens(1, 40)
    for again in (
        sinklora.patch(AutoModelForCausalLM.from_pretrained(tmp_path)),
        sinklora.patch(tiny(), tmp_path),
        sinklora.patch(tiny(), str(tmp_path)),
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sinklora"),
    ):
        assert again.config.sinklora == saved and _name(again) == "sinklora"
        assert torch.equal(_logits(again, ids), _logits(model, ids))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _name(plain) == "sdpa"
    assert sinklora.patch(plain, eval_attention="full").config.sinklora == SETTINGS


def _llava() -> LlavaForConditionalGeneration:
    text = tiny().config
    config = LlavaConfig(
        text_config=text.to_dict(),
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def test_multimodal_models_switch_their_text_model_only(tmp_path: Path) -> None:
    model, ids = _llava(), tokens(1, 40)
    full = _logits(model, ids, training=False)
    sinklora.patch(model, PATTERN)
    assert _name(model.model.language_model) == "sinklora" and model.config.sinklora == SETTINGS
    assert model.config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(_logits(model, ids, training=False), full, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(_logits(model, ids), full, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = sinklora.patch(LlavaForConditionalGeneration.from_pretrained(tmp_path))
    assert torch.equal(_logits(again, ids), _logits(model, ids))
    sinklora.unpatch(model)
    assert _name(model.model.language_model) == "sdpa" and not hasattr(model.config.text_config, "sinklora")
