"""What `sinklora finetune` is told: the options by their names, checked, and written beside the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..folders import write_whole

ATTENTIONS = ("sf", "s2", "full", "s2-torch")
ROPES = ("linear", "yarn", "dynamic", "llama3", "none")
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PACKINGS = ("whole", "cut", "joined")
QUANTIZATIONS = ("4bit",)
SHARDINGS = ("none", "fsdp2", "zero2", "zero3")
GROUP_RATIO = 0.25
NUM_SINK_TOKENS = 4
SHIFTED_FRACTION = 0.25
EPOCHS = 1.0
# Those that say what this call of the command does, not what is trained.
OF_THE_CALL = ("resume", "dry_run")
_CHOICES = {
    "attention": ATTENTIONS,
    "rope": ROPES,
    "dtype": DTYPES,
    "schedule": SCHEDULES,
    "packing": PACKINGS,
    "quantize": QUANTIZATIONS,
    "sharding": SHARDINGS,
}
_AT_LEAST_ONE = (
    "group_size",
    "lora_rank",
    "lora_alpha",
    "batch_size",
    "accumulate",
    "steps",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "log_every",
    "chunk_tokens",
    "threads",
)
_AT_LEAST_ZERO = ("sinks", "warmup_steps", "seed", "weight_decay", "max_grad_norm")
# What random generators take, and more threads than any machine starts.
_AT_MOST = {"seed": 2**32 - 1, "threads": 1024}
# Either of them, not both.
_EITHER = (("group_size", "group_ratio"), ("steps", "epochs"), ("eval_data", "eval_share"))


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The options of `sinklora finetune` under their names; None is what `resolved` fills in or nothing.

    Raises ValueError "name: what was expected, what came" for what can be told without the model and the
    data.
    """

    model: str
    data: tuple[str, ...]
    context: int
    output: str
    attention: str = "sf"
    group_size: int | None = None
    group_ratio: float | None = None
    sinks: int | None = None
    shifted_fraction: float | None = None
    rope: str = "linear"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    train_embeddings_and_norms: bool = True
    full_finetuning: bool = False
    quantize: str | None = None
    dtype: str | None = None
    gradient_checkpointing: bool | None = None
    batch_size: int = 1
    accumulate: int = 8
    learning_rate: float = 2e-5
    schedule: str = "constant_with_warmup"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    save_every: int = 100
    keep_checkpoints: int = 2
    eval_every: int | None = None
    eval_data: tuple[str, ...] = ()
    eval_share: float | None = None
    log_every: int = 1
    report_to: tuple[str, ...] = ()
    seed: int = 0
    resume: bool = False
    dry_run: bool = False
    text_field: str = "text"
    packing: str = "whole"
    cache_dir: str | None = None
    chunk_tokens: int = 1024
    threads: int | None = None
    sharding: str = "none"

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: expected at least one file, folder or data set, got none")
        if self.context < 2:
            raise ValueError(f"context: expected at least 2 tokens, got {self.context}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value}")
        for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not (value >= least and math.isfinite(value)):
                    raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name, most in _AT_MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name}: expected at most {most}, got {value}")
        for first, second in _EITHER:
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"{first}: expected either it or {second}, got both")
        self._check_shares()
        self._check_combinations()

    def _check_shares(self) -> None:
        for name, low, high in (
            ("group_ratio", 0.0, 1.0),
            ("shifted_fraction", -1e-9, 1.0),
            ("eval_share", 0.0, 0.5),
            ("lora_dropout", -1e-9, 0.999),
        ):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                lowest = "above 0" if low == 0 else "from 0"
                raise ValueError(f"{name}: expected a number {lowest} to {high:g}, got {value}")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a number above 0, got {value}")

    def _check_combinations(self) -> None:
        if self.group_size is not None and self.group_size > self.context:
            raise ValueError(
                f"group_size: expected at most the context of {self.context} tokens, got {self.group_size}"
            )
        if self.attention != "sf":
            for name in ("sinks", "shifted_fraction"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: expected only with attention sf, got attention {self.attention}"
                    )
        if self.attention == "full":
            for name in ("group_size", "group_ratio"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected none with attention full, which has no groups")
        if self.attention == "s2-torch" and self.packing != "joined":
            raise ValueError(
                "packing: attention s2-torch cannot keep packed documents apart, expected joined, "
                f"got {self.packing}"
            )
        if self.full_finetuning and self.quantize is not None:
            raise ValueError("quantize: the weights that full_finetuning trains cannot be quantized")
        self._check_effects()
        if self.eval_every is not None and not (self.eval_data or self.eval_share):
            raise ValueError("eval_every: expected together with eval_data or eval_share")

    def _check_effects(self) -> None:
        """Refuses values that would change nothing, but for the defaults, which stand in every run.yaml."""
        unused = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets") if self.full_finetuning else ()
        for name in unused:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}: expected none with full_finetuning, which trains without LoRA")
        if self.schedule == "constant" and self.warmup_steps not in (0, type(self).warmup_steps):
            raise ValueError(
                "warmup_steps: schedule constant has none, expected schedule constant_with_warmup, "
                f"got {self.warmup_steps}"
            )

    def resolved(self, has_gpu: bool) -> FinetuneSettings:
        """The settings with their defaults in place; those of dtype and gradient_checkpointing are for a
        GPU or for a CPU.

        Raises ValueError where the filled-in values contradict each other.
        """
        filled: dict[str, Any] = {}
        if self.attention != "full" and self.group_size is None:
            ratio = GROUP_RATIO if self.group_ratio is None else self.group_ratio
            filled["group_size"] = math.ceil(self.context * ratio)
            filled["group_ratio"] = None
        if self.attention == "sf":
            filled["sinks"] = NUM_SINK_TOKENS if self.sinks is None else self.sinks
            fraction = self.shifted_fraction
            filled["shifted_fraction"] = SHIFTED_FRACTION if fraction is None else fraction
        if self.steps is None and self.epochs is None:
            filled["epochs"] = EPOCHS
        if self.dtype is None:
            filled["dtype"] = "bfloat16" if has_gpu else "float32"
        if self.gradient_checkpointing is None:
            filled["gradient_checkpointing"] = has_gpu
        done = dataclasses.replace(self, **filled)
        if done.dtype == "float16" and not has_gpu:
            raise ValueError("dtype: float16 needs a GPU; expected float32 or bfloat16 on a CPU")
        if done.attention == "s2-torch" and done.group_size:
            tokens, group_size = done.context, done.group_size
            if tokens % group_size:
                raise ValueError(
                    f"group_size: attention s2-torch needs one that divides the context of {tokens} tokens, "
                    f"got {group_size}"
                )
        return done

    def as_options(self) -> dict[str, Any]:
        """The settings as the options of --config: plain values, no None, without those of one call."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.init or value is None or value == () or field.name in OF_THE_CALL:
                continue
            found[field.name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
        return found


def write_options(path: Path, options: Mapping[str, Any]) -> None:
    """Writes a YAML file of options, whole or not at all. Raises OSError."""
    import yaml

    write_whole(path, yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))
