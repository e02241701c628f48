"""How much memory training takes, foretold: no weights, no data and no device are needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..hf.settings import base_model
from ..pattern import SFPattern
from .step import OPTIMIZERS, Setup, Step, run_step

DTYPES = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": DTYPES,
    "trained_dtype": (*DTYPES, None),
    "autocast": (*DTYPES, None),
    "optimizer": tuple(OPTIMIZERS),
    "quantize": ("4bit", None),
    "device": ("cpu", "cuda"),
}


def memory_estimate(
    config: PreTrainedConfig | PreTrainedModel | str | os.PathLike[str],
    context: int = 32768,
    batch_size: int = 1,
    *,
    pattern: SFPattern | Literal["full"] | None = None,
    lora_rank: int = 8,
    train_embeddings_and_norms: bool = True,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    gradient_checkpointing: bool = False,
    dtype: str = "float32",
    trained_dtype: str | None = None,
    autocast: str | None = None,
    optimizer: str = "adamw",
    chunk_tokens: int | None = 1024,
    quantize: Literal["4bit"] | None = None,
    accumulate: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
) -> dict[str, int]:
    """The memory of a training step in bytes, by part, at the moment when most is taken.

    The model's own code runs, on tensors without memory, with two and with three layers; every layer more
    takes what the third took. Seconds for any size, and no weights. Rows are single texts: transformers' sdpa
    makes a mask of context x context for packed ones, SF-Attn none.

    Args:
        config: a transformers config, a model, or a folder with a config.json.
        context: tokens of a row. batch_size: rows of a step on one device.
        pattern: the training attention: an SFPattern, "full" (transformers' sdpa), or None: SF-Attn with
            groups of a quarter of the context.
        lora_rank, train_embeddings_and_norms, target_modules: as for `sinklora.finetune.prepare`.
        gradient_checkpointing: layers are computed again in the backward.
        dtype: of the weights. trained_dtype: of those that are trained, where it is another. autocast: what
            Trainer's bf16=True or fp16=True computes in.
        optimizer: "adamw" (fused, two numbers of the weight's type), "adamw_8bit" or "sgd".
        chunk_tokens: of the loss (`sinklora.training`); None: full logits.
        quantize: "4bit" for QLoRA with bitsandbytes; the computation is then in bfloat16.
        accumulate: gradients of an earlier step are there when a step begins (gradient accumulation).
        device: whose kernels' scratch memory counts; default: CUDA where torch finds a device.

    Returns:
        weights; gradients, as far as they are there at that moment; optimizer; activations: what the forward
        saves for the backward; loss: on top of it when the loss is the most expensive moment; temporary: on
        top of it elsewhere; attention_workspace: scratch memory of attention kernels; and their total. Not in
        it: Python and its libraries (0.5 GB), a CUDA context (0.5 GB), what an allocator keeps unused.

    Raises:
        TypeError, ValueError: a setting of the wrong kind or out of range.
        NotImplementedError: a model that cannot run without data.
    """
    settings = dict(locals())
    return _estimate(_config_of(settings.pop("config")), _checked(settings))


def _estimate(config: Any, setup: Setup) -> dict[str, int]:
    layers, period = config.num_hidden_layers, _period(config)
    if layers <= 3 * period:
        return _parts(run_step(config, layers, period, setup))
    two, three = (run_step(config, count * period, period, setup) for count in (2, 3))
    return _parts(two.between(three, layers / period - 2))


def _parts(step: Step) -> dict[str, int]:
    phase, peak = max(step.peaks.items(), key=lambda item: item[1].total)
    others = peak.total - peak.gradients - peak.workspace
    activations = min(step.saved, others)
    parts = {
        "weights": step.weights,
        "gradients": peak.gradients,
        "optimizer": step.optimizer,
        "activations": activations,
        "loss": others - activations if phase == "loss" else 0,
        "temporary": others - activations if phase != "loss" else 0,
        "attention_workspace": peak.workspace,
    }
    whole = {name: round(size) for name, size in parts.items()}
    return {**whole, "total": sum(whole.values())}


# ---- settings ----


def _config_of(config: Any) -> PreTrainedConfig:
    if isinstance(config, (str, os.PathLike)):
        try:
            config = AutoConfig.from_pretrained(os.fspath(config))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"config: cannot open {os.fspath(config)}: {str(error).splitlines()[0]}"
            ) from error
    elif isinstance(config, torch.nn.Module):
        config = base_model(config).config
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config: expected a config, a model or a folder, got {type(config).__name__}")
    found: PreTrainedConfig = config.get_text_config()
    return found


def _checked(settings: dict[str, Any]) -> Setup:
    for name, least in (("context", 2), ("batch_size", 1), ("lora_rank", 0), ("chunk_tokens", 1)):
        value = settings[name]
        if value is None and name == "chunk_tokens":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    settings["device"] = settings["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, choices in _CHOICES.items():
        if settings[name] not in choices:
            known = ", ".join(str(choice) for choice in choices)
            raise ValueError(f"{name}: expected one of {known}, got {settings[name]!r}")
    for name in ("dtype", "trained_dtype", "autocast"):
        settings[name] = settings[name] and getattr(torch, settings[name])
    pattern = settings["pattern"]
    if pattern is None:
        settings["pattern"] = SFPattern.from_ratio(settings["context"], 0.25)
    elif not (pattern == "full" or isinstance(pattern, SFPattern)):
        raise TypeError(f'pattern: expected an SFPattern, "full" or None, got {pattern!r}')
    if settings["quantize"] and not settings["lora_rank"]:
        raise ValueError("quantize: expected None with lora_rank=0: weights of 4 bits are not trained")
    return Setup(**settings)


def _period(config: Any) -> int:
    """After how many layers their kinds repeat."""
    kinds = getattr(config, "layer_types", None) or [None]
    return next(
        n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))
    )
