"""Prepares a model for training at a longer context: positions, SF-Attn, LoRA, embeddings and norms."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import PreTrainedModel

from ..adapters import is_tied
from ..hf.patching import patch
from ..hf.rope import keep, put_back
from ..hf.saving import watch_saving
from ..pattern import SFPattern
from .rope import Rope, extend_positions

logger = logging.getLogger("sinklora")

# The projections of attention by their names in the model families, each tried as a whole: Llama, Mistral,
# Qwen and most others; Phi-3; GPT-NeoX.
ATTENTION_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("qkv_proj", "o_proj"),
    ("query_key_value", "dense"),
)


def prepare(
    model: PreTrainedModel,
    context: int,
    *,
    pattern: SFPattern | Literal["full"] | None = None,
    rope: Rope | None = "linear",
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    train_embeddings_and_norms: bool = True,
) -> PeftModel | PreTrainedModel:
    """A model that is ready for transformers' Trainer at `context` tokens, as LongLoRA trains (arXiv
    2309.12307).

    Positions are stretched, SF-Attn becomes the attention of training mode, and what is trained is LoRA on
    the query, key, value and output projections, and by default the embeddings and norms. `model` is changed
    in place, and only once all of the settings have been found to fit it. Weights in 4 or 8 bits
    (bitsandbytes) are prepared for training too (QLoRA).

    Args:
        model: a causal language model of transformers with rotary positions, not yet a PEFT model.
        context: tokens of the rows to train on. Where positions are stretched, the config says so from then
            on.
        pattern: the training attention; None is SF-Attn with groups of a quarter of the context, and "full"
            leaves the model's own attention as it is.
        rope: how positions are stretched, see `extend_positions`; "linear" is the paper's. None leaves them
            as they are. A context that the model already takes changes nothing.
        lora_rank: of the LoRA pairs; 0 trains the model's own weights instead (full fine-tuning) and returns
            `model` itself.
        lora_alpha, lora_dropout: of the LoRA pairs; the update is scaled by lora_alpha / lora_rank.
        target_modules: last parts of the names of the linear layers that get LoRA; "all-linear": all but the
            output layer; None: the query, key, value and output projections of attention.
        train_embeddings_and_norms: train those too, whole; without them LoRA hardly extends a context.
            Embeddings that are tied to the output layer stay tied. With lora_rank=0, False freezes them.

    Returns:
        the PEFT model around `model`, or `model` itself with lora_rank=0.

    Raises:
        TypeError: not such a model. ValueError: a setting out of range, or that does not go with the others.
        NotImplementedError: a model whose positions cannot be stretched that way, or whose projections have
        unknown names.
    """
    _check(model, context, pattern, lora_rank, lora_dropout)
    if lora_rank:
        settings = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=_linear_layers(model, target_modules),
            modules_to_save=_embeddings_and_norms(model) if train_embeddings_and_norms else None,
            # Without it PEFT copies tied embeddings and leaves the output layer with the old ones.
            ensure_weight_tying=train_embeddings_and_norms and is_tied(model),
        )
    else:
        _refuse_with_full_fine_tuning(model, target_modules, lora_dropout)
    _set_up(model, context, pattern, rope)
    return _with_lora(model, settings) if lora_rank else _whole(model, train_embeddings_and_norms)


def _check(model: object, context: int, pattern: object, lora_rank: int, lora_dropout: float) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers model that PEFT has not wrapped, got {type(model).__name__}"
        )
    require_integer("context", context, 1)
    require_integer("lora_rank", lora_rank, 0)
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: expected a share from 0 to below 1, got {lora_dropout}")
    if not (pattern is None or pattern == "full" or isinstance(pattern, SFPattern)):
        raise TypeError(f'pattern: expected an SFPattern, "full" or None, got {pattern!r}')


def _set_up(
    model: PreTrainedModel,
    context: int,
    pattern: SFPattern | Literal["full"] | None,
    rope: Rope | None,
) -> None:
    """Positions and attention, both or neither."""
    positions = keep(model)
    if rope is not None:
        extend_positions(model, context, rope)
    if pattern == "full":
        return
    try:
        patch(model, pattern if pattern is not None else SFPattern.from_ratio(context, 0.25))
    except BaseException:
        put_back(model, positions)
        raise


def _with_lora(model: PreTrainedModel, settings: LoraConfig) -> PeftModel:
    if _is_quantized(model):
        # Norms, embeddings and output layer become float32; the checkpointing is the caller's to choose.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    prepared = get_peft_model(model, settings)
    watch_saving(import_peft=True)
    trained, total = prepared.get_nb_trainable_parameters()
    logger.info("training %d of %d parameters", trained, total)
    return prepared


def _whole(model: PreTrainedModel, train_embeddings_and_norms: bool) -> PreTrainedModel:
    model.requires_grad_(True)
    if not train_embeddings_and_norms:
        frozen = set(_embeddings_and_norms(model))
        for name, child in model.named_modules():
            if name.rpartition(".")[2] in frozen:
                child.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("training %d of %d parameters", trained, model.num_parameters())
    return model


def _refuse_with_full_fine_tuning(
    model: PreTrainedModel, target_modules: Sequence[str] | None, lora_dropout: float
) -> None:
    if target_modules is not None:
        raise ValueError(f"target_modules: expected None with lora_rank=0, got {target_modules}")
    if lora_dropout:
        raise ValueError(f"lora_dropout: expected 0 with lora_rank=0, got {lora_dropout}")
    if _is_quantized(model):
        raise ValueError(
            "lora_rank: expected at least 1 for a model whose weights are quantised, as those are not "
            "trained, got 0"
        )


def _is_quantized(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _linear_layers(model: PreTrainedModel, wanted: Sequence[str] | str | None) -> list[str]:
    """Last parts of the names of the layers that get LoRA."""
    output = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, child in model.named_modules()
        if isinstance(child, torch.nn.Linear) and child is not output
    }
    if wanted == "all-linear":
        return sorted(linear)
    if wanted is None:
        for names in ATTENTION_PROJECTIONS:
            if linear.issuperset(names):
                return list(names)
        raise NotImplementedError(
            f"model: found no attention projections with known names in {type(model).__name__}; known are "
            + "; ".join(", ".join(names) for names in ATTENTION_PROJECTIONS)
            + "; name them as target_modules"
        )
    if isinstance(wanted, str) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f'target_modules: expected a sequence of names, "all-linear" or None, got {wanted!r}')
    if not wanted or not linear.issuperset(wanted):
        raise ValueError(
            f"target_modules: expected some of {', '.join(sorted(linear))}, got {', '.join(wanted) or 'none'}"
        )
    return list(wanted)


def _embeddings_and_norms(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of the input embedding and of all norms: PEFT matches modules by how names
    end."""
    embedding = model.get_input_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, child in model.named_modules()
            if child is embedding
            or (
                "norm" in type(child).__name__.lower()
                and next(child.parameters(recurse=False), None) is not None
            )
        }
    )


def require_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
