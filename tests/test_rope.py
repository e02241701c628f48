"""Stretched rotary positions: what transformers builds from the config, saves and opens, and what adapters
carry."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import sinklora
from sinklora import SFPattern, finetune
from sinklora.hf.rope import context_of, set_positions
from sinklora.hf.saving import read_positions

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "initializer_range": 0.2,
}
MORE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen3": {"head_dim": 16},
    "Phi3": {},
    "GPTNeoX": {"hidden_dropout": 0.0},
}
PATTERN = SFPattern(16)
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tiny(family: str = "Llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **MORE[family], **changes})
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.eval()


def logits(model: torch.nn.Module, length: int = 100) -> torch.Tensor:
    tokens = torch.randint(40, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("rope", ["linear", "yarn", "dynamic"])
@pytest.mark.parametrize("family", MORE)
def test_a_stretched_model_is_the_one_its_config_builds(family: str, rope: Any, tmp_path: Path) -> None:
    model = tiny(family)
    plain = logits(model)
    if (family, rope) == ("Phi3", "dynamic"):
        with pytest.raises(NotImplementedError, match=r"Phi3Config does not take .*'dynamic'"):
            finetune.extend_positions(model, 128, rope)
        assert torch.equal(logits(model), plain)
        return
    assert finetune.extend_positions(model, 128, rope) == 4.0
    assert context_of(model.config) == 128
    stretched = logits(model)
    assert not torch.allclose(stretched, plain, atol=1e-3)
    built = type(model)(type(model.config)(**model.config.to_dict())).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(logits(built), stretched)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), stretched)


def test_phi3_holds_other_scalings_as_longrope() -> None:
    model, llama = tiny("Phi3"), tiny()
    for rope in ("linear", "yarn"):
        model, llama = tiny("Phi3"), tiny()
        finetune.extend_positions(model, 128, rope)  # type: ignore[arg-type]
        finetune.extend_positions(llama, 128, rope)  # type: ignore[arg-type]
        ours, theirs = (each.model.rotary_emb for each in (model, llama))
        assert ours.rope_type == "longrope"
        assert model.config.rope_parameters["factor"] == 4.0
        torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0.0)
        assert ours.attention_scaling == pytest.approx(theirs.attention_scaling)
        logits(model)  # a text beyond the original length takes the "long" factors
        torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("base", "rope", "expected", "length", "words"),
    [
        (LINEAR, "linear", {**LINEAR, "factor": 8.0}, 128, "linear scaling by 8 .*own 2 times 4"),
        (YARN, "yarn", {**YARN, "factor": 8.0}, 128, "yarn scaling by 8 .*own 2 times 4"),
        (LLAMA3, "llama3", {**LLAMA3, "factor": 16.0}, 128, "llama3 scaling by 16 .*own 4 times 4"),
        (DYNAMIC, "dynamic", {**DYNAMIC, "factor": 4.0}, 32, "dynamic scaling by 4 .*own 2 times 2"),
        (YARN, "linear", {**LINEAR, "factor": 8.0}, 128, "own yarn scaling from 16 .*replaced by linear .*8"),
        (LLAMA3, "yarn", {**YARN, "factor": 8.0}, 128, "own llama3 .*replaced by yarn scaling by 8 from 16"),
        (LLAMA3, "dynamic", {**DYNAMIC, "factor": 8.0}, 16, "own llama3 .*replaced by dynamic"),
        (LINEAR, "yarn", {**YARN, "factor": 8.0}, 128, "own linear scaling from 16 tokens is replaced"),
        (
            {**YARN, "attention_factor": 1.25, "beta_fast": 16.0},
            "yarn",
            {**YARN, "attention_factor": 1.25, "beta_fast": 16.0, "factor": 8.0},
            128,
            "yarn scaling by 8",
        ),
    ],
)
def test_positions_that_scale_already(
    base: dict[str, Any],
    rope: Any,
    expected: dict[str, Any],
    length: int,
    words: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    model = tiny(rope_parameters=dict(base))
    caplog.set_level(logging.INFO, "sinklora")
    reach = context_of(model.config)
    assert reach == (64 if base is DYNAMIC else 32)
    plan = finetune.plan_positions(model.config, 128, rope)
    assert model.config.rope_parameters == base
    assert finetune.extend_positions(model, 128, rope) == 128 / reach == plan.factor
    assert model.config.rope_parameters == expected == plan.positions.rope_parameters
    assert model.config.max_position_embeddings == length
    assert context_of(model.config) == 128
    assert len(caplog.messages) == 1
    assert plan.words in caplog.text
    assert f"{reach} tokens become 128" in caplog.text
    assert re.search(words, caplog.text), caplog.text
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_yarn_s_own_attention_factor_follows_the_factor() -> None:
    model = tiny(rope_parameters={**YARN, "attention_factor": 0.1 * math.log(2.0) + 1.0})
    finetune.extend_positions(model, 128, "yarn")
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(8.0) + 1.0)


def test_a_yarn_config_beside_an_unchanged_length_reaches_further() -> None:
    model = tiny(rope_parameters={**YARN, "original_max_position_embeddings": 32, "factor": 4.0})
    assert context_of(model.config) == 128
    assert finetune.extend_positions(model, 128, "yarn") == 1.0
    assert finetune.extend_positions(model, 256, "yarn") == 2.0
    assert model.config.rope_parameters["factor"] == 8.0


def test_the_module_stays_and_so_do_its_hooks() -> None:
    model = tiny(rope_parameters=dict(DYNAMIC))
    rotary = model.model.rotary_emb
    calls = []
    rotary.register_forward_hook(lambda *args: calls.append(1))
    logits(model, 120)  # its frequencies are now those of 120 tokens
    finetune.extend_positions(model, 256, "linear")
    assert model.model.rotary_emb is rotary
    assert rotary.config is model.config
    fresh = tiny(rope_parameters={**LINEAR, "factor": 8.0}, max_position_embeddings=256)
    calls.clear()
    assert torch.equal(logits(model), logits(fresh))
    assert calls == [1]


def test_frequencies_kept_for_longer_texts_go() -> None:
    phi3 = {"original_max_position_embeddings": 32}
    model = tiny("Phi3", **phi3)
    finetune.extend_positions(model, 64)
    logits(model, 60)  # longrope keeps what it computed for texts beyond the original length
    finetune.extend_positions(model, 256)
    fresh = tiny("Phi3", **phi3)
    finetune.extend_positions(fresh, 256)
    assert model.config.rope_parameters["factor"] == 8.0
    assert torch.equal(logits(model), logits(fresh))


def test_weights_in_bfloat16_get_exact_frequencies() -> None:
    model = tiny().bfloat16()
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    finetune.extend_positions(model, 128)
    expected = tiny(rope_parameters={**LINEAR, "factor": 4.0}).model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=0.0, atol=0.0)


def test_what_is_refused_changes_nothing() -> None:
    model = tiny()
    before = logits(model)
    with pytest.raises(ValueError, match=r'^rope: expected "llama3" for a model with such .*default'):
        finetune.extend_positions(model, 128, "llama3")
    with pytest.raises(ValueError, match=r"^rope: expected one of linear, yarn, dynamic, llama3 or None"):
        finetune.extend_positions(model, 128, "ntk")  # type: ignore[arg-type]
    model.model.rotary_emb.inv_freq.mul_(0.5)  # a module that does not follow its config
    model.model.rotary_emb.original_inv_freq.mul_(0.5)
    with pytest.raises(NotImplementedError, match="does not follow config"):
        finetune.extend_positions(model, 128)
    model.model.rotary_emb.inv_freq.mul_(2.0)
    assert model.config.max_position_embeddings == 32
    assert torch.equal(logits(model), before)


def test_different_positions_in_different_layers_are_refused() -> None:
    sizes = {**SIZES, "head_dim": 16, "final_logit_softcapping": None}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))
    with pytest.raises(NotImplementedError, match=r"different positions in different layers \(\w+, \w+\)"):
        finetune.extend_positions(model, 128)


def test_prepare_stretches_nothing_where_the_attention_is_refused() -> None:
    model = tiny(attention_dropout=0.5)
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        finetune.prepare(model, 128)
    assert model.config.max_position_embeddings == 32
    assert torch.equal(logits(model), logits(tiny(attention_dropout=0.5)))


# ---- adapters carry their positions ----


def save_adapter(folder: Path, rope: Any = "linear", pattern: Any = PATTERN) -> torch.Tensor:
    """An adapter at 128 tokens with weights that are not zero; returns its logits."""
    model = finetune.prepare(tiny(), 128, rope=rope, pattern=pattern)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("pattern", [PATTERN, "full"])
@pytest.mark.parametrize("rope", ["linear", "dynamic"])
def test_an_adapter_brings_its_positions(rope: str, pattern: Any, tmp_path: Path) -> None:
    expected = save_adapter(tmp_path, rope, pattern)
    settings = json.loads((tmp_path / "sinklora.json").read_text())
    assert ("group_size" in settings) == (pattern != "full")
    assert settings["rope_parameters"]["rope_type"] == rope
    base = tiny()
    late = sinklora.patch(PeftModel.from_pretrained(tiny(), tmp_path), tmp_path)
    early = PeftModel.from_pretrained(sinklora.patch(base, tmp_path), tmp_path)
    for model in (early, late, sinklora.patch(late, tmp_path)):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    sinklora.unpatch(early)  # the weights are for these positions, whatever the attention
    torch.testing.assert_close(logits(early), expected, atol=1e-4, rtol=1e-4)
    assert base.config._attn_implementation == "sdpa"
    assert "rope_parameters" not in getattr(base.config, "sinklora", {})


def test_patched_gives_the_positions_back(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    model = tiny()
    before = logits(model)
    with sinklora.patched(model, tmp_path):
        assert model.config.max_position_embeddings == 128
    assert torch.equal(logits(model), before)
    assert model.config.max_position_embeddings == 32
    sinklora.patch(model, tmp_path)  # nor does it think that they were set before


def test_files_without_positions_still_open(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "sinklora.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if "rope" not in k and "max" not in k}
    file.write_text(json.dumps(old))
    assert read_positions(tmp_path) is None
    model = sinklora.patch(tiny(), tmp_path)
    assert model.config.sinklora == old
    assert model.config.max_position_embeddings == 32


def test_other_models_and_other_positions_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "linear")
    save_adapter(tmp_path / "yarn", "yarn")
    model = sinklora.patch(tiny(), tmp_path / "linear")
    with pytest.raises(ValueError, match=r"yarn: trained with positions of yarn by 4 .*open the base again"):
        sinklora.patch(model, tmp_path / "yarn")
    assert model.config.rope_parameters["rope_type"] == "linear"
    other = tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(ValueError, match=r"linear: rope_theta: expected the base .*10000.*500000"):
        sinklora.patch(other, tmp_path / "linear")
    assert other.config._attn_implementation == "sdpa"
    scaled = tiny(rope_parameters=dict(LINEAR))  # as it was loaded: the adapter knows better
    sinklora.patch(scaled, tmp_path / "linear")
    assert scaled.config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": 3}, "rope_parameters: expected an object with a rope_type, got 3"),
        ({"rope_parameters": {"factor": 2.0}}, "rope_parameters: expected an object"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings: expected a number of tokens"),
        ({"max_position_embeddings": None}, "max_position_embeddings: expected a number of tokens"),
    ],
)
def test_bad_files(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "sinklora.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"sinklora\.json: {words}"):
        sinklora.patch(tiny(), tmp_path)


def test_positions_of_a_config_alone() -> None:
    config = LlamaConfig(**SIZES, rope_parameters=dict(DYNAMIC))
    plan = finetune.plan_positions(config, 512, "yarn")
    assert plan.positions.rope_parameters["factor"] == 16.0
    assert plan.factor == 8.0
    assert finetune.plan_positions(config, 64).words.startswith("unchanged")
    model = tiny()
    set_positions(model, plan.positions)
    assert context_of(model.config) == 512
