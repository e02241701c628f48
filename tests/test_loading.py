"""Opening a model to generate with: folders, adapters, what the demo left, and everything else refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_support import save_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import sinklora
from sinklora.loading import DEMO_FOLDER, on_the_hub, open_model


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


def test_an_adapter_of_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    settings = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="PREFIX_TUNING"):
        open_model(tmp_path)
