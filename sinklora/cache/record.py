"""When which token was evicted: kept on request, for pictures. It grows with the text, by 4 bytes a token
and head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import H2OLayer

# More than a picture shows.
MOST_MOMENTS = 400


class Timeline:
    """For each token of each row and key/value head, how many tokens its row had seen when it was evicted.

    Attributes:
        evicted_at: int32 (B, Hkv, tokens), -1 for what is kept or still to come.
        seen: tokens of each row after each forward.
    """

    def __init__(self) -> None:
        self.evicted_at: Tensor | None = None
        self.seen: list[list[int]] = []

    def note(self, positions: Tensor, seen: list[int]) -> None:
        """After a forward: positions (B, Hkv, slots) are kept, -1 in unused slots; seen counts each row's
        tokens.
        """
        with torch.inference_mode(False), torch.no_grad():
            batch, heads, _ = positions.shape
            length = max(seen, default=0)
            old = self.evicted_at
            if old is None or old.shape[2] < length:
                new = positions.new_full((batch, heads, length + length // 4), -1)
                if old is not None:
                    new[:, :, : old.shape[2]] = old
                self.evicted_at = old = new
            kept = torch.zeros(batch, heads, old.shape[2] + 1, dtype=torch.bool, device=old.device)
            kept.scatter_(2, positions.where(positions >= 0, old.shape[2]).long(), True)
            counts = torch.tensor(seen, dtype=torch.int32, device=old.device)[:, None, None]
            came = torch.arange(old.shape[2], device=old.device) < counts
            old.copy_(torch.where(came & ~kept[:, :, :-1] & (old < 0), counts, old))
        self.seen.append(list(seen))

    def kept_at(self, row: int, moment: int) -> npt.NDArray[np.int64]:
        """(Hkv, entries): the positions that each head of a row kept after forward `moment`, -1 behind
        them.
        """
        seen = self.seen[moment][row]
        assert self.evicted_at is not None
        at = self.evicted_at[row, :, :seen]
        kept = ((at < 0) | (at > seen)).long()
        order = kept.argsort(dim=1, descending=True, stable=True)[:, : int(kept.sum(1).max())]
        return torch.where(kept.gather(1, order) > 0, order, -1).cpu().numpy()

    def crop(self, seen: list[int]) -> None:
        """Tokens were taken back, so that rows have seen so many now; none had been evicted."""
        while self.seen and self.seen[-1] > seen:
            self.seen.pop()
        self.seen.append(list(seen))

    def take(self, rows: Tensor) -> Timeline:
        """The timeline of a batch made of these rows."""
        new = Timeline()
        new.evicted_at = None if self.evicted_at is None else self.evicted_at.index_select(0, rows)
        new.seen = [[seen[b] for b in rows.tolist()] for seen in self.seen]
        return new


def moments(
    layer: H2OLayer, row: int
) -> tuple[list[int], list[npt.NDArray[np.int64]], npt.NDArray[np.float32] | None]:
    """Tokens seen, and what was kept of them, at up to 400 moments of a layer's timeline, the last one
    included.

    Without a timeline one moment, now, with its scores, (Hkv, entries), as third.
    """
    if not layer.columns:
        raise ValueError("plot: expected a cache that has seen tokens, got an empty one")
    if not 0 <= row < len(layer.counts.seen):
        raise ValueError(f"row: expected from 0 to {len(layer.counts.seen) - 1}, got {row}")
    timeline = layer.timeline
    if timeline is None:
        positions, scores = layer.entries()
        return [layer.counts.seen[row]], [positions[row].cpu().numpy()], scores[row].cpu().numpy()
    step = -(-len(timeline.seen) // MOST_MOMENTS)
    chosen = [*range(len(timeline.seen) - 1, -1, -step)][::-1]
    seen = [timeline.seen[moment][row] for moment in chosen]
    return seen, [timeline.kept_at(row, moment) for moment in chosen], None
