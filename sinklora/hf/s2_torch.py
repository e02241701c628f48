"""LongLoRA's own torch form of S2-Attn as an attention of transformers, to compare SF-Attn with in a real
run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..torch_s2 import s2_over_sdpa
from .settings import base_model


def use_s2_torch(model: torch.nn.Module, group_size: int) -> None:
    """Switches a model's attention: in training mode S2-Attn over SDPA, in eval mode SDPA.

    Rows are then trained on whole: each a multiple of group_size long, without padding and of one sequence.
    Raises NotImplementedError at the first row that is not.
    """
    name = f"s2-torch-{group_size}"

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shapes as sinklora_attention's."""
        if not module.training:
            result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **kwargs
            )
            return result
        tokens = query.shape[2]
        whole = attention_mask is None and tokens == key.shape[2]
        if tokens % group_size:
            whole = False
        if not whole:
            raise NotImplementedError(
                f"attention s2-torch: expected rows of one sequence without padding, in whole groups of "
                f"{group_size} tokens; SF-Attn takes any"
            )
        scaling = kwargs.get("scaling")
        if scaling is not None and scaling != query.shape[3] ** -0.5:
            query = query * (scaling * query.shape[3] ** 0.5)
        return s2_over_sdpa(query, key, value, group_size).transpose(1, 2), None

    AttentionInterface.register(name, attention)
    # Padding and packed rows come as a mask then, else there is none.
    AttentionMaskInterface.register(name, sdpa_mask)
    base_model(model).set_attn_implementation(name)
