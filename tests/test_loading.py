"""Opening a model to generate with: folders, adapters, what the demo left, and everything else refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_support import save_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sinklora
from sinklora import cuda, extras, finetune, loading
from sinklora.loading import DEMO_FOLDER, choose_device, on_the_hub, open_for_training, open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


def save_adapter(base: Path, target: Path, *, patched: bool = True) -> torch.nn.Module:
    """A LoRA adapter whose weights are not zero; returns the adapted model."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    if patched:
        sinklora.patch(model, sinklora.SFPattern(group_size=24), eval_attention="sf")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(target)
    return adapted.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40)[None], use_cache=False).logits
    return found


def test_a_model_without_settings_gets_the_defaults(folder: Path) -> None:
    model, tokenizer, name = open_model(folder)
    assert model.config._attn_implementation == "sinklora"
    assert not model.training
    assert model.config.sinklora["group_size"] == sinklora.SFPattern().group_size
    assert tokenizer("hé")["input_ids"] == list("hé".encode())
    assert name == str(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-3, rtol=1e-3)


def test_a_model_gets_the_settings_it_was_saved_with(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    sinklora.patch(model, sinklora.SFPattern(group_size=40), eval_attention="sf").save_pretrained(tmp_path)
    open_model(folder).tokenizer.save_pretrained(tmp_path)
    found = open_model(tmp_path).model
    assert found.config.sinklora["group_size"] == 40
    # SF-Attn cannot go on from a cache: evaluation settings of that kind give way.
    assert found.config.sinklora["eval_attention"] == "full"


@pytest.mark.parametrize("patched", [True, False])
def test_an_adapter_opens_on_its_base(folder: Path, tmp_path: Path, patched: bool) -> None:
    adapted = save_adapter(folder, tmp_path / "adapter", patched=patched)
    model, tokenizer, _ = open_model(tmp_path / "adapter")
    assert model.config.sinklora["group_size"] == (24 if patched else sinklora.SFPattern().group_size)
    assert tokenizer("a")["input_ids"] == [97]  # the base model's
    torch.testing.assert_close(logits(model), logits(sinklora.unpatch(adapted)), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(model), logits(open_model(folder).model), atol=1e-2)


def test_dtype(folder: Path) -> None:
    assert open_model(folder).model.dtype == torch.float32
    assert open_model(folder, "bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^dtype: expected one of auto, .*, got int8$"):
        open_model(folder, "int8")


def test_nothing_given_is_the_demo_s_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^model: none given.*`sinklora demo`.*--model"):
        open_model()
    (tmp_path / DEMO_FOLDER).symlink_to(folder)
    assert open_model().name == DEMO_FOLDER


def test_hub_names() -> None:
    assert on_the_hub("owner/name-1.0")
    for name in ("name", "/owner/name", "./name", "../a/b", "a/b/c", "~/model", "", "owner/"):
        assert not on_the_hub(name), name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no such folder, nor a name on the Hub"),
        ("./missing", "no such folder"),
        ("", "no such folder"),
        ("file.txt", "expected a folder, got the file"),
        ("empty", "expected config.json or adapter_config.json"),
        ("garbage", "cannot open"),
        ("no-weights", "cannot open"),
        ("adapter-garbage", "cannot open"),
        ("adapter-without-base", "names no base model"),
        ("adapter-lost-base", "the base model of the adapter"),
        ("adapter-no-weights", "expected adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    name: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lora = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 8}
    files = {
        "file.txt": "",
        "empty/readme.txt": "",
        "garbage/config.json": "{",
        "no-weights/config.json": (folder / "config.json").read_text(),
        "adapter-garbage/adapter_config.json": "[]",
        "adapter-without-base/adapter_config.json": json.dumps(lora),
        "adapter-without-base/adapter_model.bin": "",
        "adapter-lost-base/adapter_model.bin": "",
        "adapter-lost-base/adapter_config.json": json.dumps(
            {**lora, "base_model_name_or_path": str(tmp_path / "gone")}
        ),
        "adapter-no-weights/adapter_config.json": json.dumps(
            {**lora, "base_model_name_or_path": str(folder)}
        ),
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        open_model(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    other = save_model(tmp_path / "other", hidden_size=32)
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(other)}))
    with pytest.raises(ValueError, match=r"^model: the adapter .* does not fit") as caught:
        open_model(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_broken_and_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"^model: .*model\.safetensors is broken: .*\w") as caught:
        open_model(broken)
    assert "\n" not in str(caught.value)

    wrong = copied(folder, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    tensors["model.layers.0.mlp.first.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"expected all weights of LlamaForCausalLM .* found no model\.layers\.0\.mlp\.up_proj\.weight; "
        r"it holds model\.layers\.0\.mlp\.first\.weight",
    ):
        open_for_training(wrong)

    other = copied(folder, tmp_path / "other")
    config = other / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 32}))
    with pytest.raises(ValueError, match=r"^model: cannot open|^model: expected all weights"):
        open_model(other)


def test_broken_and_missing_weights_of_adapters(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is broken"):
        open_model(tmp_path / "adapter")
    file.write_bytes(whole)
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not fit .*adapter_model\.safetensors has no {name}"):
        open_model(tmp_path / "adapter")
    save_file({**tensors, "base_model.model.other": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit .*has base_model\.model\.other"):
        open_model(tmp_path / "adapter")


def test_an_adapter_on_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "first")
    save_adapter(folder, tmp_path / "second")
    file = tmp_path / "second" / "adapter_config.json"
    named = {"base_model_name_or_path": str(tmp_path / "first")}
    file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    with pytest.raises(ValueError, match=r"is itself an adapter: .*first; merge that one first"):
        open_model(tmp_path / "second")


@pytest.mark.parametrize("rows", [None, 270])
def test_an_adapter_opens_with_its_positions_and_tokens(
    folder: Path, tmp_path: Path, rows: int | None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = finetune.prepare(model, 1024, pattern=sinklora.SFPattern(24), rope="yarn")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1).add_(0.01)
    adapted.save_pretrained(tmp_path)
    found = open_model(tmp_path).model
    assert found.config.rope_parameters["rope_type"] == "yarn"
    assert found.config.max_position_embeddings == 1024
    assert found.config.vocab_size == (rows or 259)
    torch.testing.assert_close(logits(found), logits(adapted.eval()), atol=1e-4, rtol=1e-4)


def test_new_tokens_without_output_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(270, mean_resizing=False)
    finetune.prepare(model, 1024).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"has embeddings of 11 tokens that .* no output layer of theirs"):
        open_model(tmp_path)


def test_a_model_to_train(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = open_for_training(folder, dtype="bfloat16")
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.bfloat16
    assert tokenizer("a")["input_ids"] == [97]
    save_adapter(folder, tmp_path)
    with pytest.raises(
        ValueError, match=r"^model: expected a model to train, got the adapter .*sinklora merge"
    ):
        open_for_training(tmp_path)
    with pytest.raises(ValueError, match=r"^quantize: expected 4bit or None, got 8bit"):
        open_for_training(folder, quantize="8bit")


def test_four_bits_need_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(extras.MissingExtraError, match=r"bitsandbytes: not installed.*sinklora\[quantize\]"):
        open_for_training(folder, quantize="4bit")
    monkeypatch.undo()

    def stand_in(source: str, options: dict[str, Any], name: str = "model") -> Any:
        seen.update(options)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(extras, "require", lambda *names: None)
    monkeypatch.setattr(loading, "open_weights", stand_in)
    open_for_training(folder, dtype="bfloat16", quantize="4bit")
    settings = seen["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_use_double_quant and settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert seen["device_map"] == {"": 0 if torch.cuda.is_available() else "cpu"}


@pytest.mark.parametrize(
    ("gpu", "built", "kernels", "expected"),
    [
        (False, False, False, "cpu"),
        (True, False, False, "cuda"),
        (True, False, True, "cpu"),
        (True, True, True, "cuda"),
    ],
)
def test_a_gpu_is_taken_where_it_serves(
    gpu: bool, built: bool, kernels: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(cuda, "takes", lambda device: built)
    assert choose_device("auto", kernels=kernels).type == expected
    assert choose_device("cpu", kernels=kernels).type == "cpu"


def test_an_adapter_of_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    settings = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="PREFIX_TUNING"):
        open_model(tmp_path)
