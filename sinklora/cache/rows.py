"""How many tokens each row of a batch has seen and how many entries it holds, on the host.

The kernels count in an int32 tensor of their own; these numbers run beside it, so that nothing is read back
from the device to know which memory is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import Budget


@dataclasses.dataclass
class RowCounts:
    """One number a batch row in each list; see csrc/core/h2o.h, sl_row_field."""

    seen: list[int]  # kept tokens so far
    used: list[int]  # entries of each key/value head
    prompt: list[int]  # of the seen ones those of forwards of more than one token: fractions are of these
    budget: list[int]  # heavy + recent + sinks
    recent: list[int]
    evicted: bool = False  # was anything ever evicted, in any row?
    # Steps since then whose masks were not read: until `settle`, most_used and capacity take their tokens for
    # kept, the other numbers are as they were.
    unread: int = 0

    @classmethod
    def empty(cls, batch: int, budget: Budget) -> RowCounts:
        """Rows that have seen nothing."""
        return cls([0] * batch, [0] * batch, *_limits([0] * batch, budget))

    def with_prompt(self, prompt: list[int], budget: Budget) -> RowCounts:
        """The same, with so many of each row's tokens in forwards of more than one."""
        return RowCounts(self.seen, self.used, *_limits(prompt, budget), evicted=self.evicted)

    @property
    def most_used(self) -> int:
        if self.unread:
            return max(min(a + self.unread, b) for a, b in zip(self.used, self.budget, strict=True))
        return max(self.used, default=0)

    def step(self, kept: Sequence[int] | None) -> None:
        """After a forward of one token, which is padding in the rows that are not kept."""
        if self.unread and kept is None:  # in order: these come after those
            self.unread += 1
            return
        for b in range(len(self.seen)):
            if kept is None or kept[b]:
                self.seen[b] += 1
                if self.used[b] < self.budget[b]:
                    self.used[b] += 1
                else:
                    self.evicted = True

    def settle(self, seen: Sequence[int]) -> None:
        """After unread steps: each row has now seen so many tokens."""
        if not self.unread:
            return
        for b, number in enumerate(seen):
            there = self.used[b] + number - self.seen[b]
            self.seen[b], self.used[b] = number, min(there, self.budget[b])
            self.evicted = self.evicted or there > self.budget[b]
        self.unread = 0

    def after_prompt(self, num_new: int, kept: Sequence[int] | None, budget: Budget) -> RowCounts:
        """The counts after a forward of more than one token and its eviction; kept: how many in each row."""
        new = [num_new] * len(self.seen) if kept is None else kept
        seen = [a + b for a, b in zip(self.seen, new, strict=True)]
        prompt, limit, recent = _limits([a + b for a, b in zip(self.prompt, new, strict=True)], budget)
        there = [a + b for a, b in zip(self.used, new, strict=True)]
        used = [min(a, b) for a, b in zip(there, limit, strict=True)]
        return RowCounts(seen, used, prompt, limit, recent, self.evicted or used != there)

    def capacity(self, least_growth: int) -> int:
        """Slots to make: budget + 1 once every row has reached it, before that a quarter more than in use."""
        used = self.most_used
        limit = max(self.budget, default=0) + 1
        return max(min(limit, used + max(least_growth, used // 4)), used + 1)

    def positions(self, num_new: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """int32 (B, num_new): the position of each new token in its row, -1 for padding."""
        first = torch.tensor(self.seen, dtype=torch.int32, device=device)[:, None]
        if mask is None:
            return first + torch.arange(num_new, dtype=torch.int32, device=device)
        place = mask.cumsum(1, dtype=torch.int32) - 1
        return torch.where(mask, first + place, -1)

    def mask(self, device: torch.device) -> Tensor | None:
        """bool (B, most_used): the entries of each row, at the end; None where all rows have as many."""
        most = self.most_used
        if all(used == most for used in self.used):
            return None
        first = most - torch.tensor(self.used, device=device)
        return torch.arange(most, device=device) >= first[:, None]

    def tensor(self, device: torch.device) -> Tensor:
        """int32 (B, 4) as the kernels count: SEEN, USED, BUDGET, RECENT."""
        fields = torch.tensor([self.seen, self.used, self.budget, self.recent], dtype=torch.int32)
        return fields.t().contiguous().to(device)

    def take(self, rows: Sequence[int]) -> RowCounts:
        """The counts of a batch made of these rows."""
        lists = (self.seen, self.used, self.prompt, self.budget, self.recent)
        seen, used, prompt, budget, recent = ([numbers[b] for b in rows] for numbers in lists)
        return RowCounts(seen, used, prompt, budget, recent, self.evicted)

    def without_last(self, num_tokens: int, budget: Budget) -> RowCounts:
        """The counts before the last num_tokens tokens came, where nothing was evicted."""
        seen = [number - num_tokens for number in self.seen]
        prompt, limit, recent = _limits([min(a, b) for a, b in zip(self.prompt, seen, strict=True)], budget)
        return RowCounts(seen, list(seen), prompt, limit, recent)


def _limits(prompt: list[int], budget: Budget) -> tuple[list[int], list[int], list[int]]:
    """prompt itself, and for each row the budget and its recent part."""
    entries = [budget.entries(number) for number in prompt]
    return prompt, [sum(parts) for parts in entries], [recent for _, recent, _ in entries]
