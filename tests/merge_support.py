"""Adapters with weights that are not zero, on a tiny LLaMA over bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from chat_support import save_model
from transformers import AutoModelForCausalLM

from sinklora import SFPattern, finetune

CONTEXT = 64
PATTERN = SFPattern(16)


def save_base(folder: Path, **changes: Any) -> Path:
    return save_model(folder, **{"max_position_embeddings": CONTEXT, "initializer_range": 0.1, **changes})


def shake(model: torch.nn.Module, size: float = 0.02) -> None:
    """Moves every trained weight a little, by draws that are always the same."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def save_adapter(base: Path, folder: Path, *, rows: int | None = None, **options: Any) -> torch.nn.Module:
    """A trained adapter at twice the base's context; rows: resize the vocabulary first. Returns the model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = finetune.prepare(model, 2 * CONTEXT, **{"pattern": PATTERN, **options})
    shake(adapted)
    adapted.save_pretrained(folder)
    return adapted.eval()


def logits(model: torch.nn.Module, vocabulary: int = 259) -> torch.Tensor:
    tokens = torch.randint(vocabulary, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return found.float()
