"""What the host knows of a layer's rows, followed from forward to forward without asking the device.

The kernels count on the device. Where a step's mask would have to be read from there, the host takes an upper
bound, which is enough to know what memory is needed, and asks when somebody wants the numbers themselves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..budget import Budget
from .new import NewMask, num_clean
from .rows import RowCounts


class Followed:
    """A layer's part that counts."""

    rows: Any  # int32 (B, 4) on the device: SEEN first, see csrc/core/h2o.h
    budget: Budget
    is_initialized: bool
    first: Any = None  # the cache's first layer

    def forget(self) -> None:
        """No row has seen anything."""
        self.counts = RowCounts([], [], [], [], [])
        self.columns = 0  # tokens of a row so far, padding included
        self.clean = 0
        self.seen_before: list[int] = []  # tokens of each row before the last forward of more than one

    @property
    def counts(self) -> RowCounts:
        """What each row holds. Waits for the device after steps whose masks were not read."""
        if self.bounds.unread:
            self.bounds.settle(self.rows[:, 0].tolist())
        return self.bounds

    @counts.setter
    def counts(self, counts: RowCounts) -> None:
        self.bounds = counts  # where masks were not read, only most_used and capacity mean something

    @property
    def clean(self) -> int:
        """The last columns among which no row has padding. Waits for the device likewise."""
        if self._unread is not None:
            self.clean = int(num_clean(self._unread)) + self._clean
        return self._clean

    @clean.setter
    def clean(self, number: int) -> None:
        self._clean = number
        self._unread: Tensor | None = None  # the mask of all columns but those, where nobody looked at it

    def counts_before(self, batch: int) -> RowCounts:
        """The counts before a prompt; if the device has to be asked, the first layer does it for all."""
        if not self.is_initialized:
            return RowCounts.empty(batch, self.budget)
        if self.first is not None and self.first is not self:
            self.bounds.settle(self.first.seen_before)
        self.seen_before = list(self.counts.seen)
        return self.counts

    def follow_step(self, mask: NewMask) -> None:
        """After a forward of one token."""
        if mask.whole is None:
            self.bounds.step(mask.counts)
        else:
            self.bounds.unread += 1

    def follow_columns(self, mask: NewMask, num_new: int) -> None:
        """After any forward."""
        if mask.whole is not None:
            self._clean, self._unread = 0, mask.whole
        elif mask.tensor is None:
            self._clean += num_new
        else:
            self.clean = mask.clean
        self.columns += num_new
