"""sinklora merge: the merged model is the adapter's model, alone, or nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_support import CONTEXT, logits, save_adapter, save_base
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinklora import cli, merge
from sinklora.loading import open_model
from sinklora.merge import MARKER, merge_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "adapter"
    save_adapter(base, folder)
    return folder


def reopened(folder: Path) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return model


@pytest.mark.parametrize("rope", ["linear", "yarn", "dynamic", None])
def test_the_merged_model_is_the_adapter_s(base: Path, tmp_path: Path, rope: Any) -> None:
    expected = logits(save_adapter(base, tmp_path / "adapter", rope=rope))
    result = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    model = reopened(tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), expected, atol=0.05)
    assert model.config.rope_parameters["rope_type"] == (rope or "default")
    assert result.context == (2 * CONTEXT if rope else CONTEXT)
    assert result.check.difference < 1e-5
    assert model.config._attn_implementation == "sdpa"
    assert model.config.sinklora["group_size"] == 16  # plain JSON that transformers does not mind
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("é")["input_ids"] == list("é".encode())
    assert tokenizer.model_max_length == result.context
    assert open_model(tmp_path / "out").model.config.sinklora["group_size"] == 16
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("rows", [None, 263])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", [True, False])
def test_vocabulary_and_ties(tmp_path: Path, tied: bool, rows: int | None, embeddings: bool) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    adapted = save_adapter(base, tmp_path / "adapter", rows=rows, train_embeddings_and_norms=embeddings)
    expected = logits(adapted, rows or 259)
    result = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    model = reopened(tmp_path / "out")
    torch.testing.assert_close(logits(model, rows or 259), expected, atol=1e-4, rtol=1e-4)
    assert model.config.vocab_size == result.vocabulary == (rows or 259)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == result.tied
    assert model.config.tie_word_embeddings == tied


def test_embeddings_that_training_untied_stay_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    assert not merge_adapter(tmp_path / "adapter", tmp_path / "out").tied
    assert not reopened(tmp_path / "out").config.tie_word_embeddings
    torch.testing.assert_close(logits(reopened(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(base: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    result = merge_adapter(adapter, tmp_path / "out", dtype=dtype)
    assert result.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    # The float32 sum, rounded once.
    merge_adapter(adapter, tmp_path / "exact", dtype="float32")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, exact[name].to(value.dtype)), name
    # What the base was saved in.
    low = save_base(tmp_path / "low")
    AutoModelForCausalLM.from_pretrained(low, dtype=getattr(torch, dtype)).save_pretrained(low)
    assert merge_adapter(adapter, tmp_path / "auto", base=str(low)).dtype == dtype


def test_a_result_that_differs_is_not_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = merge._merged

    def wrong(*arguments: Any) -> Any:
        model: Any = original(*arguments)
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight.mul_(1.05)
        return model

    monkeypatch.setattr(merge, "_merged", wrong)
    with pytest.raises(
        RuntimeError, match=r"^output: the merged model's logits differ .*nothing was written"
    ):
        merge_adapter(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_smaller_results_leave_nothing_of_larger_ones(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_adapter(adapter, out, shard_size="100KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    (out / "notes.txt").write_text("mine")
    merge_adapter(adapter, out)
    assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"
    reopened(out)
    values = json.loads((out / MARKER).read_text())
    assert values["dtype"] == "float32" and values["check"]["agreement"] == 1.0


def test_the_card(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nlibrary_name: peft\n---\nTrained on novels.\n")
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "library_name: peft" not in card and card.endswith("Trained on novels.\n")
    assert "linear by 2, 128 tokens" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype: expected one of auto"),
        ({"shard_size": "many"}, "shard_size: expected a size"),
        ({"device": "cuda:77"}, "device: expected auto or one that is here"),
        ({"base": "./gone"}, "base: no such folder, nor a name on the Hub (owner/name): './gone'"),
        ({"context": 128}, "context: expected only for adapters that do not carry their positions"),
        ({"rope_factor": 2.0}, "rope_factor: expected only for adapters"),
    ],
)
def test_bad_settings(
    adapter: Path, tmp_path: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="^" + re.escape(words)) as caught:
        merge_adapter(adapter, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for place in (base, adapter):
        with pytest.raises(ValueError, match=r"^output: expected another folder than the"):
            merge_adapter(adapter, place)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^output: expected a new or empty folder"):
        merge_adapter(adapter, tmp_path / "other")
    with pytest.raises(ValueError, match=r"^model: expected the folder of an adapter"):
        merge_adapter(base, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_that_cannot_be_written(adapter: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"^output: cannot write into"):
        merge_adapter(adapter, tmp_path / "out")


def test_an_output_below_a_file(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^output: cannot write into"):
        merge_adapter(adapter, tmp_path / "file" / "out")


def test_a_full_disk_is_named_and_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "write_card", full)
    with pytest.raises(OSError, match=r"^output: .*out cannot be written: No space left"):
        merge_adapter(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["missing", "factor"])
def test_adapters_that_do_not_fit(adapter: Path, tmp_path: Path, broken: str) -> None:
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(adapter, tmp_path / "copy")
    if broken == "missing":
        weights = load_file(copied / "adapter_model.safetensors")
        name = sorted(weights)[0]
        del weights[name]
        save_file(weights, copied / "adapter_model.safetensors")
        words = re.escape(f"adapter_model.safetensors has no {name}")
    else:
        settings = json.loads((copied / "sinklora.json").read_text())
        settings["rope_parameters"]["factor"] = -2
        (copied / "sinklora.json").write_text(json.dumps(settings))
        words = "expected a factor above 0, got -2"
    with pytest.raises(ValueError, match=words):
        merge_adapter(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", str(adapter), "--output", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "linear by 2, 128 tokens" in said and "100.0% of the" in said
    for arguments, words in (
        ([str(adapter), "--output", str(tmp_path / "b"), "--context", "9"], "'--context': expected only for"),
        ([str(tmp_path), "--output", str(tmp_path / "b")], "'ADAPTER': expected the folder of an adapter"),
        ([str(adapter), "--output", str(adapter)], "'--output': expected another folder"),
    ):
        assert cli.main(["merge", *arguments]) == 2
        assert words in capsys.readouterr().err
