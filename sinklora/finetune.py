"""Prepares a model for training at a longer context: position interpolation, SF-Attn, LoRA, embeddings and
norms."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from .pattern import SFPattern

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
    rope: Literal["linear"] | None = "linear",
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    train_embeddings_and_norms: bool = True,
) -> PeftModel:
    """A PEFT model that is ready for transformers' Trainer at `context` tokens, as LongLoRA trains (arXiv
    2309.12307).

    Positions are interpolated, SF-Attn becomes the attention of training mode, and what is trained is LoRA on
    the query, key, value and output projections, and by default the embeddings and norms. `model` is changed
    in place.

    Args:
        model: a causal language model of transformers with rotary positions, not yet a PEFT model.
        context: tokens of the rows to train on. Above config.max_position_embeddings it becomes the config's
            new one.
        pattern: the training attention; None is SF-Attn with groups of a quarter of the context, and "full"
            leaves the model's own attention as it is.
        rope: "linear" divides the positions by context / max_position_embeddings (Chen et al., arXiv
            2306.15595), and writes so into config.rope_parameters, so that a saved model needs no flag. None
            leaves positions as they are. A context that the model already has changes nothing.
        lora_rank, lora_alpha, lora_dropout: of the LoRA pairs; the update is scaled by lora_alpha /
            lora_rank.
        train_embeddings_and_norms: train those too, whole; without them LoRA hardly extends a context.
            Embeddings that are tied to the output layer stay tied.

    Raises:
        TypeError: not such a model. ValueError: a setting out of range. NotImplementedError: a model whose
        positions scale already or cannot be interpolated, or whose projections have unknown names.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers model that PEFT has not wrapped, got {type(model).__name__}"
        )
    _require_positive("context", context)
    _require_positive("lora_rank", lora_rank)
    if not (pattern is None or pattern == "full" or isinstance(pattern, SFPattern)):
        raise TypeError(f'pattern: expected an SFPattern, "full" or None, got {pattern!r}')
    projections = _attention_projections(model)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=list(projections),
        modules_to_save=_embeddings_and_norms(model) if train_embeddings_and_norms else None,
        # Without it PEFT copies tied embeddings and leaves the output layer with the old ones.
        ensure_weight_tying=train_embeddings_and_norms and _is_tied(model),
    )
    if rope is not None:
        extend_positions(model, context, rope)
    if pattern != "full":
        from .hf.patching import patch

        patch(model, pattern if pattern is not None else SFPattern.from_ratio(context, 0.25))
    prepared = get_peft_model(model, settings)
    trained, total = prepared.get_nb_trainable_parameters()
    logger.info("training %d of %d parameters at a context of %d tokens", trained, total, context)
    return prepared


def extend_positions(model: PreTrainedModel, context: int, rope: str = "linear") -> float:
    """Interpolates a model's rotary positions for a longer context, in place; returns the factor (1.0:
    nothing to do).

    Raises:
        ValueError: an unknown `rope`. NotImplementedError: positions that scale already, are not rotary, or
        do not follow config.rope_parameters.
    """
    if rope != "linear":
        raise ValueError(f'rope: expected "linear" or None, got {rope!r}')
    config = model.config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None)
    parameters = _plain_rope_parameters(config)
    if not isinstance(trained, int):
        raise NotImplementedError("rope: the model's config has no max_position_embeddings to extend from")
    if context <= trained:
        logger.info("positions unchanged: the model already takes %d tokens", trained)
        return 1.0
    factor = context / trained
    extended = copy.deepcopy(config)
    extended.rope_parameters = {**parameters, "rope_type": "linear", "factor": factor}
    rebuilt = []
    for parent, name, old in _rotary_modules(model):
        new = type(old)(config=extended).to(old.inv_freq.device)
        if not torch.allclose(new.inv_freq * factor, old.inv_freq):
            raise NotImplementedError(
                f"rope: {type(old).__name__} does not follow config.rope_parameters, so its positions cannot "
                "be interpolated here; use rope=None and extend them yourself"
            )
        rebuilt.append((parent, name, new))
    # Nothing is changed before all could be. The config's two entries are what a saved model is built from
    # again.
    config.rope_parameters = extended.rope_parameters
    config.max_position_embeddings = context
    for parent, name, new in rebuilt:
        new.config = config
        setattr(parent, name, new)
    logger.info("positions divided by %g: %d tokens become %d", factor, trained, context)
    return factor


def _plain_rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's rope_parameters where they are those of ordinary rotary positions, else
    NotImplementedError."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise NotImplementedError(
            f"rope: {config.model_type} has no rotary positions (config.rope_parameters) to interpolate"
        )
    if "rope_type" not in parameters:
        raise NotImplementedError(
            f"rope: {config.model_type} has different positions in different layers "
            f"({', '.join(parameters)}); one factor does not fit them"
        )
    if parameters["rope_type"] != "default":
        raise NotImplementedError(
            f"rope: the model's positions already scale (rope_type {parameters['rope_type']!r}); start from "
            'a model whose rope_type is "default", or pass rope=None to train with the positions it has'
        )
    return dict(parameters)


def _rotary_modules(model: PreTrainedModel) -> list[tuple[torch.nn.Module, str, Any]]:
    """(parent, name, module) of every module that computes rotary frequencies."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(getattr(child, "inv_freq", None), torch.Tensor)
    ]
    if not found:
        raise NotImplementedError(f"rope: found no rotary module in {type(model).__name__}")
    return found


def _attention_projections(model: PreTrainedModel) -> tuple[str, ...]:
    linear = {
        name.rpartition(".")[2] for name, child in model.named_modules() if isinstance(child, torch.nn.Linear)
    }
    for names in ATTENTION_PROJECTIONS:
        if linear.issuperset(names):
            return names
    raise NotImplementedError(
        f"model: found no attention projections with known names in {type(model).__name__}; known are "
        + "; ".join(", ".join(names) for names in ATTENTION_PROJECTIONS)
    )


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


def _is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
