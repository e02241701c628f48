"""The settings of training runs: defaults, refusals, and their YAML."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from sinklora.commands.finetune import finetune
from sinklora.training.settings import OF_THE_CALL, FinetuneSettings, write_options

REQUIRED: dict[str, Any] = {"model": "m", "data": ("d",), "context": 1024, "output": "o"}


def make(**changes: Any) -> FinetuneSettings:
    return FinetuneSettings(**{**REQUIRED, **changes})


def test_every_setting_is_an_option_and_every_option_a_setting() -> None:
    options = set(inspect.signature(finetune).parameters) - {"config", "context_of_command"}
    assert options == {field.name for field in dataclasses.fields(FinetuneSettings)}


def test_defaults_are_filled_in_as_longlora_trains() -> None:
    resolved = make().resolved(has_gpu=False)
    assert (resolved.group_size, resolved.sinks, resolved.shifted_fraction) == (256, 4, 0.25)
    assert (resolved.epochs, resolved.dtype, resolved.gradient_checkpointing) == (1.0, "float32", False)
    assert (resolved.learning_rate, resolved.schedule, resolved.warmup_steps) == (
        2e-5,
        "constant_with_warmup",
        20,
    )
    on_gpu = make().resolved(has_gpu=True)
    assert (on_gpu.dtype, on_gpu.gradient_checkpointing) == ("bfloat16", True)


def test_given_values_stay() -> None:
    given = make(group_ratio=0.5, sinks=0, steps=7, dtype="bfloat16", gradient_checkpointing=True)
    resolved = given.resolved(has_gpu=False)
    assert (resolved.group_size, resolved.group_ratio, resolved.sinks) == (512, None, 0)
    assert (resolved.steps, resolved.epochs, resolved.dtype) == (7, None, "bfloat16")
    assert resolved.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data: expected at least one"),
        ({"context": 1}, "context: expected at least 2"),
        ({"attention": "flash"}, "attention: expected one of sf, s2, full, s2-torch, got flash"),
        ({"group_size": 2048}, "group_size: expected at most the context of 1024 tokens, got 2048"),
        ({"group_size": 64, "group_ratio": 0.5}, "group_size: expected either it or group_ratio"),
        ({"steps": 5, "epochs": 1.0}, "steps: expected either it or epochs"),
        ({"eval_data": ("x",), "eval_share": 0.1}, "eval_data: expected either it or eval_share"),
        ({"eval_every": 5}, "eval_every: expected together with"),
        ({"eval_share": 0.9}, "eval_share: expected a number above 0 to 0.5"),
        ({"attention": "full", "group_size": 64}, "group_size: expected none with attention full"),
        ({"attention": "s2", "sinks": 4}, "sinks: expected only with attention sf"),
        ({"attention": "s2-torch"}, "packing: attention s2-torch"),
        ({"full_finetuning": True, "quantize": "4bit"}, "quantize: the weights that full_finetuning"),
        ({"full_finetuning": True, "lora_rank": 64}, "lora_rank: expected none with full_finetuning"),
        ({"full_finetuning": True, "lora_targets": ("q_proj",)}, "lora_targets: expected none with full"),
        ({"schedule": "constant", "warmup_steps": 5}, "warmup_steps: schedule constant has none"),
        ({"seed": 2**32}, "seed: expected at most 4294967295"),
        ({"threads": 10**5}, "threads: expected at most 1024"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"save_every": 0}, "save_every: expected at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected a number from 0"),
        ({"shifted_fraction": 1.5}, "shifted_fraction: expected a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_s2_torch_needs_whole_groups_and_float16_a_gpu() -> None:
    with pytest.raises(ValueError, match="group_size: attention s2-torch needs one that divides"):
        make(attention="s2-torch", packing="joined", group_size=300).resolved(has_gpu=False)
    with pytest.raises(ValueError, match="dtype: float16 needs a GPU"):
        make(dtype="float16").resolved(has_gpu=False)
    assert make(dtype="float16").resolved(has_gpu=True).dtype == "float16"


def test_written_options_give_the_same_settings(tmp_path: Path) -> None:
    resolved = make(eval_share=0.1, lora_targets=("q_proj", "v_proj"), report_to=()).resolved(has_gpu=False)
    write_options(tmp_path / "run.yaml", resolved.as_options())
    read = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))
    assert not {name.replace("_", "-") for name in OF_THE_CALL} & set(read)
    values = {name.replace("-", "_"): value for name, value in read.items()}
    again = FinetuneSettings(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
    assert again == resolved
