"""What a forward brings to a layer: its tokens, and which of them are kept."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .rotary import Received


@dataclasses.dataclass(frozen=True)
class NewMask:
    """Which new tokens are kept, and what the host has read of that, once for all layers of a forward.

    Nothing is read at a step of one token where reading would wait for a device.
    """

    tensor: Tensor | None = None  # bool (B, n), True = kept; None where all are
    counts: list[int] | None = None  # how many in each row, where it was read
    clean: int = 0  # the last tokens that are kept in every row, where it was read
    whole: Tensor | None = None  # where it was not: bool (B, columns so far), the new ones at the end


@dataclasses.dataclass
class NewTokens:
    """query (B, H, n, D); key, value (B, Hkv, n, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: NewMask = NewMask()
    scale: float | None = None
    rotation: Received | None = None  # what query and key were rotated with, where positions are ranks


def num_clean(mask: Tensor) -> Tensor:
    """int64 (): how many of the last columns of a bool (B, n) mask are kept in every row."""
    return mask.all(0).flip(0).long().cumprod(0).sum()


def read_mask(mask: Tensor, num_past: int) -> tuple[list[int], NewMask]:
    """From a bool (B, columns) mask: how many past columns each row shows, and the new ones; in one read."""
    new = mask[:, num_past:]
    numbers = torch.cat([mask[:, :num_past].sum(1), new.sum(1), num_clean(new)[None]]).tolist()
    batch, num_new = new.shape
    past, kept, clean = numbers[:batch], numbers[batch:-1], numbers[-1]
    if all(number == num_new for number in kept):
        return past, NewMask()
    return past, NewMask(new, kept, clean)
