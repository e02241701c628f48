"""What a run is going to do, in words and numbers: shown before it, and in the model card."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..hf.rope import context_of
from ..hf.settings import base_model, text_config
from .settings import FinetuneSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .continued import Data

Lines = list[tuple[str, str]]


def describe_run(
    settings: FinetuneSettings, model: Any, data: Data, arguments: TrainingArguments, stretched: str
) -> Lines:
    """(name, text) of the model, its attention and positions, the data, and the steps.

    stretched: what was done to the positions, in words.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    per_step = settings.batch_size * settings.accumulate * arguments.world_size
    rows = len(data.training)
    steps = arguments.max_steps
    lines = [
        ("model", f"{settings.model}, {_count(total)} parameters, of which {_count(trained)} are trained"),
        ("training", describe_training(settings)),
        ("attention", describe_attention(settings)),
        ("positions", f"{describe_positions(model)} ({stretched})"),
        ("text", f"{_count(data.training.num_tokens)} tokens in {_documents(data.documents)}"),
        (
            "rows",
            f"{rows:,} of {settings.context:,} tokens, {100 * data.training.padding_share:.1f} % padding",
        ),
        (
            "steps",
            f"{steps:,} of {per_step:,} rows ({_count(per_step * settings.context)} tokens), "
            f"the text {steps / max(1, math.ceil(rows / per_step)):.3g} times",
        ),
    ]
    if data.held_out is not None:
        lines.append(
            (
                "held out",
                f"{_count(data.held_out.num_tokens)} tokens in {_documents(data.held_out_documents)}",
            )
        )
    return lines


def describe_attention(settings: FinetuneSettings) -> str:
    """The training attention in one line."""
    if settings.attention == "full":
        return "full"
    group = f"groups of {settings.group_size:,} tokens"
    if settings.attention == "sf":
        share = f"{settings.shifted_fraction:g} of the heads shifted"
        return f"SF-Attn, {group}, {settings.sinks} sink tokens, {share}"
    form = "LongLoRA's torch form of S2-Attn" if settings.attention == "s2-torch" else "S2-Attn"
    return f"{form}, {group}, half of the heads shifted"


def describe_training(settings: FinetuneSettings) -> str:
    """What of the model is trained, and in which precision."""
    if settings.full_finetuning:
        what = "all weights"
        if not settings.train_embeddings_and_norms:
            what += " but embeddings and norms"
    else:
        what = f"LoRA of rank {settings.lora_rank}"
        if settings.train_embeddings_and_norms:
            what += ", embeddings and norms"
    held = f", frozen weights in {settings.quantize}" if settings.quantize else ""
    return f"{what}; computed in {settings.dtype}{held}"


def describe_positions(model: Any) -> str:
    """The rotary positions as the config has them."""
    config = text_config(base_model(model).config)
    parameters = getattr(config, "rope_parameters", None) or {}
    reach = context_of(config)
    kind = parameters.get("rope_type", "default")
    factor = f", factor {parameters['factor']:g}" if "factor" in parameters else ""
    return f"{kind}{factor}, up to {reach:,} tokens" if isinstance(reach, int) else f"{kind}{factor}"


def _documents(number: int) -> str:
    return f"{number:,} document{'' if number == 1 else 's'}"


def _count(number: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if name == 'k' else size):.3g} {name}"
    return f"{number:,.0f}"
