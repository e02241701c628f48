"""Folders as LongLoRA's scripts wrote them: an adapter, and a pickle of embeddings and norms."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_support import CONTEXT, logits, save_base, shake
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinklora import finetune
from sinklora.loading import open_model
from sinklora.merge import merge_adapter

ROWS = 260  # the base's 259, and a token to pad with


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("models") / "base")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("pad_token", None)
    file.write_text(json.dumps(settings))
    return folder


def save_longlora(
    base: Path, folder: Path, *, prefix: str = "", safetensors: bool = False
) -> torch.nn.Module:
    """What training with LongLoRA's fine-tune.py and get_trainable_weights.py leaves; returns the model."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-1] = before.mean(dim=0)
    finetune.extend_positions(model, 4 * CONTEXT)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=projections, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "embed" in name or "norm" in name:
            parameter.requires_grad_()
    shake(adapted)
    folder.mkdir(parents=True)
    lora = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if safetensors:
        from safetensors.torch import save_file

        save_file(lora, folder / "adapter_model.safetensors")
    else:
        torch.save(lora, folder / "adapter_model.bin")
    trained = {
        prefix + name.removeprefix("base_model.model."): value
        for name, value in adapted.state_dict().items()
        if "embed" in name or "norm" in name
    }
    trained[f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(trained, folder / "trainable_params.bin")
    # Entries of PEFT 0.4, which later versions have dropped, among them.
    settings = {
        "base_model_name_or_path": "somewhere/llama",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": projections,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return adapted


@pytest.fixture(scope="module")
def old(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("longlora") / "old"
    return folder, logits(save_longlora(base, folder), ROWS)


@pytest.mark.parametrize("stretch", [{"context": 4 * CONTEXT}, {"rope_factor": 4.0}])
def test_an_old_folder_converts(
    base: Path, old: tuple[Path, torch.Tensor], stretch: dict[str, Any], tmp_path: Path
) -> None:
    folder, expected = old
    result = merge_adapter(folder, tmp_path / "out", base=str(base), **stretch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model, ROWS), expected, atol=1e-4, rtol=1e-4)
    assert model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == result.context == 4 * CONTEXT
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == ROWS and tokenizer.pad_token == "[PAD]"


def test_other_spellings(base: Path, tmp_path: Path) -> None:
    adapted = save_longlora(base, tmp_path / "old", prefix="base_model.model.", safetensors=True)
    # 3.5 contexts: LongLoRA's scripts took the next whole factor.
    result = merge_adapter(tmp_path / "old", tmp_path / "out", base=str(base), context=7 * CONTEXT // 2)
    assert (result.rope, result.context) == ("linear by 4", 7 * CONTEXT // 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model, ROWS), logits(adapted, ROWS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("stretch", "words"),
    [
        ({}, "context: expected the tokens that .* was trained at, or instead --rope-factor.*got neither"),
        ({"context": 256, "rope_factor": 4.0}, "context: .* got both"),
        ({"context": 0}, "context: expected at least 1"),
        ({"rope_factor": 0.5}, "rope_factor: expected at least 1"),
        ({"rope_factor": float("nan")}, "rope_factor: expected at least 1"),
    ],
)
def test_how_far_positions_went_must_be_said(
    base: Path, old: tuple[Path, torch.Tensor], stretch: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="^" + words):
        merge_adapter(old[0], tmp_path / "out", base=str(base), **stretch)
    assert list(tmp_path.iterdir()) == []


def test_opening_one_to_generate_is_refused(
    base: Path, old: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder = copy(old[0], tmp_path / "old", base)
    with pytest.raises(ValueError, match=r"is an old LongLoRA folder .*sinklora merge .* --context TOKENS"):
        open_model(folder)


def copy(folder: Path, target: Path, base: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))
    return target


class Hostile:
    """What a pickle can do to those who open it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def hostile(path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump({"model.norm.weight": Hostile()}, file)


def hostile_archive(path: Path) -> None:
    torch.save({"model.norm.weight": Hostile()}, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def change(**entries: Any) -> Any:
    def apply(path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **entries}, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (hostile, "trainable_params.bin holds more than tensors.*refused"),
        (hostile_archive, "trainable_params.bin holds more than tensors.*refused"),
        (cut, "trainable_params.bin is broken"),
        (lambda path: path.write_bytes(b""), "trainable_params.bin is broken"),
        (lambda path: torch.save([1], path), "trainable_params.bin: expected tensors by name, got list"),
        (change(**{"model.wrong.weight": torch.ones(3)}), "holds model.wrong.weight, which .* not have"),
        (change(**{"model.norm.weight": torch.ones(3)}), r"holds model.norm.weight of shape \(3,\)"),
    ],
)
def test_bad_files(
    base: Path,
    old: tuple[Path, torch.Tensor],
    damage: Any,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy(old[0], tmp_path / "old", base)
    damage(folder / "trainable_params.bin")
    with pytest.raises(ValueError, match=words) as caught:
        merge_adapter(folder, tmp_path / "out", context=4 * CONTEXT)
    assert not re.search("\n", str(caught.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_a_base_whose_positions_scale_is_refused(old: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    base = save_base(tmp_path / "base", rope_parameters=scaled)
    with pytest.raises(ValueError, match=r"^base: expected a model whose positions do not scale yet.*linear"):
        merge_adapter(old[0], tmp_path / "out", base=str(base), context=256)
