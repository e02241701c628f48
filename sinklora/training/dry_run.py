"""`--dry-run`: what a run would take, from its own first batches; only the cache of tokens is
written."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from ..hf.settings import base_model
from ..memory import memory_estimate
from ..pattern import SFPattern
from .choices import training_pattern, weight_dtype
from .devices import peak_memory
from .plan import Lines
from .settings import FinetuneSettings

if TYPE_CHECKING:
    from .continued import Data, FinetuneRun

# The first batch also pays for the allocator and the threads.
TIMED_BATCHES = 2


class _Speeds(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "tokens_per_second" in logs:
            self.found.append(logs["tokens_per_second"])


def estimate(run: FinetuneRun, model: Any, tokenizer: Any, data: Data, arguments: Any) -> Lines:
    """(name, text) of memory by part, of what was measured, and of the time that all steps would take.

    Trains on three batches and forgets them: the model is not to be used afterwards.
    """
    lines = memory_lines(run.settings, base_model(model).config)
    with tempfile.TemporaryDirectory(prefix="sinklora-dry-run-") as scratch:
        short = dataclasses.replace(
            arguments,
            output_dir=scratch,
            max_steps=1 + TIMED_BATCHES,
            gradient_accumulation_steps=1,
            save_strategy="no",
            eval_strategy="no",
            eval_on_start=False,
            logging_steps=1,
            report_to="none",
        )
        trainer = run.trainer(model, tokenizer, data, short)
        speeds = _Speeds()
        trainer.add_callback(speeds)
        trainer.train()
    speed = statistics.median(speeds.found[-TIMED_BATCHES:])
    settings = run.settings
    tokens_of_step = settings.batch_size * settings.accumulate * arguments.world_size * settings.context
    seconds = arguments.max_steps * tokens_of_step / speed
    lines.append(("measured", f"{byte_text(peak_memory(arguments.device))} at most while training a batch"))
    lines.append(("speed", f"{speed:,.0f} tokens/s, {tokens_of_step / speed:,.1f} s a step"))
    lines.append(("time", f"{duration(seconds)} for {arguments.max_steps:,} steps, evaluations not counted"))
    return lines


def memory_lines(settings: FinetuneSettings, config: Any) -> Lines:
    """The memory of a device by part, as sinklora.memory_estimate foretells it."""
    computed = None if settings.dtype == "float32" else settings.dtype
    try:
        parts = memory_estimate(
            config,
            context=settings.context,
            batch_size=settings.batch_size,
            pattern=training_pattern(settings) or _torch_form(settings),
            lora_rank=0 if settings.full_finetuning else settings.lora_rank,
            train_embeddings_and_norms=settings.train_embeddings_and_norms,
            gradient_checkpointing=bool(settings.gradient_checkpointing),
            target_modules=list(settings.lora_targets) or None,
            dtype=weight_dtype(settings),
            trained_dtype="float32",  # as the run trains them, whatever the others are
            autocast=computed,
            chunk_tokens=settings.chunk_tokens,
            quantize="4bit" if settings.quantize else None,
            accumulate=settings.accumulate > 1,
        )
    except NotImplementedError as error:
        return [("memory", f"cannot be foretold: {error}")]
    total = parts["total"]
    named = ", ".join(
        f"{name.replace('_', ' ')} {byte_text(size)}"
        for name, size in parts.items()
        if name != "total" and size > total / 1000
    )
    return [("memory", f"{byte_text(total)} on each device: {named}")]


def _torch_form(settings: FinetuneSettings) -> SFPattern | Literal["full"]:
    """What stands for an attention that is not sinklora's."""
    return "full" if settings.attention == "full" else SFPattern.s2(int(settings.group_size or 0))


def byte_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
