"""Training with a patched model: checkpointing, autocast, torch.compile, PEFT, Trainer, TRL; and saving."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_support import PATTERN, restarting, tiny, tokens
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers import logging as hf_logging

import sinklora

N = 40
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def _grads(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **inputs).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, ids = sinklora.patch(tiny(), PATTERN).train(), tokens(1, N)
    expected = _grads(model, ids, position_ids=restarting(17, 23))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(_grads(model, ids, position_ids=restarting(17, 23)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    """float32 weights: rotary embedding gives a float32 query beside a bfloat16 value."""
    model, ids = tiny().train(training), tokens(2, N)
    seen = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    sinklora.patch(model, PATTERN)
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu", dtype):
        cast = model(ids, use_cache=False).logits
    hook.remove()
    assert seen == [torch.float32, dtype]
    torch.testing.assert_close(cast.float(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_compile_without_graph_breaks(training: bool, rows: str) -> None:
    torch.compiler.reset()
    model = sinklora.patch(tiny(num_hidden_layers=1), PATTERN).train(training)
    ids = tokens(2, N)
    inputs: dict[str, Any] = {}
    if rows == "packed":
        inputs["position_ids"] = torch.cat([restarting(17, 23), restarting(30, 10)])
    elif rows == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :11] = 0
    expected = _grads(model, ids, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_grads(compiled, ids, **inputs), expected, atol=1e-6, rtol=1e-5)


def test_compile_with_dynamic_shapes() -> None:
    """Then the numbers in the config are symbols too."""
    torch.compiler.reset()
    model = sinklora.patch(tiny(num_hidden_layers=1), PATTERN).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (N, 33):
        with torch.no_grad():
            found, expected = (f(tokens(2, n), use_cache=False).logits for f in (compiled, model))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_compile_follows_new_settings() -> None:
    torch.compiler.reset()
    model, ids = sinklora.patch(tiny(num_hidden_layers=1), PATTERN).train(), tokens(1, N)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = _grads(compiled, ids)
    sinklora.patch(model, sinklora.SFPattern(group_size=16))
    expected = _grads(model, ids)
    torch.testing.assert_close(_grads(compiled, ids), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-4)


def _train_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("order", ["patch first", "peft first"])
def test_peft_carries_the_settings(tmp_path: Path, order: str) -> None:
    ids = tokens(1, N)
    if order == "patch first":
        model = get_peft_model(sinklora.patch(tiny(), PATTERN), LORA)
    else:
        model = get_peft_model(tiny(), LORA)
        assert sinklora.patch(model, PATTERN) is model
    assert model.config.sinklora["group_size"] == 8
    _train_step(model.train(), ids)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "sinklora.json").read_text())
    assert settings == {
        **model.config.sinklora,
        "rope_parameters": model.config.rope_parameters,
        "max_position_embeddings": model.config.max_position_embeddings,
    }
    assert sorted(path.name for path in tmp_path.glob("*sinklora*")) == ["sinklora.json"]

    base = sinklora.patch(tiny(), tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).train()
    late = sinklora.patch(PeftModel.from_pretrained(tiny(), tmp_path).train(), tmp_path)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert torch.equal(again(ids, use_cache=False).logits, expected)
        assert torch.equal(late(ids, use_cache=False).logits, expected)
    sinklora.unpatch(again)
    assert base.config._attn_implementation == "sdpa"


def test_every_adapter_gets_the_settings(tmp_path: Path) -> None:
    model = get_peft_model(sinklora.patch(tiny(), PATTERN), LORA)
    model.add_adapter("other", LORA)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "sinklora.json").exists() and (tmp_path / "other" / "sinklora.json").exists()
    model.save_pretrained(tmp_path / "part", selected_adapters=["other"])
    assert not (tmp_path / "part" / "sinklora.json").exists()
    assert sinklora.patch(tiny(), tmp_path / "part" / "other").config.sinklora == model.config.sinklora
    (tmp_path / "sinklora.json").unlink()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "sinklora.json").exists()


def test_adapter_of_transformers_itself(tmp_path: Path) -> None:
    model = sinklora.patch(tiny(), PATTERN)
    model.add_adapter(LORA)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert sinklora.patch(tiny(), tmp_path).config.sinklora == model.config.sinklora


def test_unpatched_peft_models_are_saved_as_ever(tmp_path: Path) -> None:
    sinklora.register()
    get_peft_model(tiny(), LORA).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "sinklora.json").exists()


def test_prefix_tuning() -> None:
    ids = tokens(1, N)
    config = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config).eval()
    with torch.no_grad():
        expected = model(ids).logits
        sinklora.patch(model, PATTERN)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="past_key_values"):
        model.train()(ids, labels=ids)


@contextlib.contextmanager
def _quiet() -> Any:
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


def _arguments(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **more,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path: Path, checkpointing: bool) -> None:
    model = get_peft_model(sinklora.patch(tiny(), PATTERN), LORA)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(4, N)]
    arguments = TrainingArguments(**_arguments(tmp_path, gradient_checkpointing=checkpointing))
    with _quiet():
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    checkpoint = tmp_path / "checkpoint-2"
    assert sinklora.patch(tiny(), checkpoint).config.sinklora == model.config.sinklora


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_trl(tmp_path: Path, options: dict[str, Any]) -> None:
    """SFTTrainer wraps the patched model in PEFT itself and packs rows by position_ids."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    vocab = {f"t{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t2")), eos_token="t1", pad_token="t0"
    )
    seen = []
    model = sinklora.patch(tiny(), PATTERN)
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    data = Dataset.from_list([{"input_ids": tokens(n, seed=n).tolist()} for n in (9, 17, 20, 12, 30, 11)])
    config = SFTConfig(**_arguments(tmp_path, bf16=False, **{"max_length": N, **options}))
    with _quiet():
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=LORA
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    assert any((positions.diff() <= 0).any() for positions in seen)
    assert sinklora.patch(tiny(), tmp_path / "final").config.sinklora == model.config.sinklora
    assert (tmp_path / "checkpoint-2" / "sinklora.json").exists()
