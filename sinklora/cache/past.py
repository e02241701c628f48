"""The kept entries of a layer in the order of their positions, as a prompt that comes after them needs
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import cuda
from .rows import RowCounts

if TYPE_CHECKING:
    from .layer import H2OLayer


class Past(NamedTuple):
    """The kept entries in the order of their positions, the last ones of each row at the end."""

    key: Tensor
    value: Tensor
    scores: Tensor
    positions: Tensor
    mask: Tensor | None  # bool (B, n): rows that hold fewer have none in front

    def mask_with(self, new: Tensor | None, num_new: int) -> Tensor | None:
        """The mask of these entries and num_new new tokens together; None where all are kept."""
        if self.mask is None and new is None:
            return None
        batch, num_past = self.key.shape[0], self.key.shape[2]
        first = self.key.new_ones(batch, num_past, dtype=torch.bool) if self.mask is None else self.mask
        second = self.key.new_ones(batch, num_new, dtype=torch.bool) if new is None else new
        return torch.cat([first, second], 1)


class LastForward(NamedTuple):
    """What taking back part of a forward needs; a layer holds it only while transformers asks for it."""

    scores: Tensor | None  # as they were before, (B, Hkv, slots)
    prompt: (
        tuple[Tensor, Tensor, Tensor] | None
    )  # query, key and lse as they attended, of more than one token
    scale: float | None


def gather_past(layer: H2OLayer, counts: RowCounts) -> Past:
    """layer's entries; views where they are in order already."""
    most = counts.most_used
    mask = counts.mask(layer.keys.device)
    tensors = layer.keys, layer.values, layer.scores, layer.positions
    if mask is None and cuda.readable(layer.positions) and bool(_in_order(layer.positions[:, :, :most])):
        key, value, scores, positions = (tensor[:, :, :most] for tensor in tensors)
        return Past(key, value, scores, positions, mask)
    # Elsewhere looking would wait for the device, which copies faster than that.
    order = layer.positions.argsort(dim=2, stable=True)[:, :, -most:]  # -1, the unused, come first
    wide = order[..., None].expand(-1, -1, -1, layer.keys.shape[3])
    key, value, scores, positions = (
        tensor.gather(2, wide if tensor.ndim == 4 else order) for tensor in tensors
    )
    return Past(key, value, scores, positions, mask)


def _in_order(positions: Tensor) -> Tensor:
    """bool (): are all of them used, and do they ascend?"""
    return (positions[:, :, :1] >= 0).all() & (positions[:, :, 1:] > positions[:, :, :-1]).all()
