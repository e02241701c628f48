"""Training with transformers' Trainer, as the demo does it: no private loop."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

# The first steps also pay for the allocator, thread pools and caches.
WARM_UP_STEPS = 3


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """What a training run showed.

    losses: nats per token of the batch of each step.
    tokens_per_second: tokens of a step over the median time of one, the warm-up left out.
    """

    losses: list[float]
    tokens_per_second: float


class StepWatch(TrainerCallback):
    """Collects each step's loss and time, and tells a progress bar."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        self.on_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(
    model: Any,
    dataset: Dataset[dict[str, Any]],
    *,
    steps: int,
    batch_size: int,
    block_length: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    on_step: Callable[[], None],
) -> TrainingLog:
    """Trains a model of transformers or PEFT in place on the CPU; the same seed gives the same order of the
    data."""
    watch = StepWatch(on_step)
    with tempfile.TemporaryDirectory(prefix="sinklora-trainer-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log line; the progress bar shows enough
        trainer.train()
    counted = watch.seconds[WARM_UP_STEPS:] or watch.seconds
    return TrainingLog(watch.losses, batch_size * block_length / statistics.median(counted))
