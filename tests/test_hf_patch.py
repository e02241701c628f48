"""patch, unpatch, patched: what they change, say and refuse."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_support import PATTERN, tiny, tokens
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinklora
from sinklora.hf_attention import sinklora_attention

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


# ---- refusals ----


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (((), {"pattern": PATTERN, "group_ratio": 0.25}), ValueError, "group_ratio"),
        (((), {"context": 64}), ValueError, "context"),
        (((), {"group_ratio": 2.0}), ValueError, "ratio"),
        (((PATTERN,), {"eval_attention": "half"}), ValueError, "eval_attention.*full.*half"),
        ((("no/such/directory",), {}), ValueError, "no/such/directory"),
        (((8,), {}), TypeError, "pattern.*int"),
        (((sinklora.SFPattern(causal=False),), {}), ValueError, "causal"),
    ],
)
def test_bad_settings(arguments: tuple[Any, Any], error: type[Exception], words: str) -> None:
    model = tiny()
    with pytest.raises(error, match=words):
        sinklora.patch(model, *arguments[0], **arguments[1])
    assert _name(model) == "sdpa" and not hasattr(model.config, "sinklora")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"group_size": 0}', "group_size"),
        ('{"group_size": "8"}', "group_size"),
        ('{"num_sink_tokens": 4}', "group_size"),
        ('{"group_size": 8, "window": 3}', "window"),
        ('{"group_size": 8, "eval_attention": "none"}', "eval_attention"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "sinklora.json").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)sinklora\.json.*{words}"):
        sinklora.patch(tiny(), tmp_path)


def test_directory_without_settings(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"sinklora\.json"):
        sinklora.patch(tiny(), tmp_path)


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="Linear"):
        sinklora.patch(torch.nn.Linear(2, 2), PATTERN)


def _small(config_class: type, **changes: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return config_class(**{**sizes, "num_attention_heads": 8, **changes})


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: tiny(attention_dropout=0.1), "attention_dropout.*0.1"),
        (lambda: Gemma2ForCausalLM(_small(Gemma2Config, head_dim=8)), "attn_logit_softcapping.*50"),
        (
            lambda: GptOssForCausalLM(_small(GptOssConfig, head_dim=8, num_local_experts=2)),
            "sink logits.*GptOssAttention",
        ),
        (lambda: BertLMHeadModel(_small(BertConfig)), "non-causal"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4)), "Bloom"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
            ),
            "encoder-decoder",
        ),
    ],
    ids=["dropout", "softcap", "sinks", "bert", "bloom", "t5"],
)
def test_models_that_are_refused(build: Any, words: str) -> None:
    model = build()
    name = _name(model)
    with pytest.raises(NotImplementedError, match=words):
        sinklora.patch(model, PATTERN)
    assert _name(model) == name and not hasattr(model.config, "sinklora")


def _call(training: bool, n_query: int = 16, n_key: int = 16, mask: Any = None, **arguments: Any) -> Any:
    module = sinklora.patch(tiny(), PATTERN).model.layers[0].self_attn.train(training)
    query, key = torch.randn(1, 8, n_query, 8), torch.randn(1, 2, n_key, 8)
    return sinklora_attention(module, query, key, key, mask, **arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"n_query": 3}, "past_key_values.*3 and 16"),
        ({"dropout": 0.1}, "attention_dropout.*0.1"),
        ({"sliding_window": 8}, "sliding_window.*16.*8"),
        ({"position_bias": torch.zeros(1, 8, 16, 16)}, "position_bias"),
        ({"is_causal": False}, "is_causal"),
        ({"mask": torch.ones(1, 1, 16, 16, dtype=torch.bool)}, "attention_mask"),
        ({"mask": torch.zeros(1, 1, 16, 16)}, "attention_mask"),
        ({"mask": torch.ones(1, 8, 16, 16, dtype=torch.bool).tril()}, "attention_mask"),
        ({"mask": torch.empty(0, dtype=torch.int64)}, "position_ids"),
    ],
)
def test_calls_refused_in_training(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        _call(True, **arguments)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name, value",
    [
        ("softcap", 50.0),
        ("s_aux", torch.zeros(8)),
        ("sinks", torch.zeros(8)),
        ("indices", torch.zeros(1)),
        ("output_attentions", True),
    ],
)
def test_calls_refused_in_both_modes(training: bool, name: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=name):
        _call(training, **{name: value})


def test_windows_that_do_not_bite_are_taken() -> None:
    assert torch.equal(_call(True, sliding_window=16)[0].isnan().any(), torch.tensor(False))
    model, ids = tiny("Mistral", sliding_window=16), tokens(1, 16)
    expected = _logits(sinklora.patch(tiny("Mistral", sliding_window=None), PATTERN), ids)
    assert torch.equal(_logits(sinklora.patch(model, PATTERN), ids), expected)
    with pytest.raises(NotImplementedError, match="sliding_window"):
        _logits(model, tokens(1, 17))


def test_cu_seq_lens_of_other_sequences() -> None:
    cu_seqlens = torch.tensor([0, 16], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        _call(True, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=torch.tensor([0, 8, 16]))
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        _call(False, n_query=3, cu_seq_lens_q=cu_seqlens)
