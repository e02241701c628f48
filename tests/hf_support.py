"""Tiny random models of each architecture, and SF-Attn written densely as another attention of theirs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sinklora import SFPattern

VOCAB = 64
PATTERN = SFPattern(group_size=8, num_sink_tokens=2, shifted_fraction=0.25)
ORACLE = "dense_oracle"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MORE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"head_dim": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "GPTNeoX": {},
    "Phi3": {},
    "Granite": {"attention_multiplier": 0.7},  # its scale is not 1 / sqrt(head_dim)
}
ARCHITECTURES = tuple(_MORE)


def tiny(architecture: str = "Llama", **changes: Any) -> PreTrainedModel:
    """A model of two layers with the same weights at every call, in eval mode."""
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(**{**_SIZES, **_MORE[architecture], **changes})
    torch.manual_seed(1234)
    model: PreTrainedModel = getattr(transformers, f"{architecture}ForCausalLM")(config)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids that are neither padding nor special."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def restarting(*lengths: int) -> torch.Tensor:
    """Position ids of sequences packed into one row, (1, total)."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def register_oracle() -> None:
    """Registers PATTERN written densely: the allowed pairs are SFPattern.mask of each sequence alone."""
    AttentionInterface.register(ORACLE, _dense_attention)
    AttentionMaskInterface.register(ORACLE, _padding_only)


def _padding_only(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return attention_mask


def _sequences(
    mask: torch.Tensor | None, positions: torch.Tensor | None, b: int, n: int
) -> list[torch.Tensor]:
    if mask is not None:
        return [mask[b].nonzero()[:, 0]]
    if positions is None:
        return [torch.arange(n)]
    row = positions.expand(max(b + 1, positions.shape[0]), n)[b]
    starts = [0, *(i for i in range(1, n) if row[i] <= row[i - 1]), n]
    return [torch.arange(lo, hi) for lo, hi in pairwise(starts)]


def _dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    batch, heads, n, dim = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    allowed = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b in range(batch):
        for index in _sequences(attention_mask, position_ids, b, n):
            part = torch.from_numpy(PATTERN.mask(heads, len(index)))
            allowed[b, :, index[:, None], index] = part
    scores = (query @ key.transpose(2, 3)) * (dim**-0.5 if scaling is None else scaling)
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)
    weights = torch.where(allowed.any(-1, keepdim=True), weights, 0.0)
    return (weights @ value).transpose(1, 2), None
