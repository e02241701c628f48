"""ThroughputCallback in transformers' Trainer and TRL's SFTTrainer: what it counts, measures and logs."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_support import PATTERN, tiny, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

import sinklora
from sinklora.finetune import ThroughputCallback
from sinklora.finetune.throughput import OperatorTimes

N = 48


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def rows(count: int = 16, **more: Any) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row, **more} for row in tokens(count, N)]


def train(folder: Path, callback: Any, *others: Any, data: Any = None, **changes: Any) -> Trainer:
    trainer = Trainer(
        model=sinklora.patch(tiny(), PATTERN),
        args=TrainingArguments(**arguments(folder, **changes)),
        train_dataset=data or rows(),
        eval_dataset=rows(2),
        callbacks=[*others, callback],
    )
    trainer.train()
    return trainer


class Reporter(TrainerCallback):
    """Stands for wandb and others: keeps what it is told, when it is told."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


class Clock:
    """time.perf_counter that only moves where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("sinklora.finetune.throughput.time.perf_counter", lambda: self.now)


class Passing(TrainerCallback):
    """Lets a clock go on by so much at events of the Trainer."""

    def __init__(self, clock: Clock, **seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += self.seconds.get("step", 0)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += self.seconds.get("evaluation", 0)


def test_logs_of_a_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter, callback = Reporter(), ThroughputCallback(profile_every=2)
    with caplog.at_level(logging.INFO, "sinklora"):
        trainer = train(tmp_path, callback, reporter, eval_strategy="steps", eval_steps=2)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    assert [entry for entry in reporter.seen if "loss" in entry] == [
        {k: v for k, v in entry.items() if k != "step"} for entry in steps
    ]
    assert ["attention_share" in entry for entry in steps] == [False, True, False, True]
    # A profiled step is slower, so its speed would say too little.
    assert ["tokens_per_second" in entry for entry in steps] == [True, False, True, False]
    assert all(entry["memory_bytes"] > 1e6 for entry in steps)
    assert 0 < steps[1]["attention_share"] < 1
    assert callback.attention_share == steps[3]["attention_share"]
    assert callback.tokens_per_second == steps[2]["tokens_per_second"]
    assert not any("memory_bytes" in entry for entry in trainer.state.log_history if "eval_loss" in entry)
    lines = [record.message for record in caplog.records if "tokens/s" in record.message]
    assert len(lines) == 4
    assert "step 4: " in lines[-1]
    assert "% of a step, at most " in lines[-1]
    assert not trainer.model._forward_pre_hooks


def test_speed_is_tokens_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations take no part of it; with accumulation a step has several batches."""
    clock = Clock(monkeypatch)
    passing = Passing(clock, step=4.0, evaluation=100.0)
    trainer = train(
        tmp_path,
        ThroughputCallback(profile_every=None),
        passing,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    speeds = [e["tokens_per_second"] for e in trainer.state.log_history if "tokens_per_second" in e]
    assert speeds == [2 * 2 * N / 4.0] * 2


def test_padding_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = Passing(Clock(monkeypatch), step=1.0)
    mask = torch.ones(N, dtype=torch.int64)
    mask[10:] = 0
    trainer = train(
        tmp_path, ThroughputCallback(None), passing, data=rows(attention_mask=mask), eval_strategy="no"
    )
    assert trainer.state.log_history[0]["tokens_per_second"] == 2 * 10


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_trl(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    clock = Clock(monkeypatch)
    vocab = {f"t{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t2")), eos_token="t1", pad_token="t0"
    )
    lengths = (40, 48, 44, 46)
    trainer = SFTTrainer(
        model=sinklora.patch(tiny(), PATTERN),
        args=SFTConfig(
            **arguments(tmp_path, max_steps=1, bf16=False, **{"max_length": N, **options}),
            gradient_accumulation_steps=2,
        ),
        train_dataset=Dataset.from_list([{"input_ids": tokens(n, seed=n).tolist()} for n in lengths]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        callbacks=[ThroughputCallback(None), Passing(clock, step=2.0)],
    )
    trainer.train()
    assert trainer.state.log_history[0]["tokens_per_second"] == sum(lengths) / 2.0


def test_attention_share_is_attentions_time() -> None:
    """Against the clock, for SF-Attn and SDPA, where attention is nearly all there is."""
    query = torch.randn(1, 2, 1024, 32, requires_grad=True)
    for attend in (
        lambda: sinklora.sf_attention(query, query, query, sinklora.SFPattern(512)),
        lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True),
    ):
        times = OperatorTimes(torch.device("cpu"))
        begun = time.perf_counter()
        for _ in range(3):
            attend().sum().backward()
        busy = time.perf_counter() - begun
        time.sleep(busy)
        assert 0.15 < times.attention_share() <= 0.55
    times = OperatorTimes(torch.device("cpu"))
    (query @ query.mT).sum().backward()
    assert times.attention_share() == 0


def test_a_users_profile_is_left_alone(tmp_path: Path) -> None:
    callback = ThroughputCallback(profile_every=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer = train(tmp_path, callback, max_steps=1)
    assert callback.attention_share is None
    assert "tokens_per_second" in trainer.state.log_history[0]
    assert any("sf_attention" in event.key for event in profile.key_averages())


def test_trained_again_it_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = Passing(Clock(monkeypatch), step=1.0)
    callback = ThroughputCallback(None)
    for _ in range(2):
        trainer = train(tmp_path, callback, passing, max_steps=2)
        speeds = [e["tokens_per_second"] for e in trainer.state.log_history if "loss" in e]
        assert speeds == [2 * N] * 2


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_refuses_bad_numbers(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="profile_every: expected"):
        ThroughputCallback(value)
