"""h2o_select's CUDA kernels on the emulator: the tests of the CPU's kernel, and the two compared."""

from __future__ import annotations

import emulated
import pytest
from test_h2o_select import (  # noqa: F401
    Entries,
    test_keeps_what_the_definition_keeps,
    test_nothing_to_do,
    test_random_scores_of_all_magnitudes,
    test_special_scores_and_ties,
    test_strides_and_threads,
    test_unused_slots_are_never_kept,
)
from torch import Tensor


def select(entries: Entries, outputs: tuple[Tensor, ...], num_sinks: int = 0, num_threads: int = 1) -> None:
    """A number of threads is an order of blocks, warps and lanes."""
    emulated.seed(num_threads)
    inputs = (entries.key, entries.value, entries.scores, entries.positions, entries.rows)
    emulated.select(inputs, outputs, num_sinks)


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entries, "select", select)
