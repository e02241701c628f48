"""What the settings come to for the libraries: a pattern, dtypes, a collator, the Trainer's arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..pattern import SFPattern
from .devices import has_gpu
from .settings import FinetuneSettings

# As LongLoRA (arXiv 2309.12307, section B.2) sets AdamW.
ADAM_BETAS = (0.9, 0.95)


def training_pattern(settings: FinetuneSettings) -> SFPattern | None:
    """The pattern of the training attention; None for those that are not sinklora's."""
    if settings.attention == "s2":
        return SFPattern.s2(int(settings.group_size or 0))
    if settings.attention == "sf":
        return SFPattern(
            group_size=int(settings.group_size or 0),
            num_sink_tokens=int(settings.sinks or 0),
            shifted_fraction=float(settings.shifted_fraction or 0.0),
        )
    return None


def number_of_steps(settings: FinetuneSettings, rows: int) -> int:
    """Steps of the optimiser: as given, or those of the epochs over so many rows."""
    if settings.steps is not None:
        return settings.steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    of_an_epoch = math.ceil(rows / (settings.batch_size * settings.accumulate * world))
    return math.ceil((settings.epochs or 1) * of_an_epoch)


def trainer_arguments(settings: FinetuneSettings, steps: int) -> dict[str, Any]:
    """What the settings say of transformers' TrainingArguments, and what all runs have in common."""
    gpu = has_gpu()
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    # Its name before transformers had activation_checkpointing.
    checkpointing = "activation_checkpointing"
    if checkpointing not in names:
        checkpointing = "gradient_checkpointing"
    return {
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": 1,  # see TokenEvaluation
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        checkpointing: bool(settings.gradient_checkpointing),
        f"{checkpointing}_kwargs": {"use_reentrant": False},
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": settings.log_every,
        "save_steps": settings.save_every,
        "save_total_limit": settings.keep_checkpoints,
        "eval_steps": settings.eval_every or steps,
        "prediction_loss_only": True,
        "report_to": list(settings.report_to) or "none",
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
    }


def weight_dtype(settings: FinetuneSettings) -> str:
    """How the weights are held: frozen ones in the dtype of the computation, trained ones in float32."""
    return "float32" if settings.full_finetuning else str(settings.dtype)


def cache_folder(given: str | None) -> Path:
    """Where tokens are kept: as given, else in the user's cache."""
    if given is not None:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "sinklora" / "tokens"


def join(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of rows in which documents run on into each other: nothing says where one begins."""
    return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}


@contextlib.contextmanager
def errors_about(name: str) -> Iterator[None]:
    """Errors about "data" inside are about the option `name`: several options name data."""
    try:
        yield
    except ValueError as error:
        begun, _, rest = str(error).partition(": ")
        if begun != "data" or name == "data":
            raise
        raise ValueError(f"{name}: {rest}") from error


def check_reports(names: Sequence[str]) -> None:
    """Raises ValueError for a service that transformers cannot report to here."""
    from transformers.integrations import integration_utils

    if not names:
        return
    installed = integration_utils.get_available_reporting_integrations()
    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            raise ValueError(f"report_to: expected one of {', '.join(known)}, got {name}")
        if name not in installed:
            raise ValueError(f"report_to: {name} is not installed; run: pip install {name}")
