"""What the demo trains and for how long."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pattern import SFPattern


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults end in four minutes on two cores.

    The start model is trained from scratch at start_context tokens, then extended to context tokens. Steps
    are optimiser steps of a batch of as many blocks of the context's length. validation_tokens are scored of
    each of validation_files held-out files; sample_tokens are generated at the end.
    The last continuation_tokens of a context, at most half of it, are decoded through each cache, and
    num_streams texts of stream_contexts contexts are read through one.
    """

    seed: int = 0
    start_context: int = 256
    context: int = 1024
    group_size: int = 256
    num_sink_tokens: int = 4
    shifted_fraction: float = 0.25
    start_steps: int = 350
    start_batch: int = 4
    start_learning_rate: float = 5e-3
    extend_steps: int = 500
    extend_batch: int = 1
    extend_learning_rate: float = 5e-3
    lora_rank: int = 16
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    validation_files: int = 24
    validation_tokens: int = 2048
    sample_tokens: int = 200
    continuation_tokens: int = 128
    num_streams: int = 2
    stream_contexts: int = 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("seed", "num_sink_tokens", "shifted_fraction", "sample_tokens"):
                continue
            if not value > 0:
                raise ValueError(f"{field.name}: expected a positive number, got {value}")
        if self.seed < 0 or self.sample_tokens < 0:
            raise ValueError(
                f"seed, sample_tokens: expected at least 0, got {self.seed}, {self.sample_tokens}"
            )
        if self.start_context < 8:
            raise ValueError(f"start_context: expected at least 8 tokens, got {self.start_context}")
        if self.context <= self.start_context:
            raise ValueError(
                f"context: expected more than start_context = {self.start_context} tokens, got {self.context}"
            )
        if self.validation_tokens < self.context:
            raise ValueError(
                f"validation_tokens: expected at least context = {self.context}, got {self.validation_tokens}"
            )
        if self.hidden_size % (8 * self.num_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 8 * num_heads = {8 * self.num_heads}, "
                f"got {self.hidden_size}"
            )
        self.patterns()

    def patterns(self) -> dict[str, SFPattern | None]:
        """The training attentions by their names in the results; None is full attention."""
        from ..pattern import SFPattern  # not at the top: `sinklora demo --help` reads the defaults only

        return {
            "full": None,
            "S2-Attn": SFPattern.s2(self.group_size),
            "SF-Attn": SFPattern(
                group_size=self.group_size,
                num_sink_tokens=self.num_sink_tokens,
                shifted_fraction=self.shifted_fraction,
            ),
        }

    def lengths(self) -> list[int]:
        """The window lengths of the evaluation: start_context, then doubled up to context."""
        found = [self.start_context]
        while found[-1] * 2 < self.context:
            found.append(found[-1] * 2)
        return [*found, self.context]


# What --quick changes: less training and fewer files, so the numbers say little; it shows that everything
# runs.
QUICK = {
    "start_steps": 70,
    "extend_steps": 50,
    "validation_files": 6,
    "sample_tokens": 80,
    "continuation_tokens": 64,
    "num_streams": 1,
}
