"""What patch and the attention function refuse, and that they say what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_support import PATTERN, tiny, tokens
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import sinklora
from sinklora.hf.attention import sinklora_attention


def _name(model: torch.nn.Module) -> str:
    return model.config._attn_implementation


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.train()(ids, use_cache=False).logits


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
