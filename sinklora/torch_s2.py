"""LongLoRA's S2-Attn as its authors wrote it, over torch's SDPA: what SF-Attn is compared with."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


def s2_over_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group_size: int
) -> torch.Tensor:
    """LongLoRA's S2-Attn as it is usually written: roll half of the heads, fold groups into the batch, SDPA,
    undo both.

    Shapes as sf_attention's; tokens must be a multiple of group_size. It is here to be compared with: its
    rolled heads let the first tokens see the last ones.
    """
    batch, heads, tokens, dim = query.shape
    repeats = heads // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)

    def fold(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat((x[:, : heads // 2], _roll(x[:, heads // 2 :], group_size // 2)), dim=1)
        groups = x.view(batch, heads, tokens // group_size, group_size, dim).transpose(1, 2)
        return groups.reshape(-1, heads, group_size, dim)

    out = sdpa(fold(query), fold(key), fold(value), is_causal=True)
    out = out.view(batch, -1, heads, group_size, dim).transpose(1, 2).reshape(batch, heads, tokens, dim)
    return torch.cat((out[:, : heads // 2], _roll(out[:, heads // 2 :], -(group_size // 2))), dim=1)


def _roll(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Tokens moved `shift` places to the front, the first ones to the end; torch.roll is slower than this."""
    return torch.cat((x[:, :, shift:], x[:, :, :shift]), dim=2)
