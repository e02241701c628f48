"""What does a call cost by itself? A whole call on a tiny input, no gradient, against SDPA's on the same."""

from __future__ import annotations

from collections.abc import Callable

import report
import timing
import torch
from shapes import FORWARD, OURS, Case, Inputs
from torch.nn.functional import scaled_dot_product_attention

import sinklora

CALLS = 2000
BLOCKS_PER_ROUND = 3
SHAPE = "4/4/16/64/2048"


def _block(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                call()

    return run


def measure(dtype: str, rounds: int, bar: float) -> list[report.Row]:
    """Two rows, ours and "dense" (SDPA, causal): seconds of a call, medians of blocks of 2000 calls."""
    case = Case.parse(dtype, SHAPE)
    inputs = Inputs.of(case)
    query, key, value = inputs.query, inputs.key, inputs.value
    pattern = sinklora.SFPattern(group_size=case.group_size)
    blocks = {
        OURS: _block(lambda: sinklora.sf_attention(query, key, value, pattern)),
        "dense": _block(lambda: scaled_dot_product_attention(query, key, value, is_causal=True)),
    }
    # Blocks are shorter than the system's clock of busy processes can resolve: nothing is dropped.
    timings = timing.interleave(blocks, rounds=rounds * BLOCKS_PER_ROUND, drop_disturbed=False)
    rows = []
    for name, taken in timings.items():
        row = report.Row.of(case, "tiny", FORWARD, name)
        row.seconds = taken.median / CALLS
        row.first_quartile, row.third_quartile = (seconds / CALLS for seconds in taken.quartiles)
        row.samples, row.dropped = len(taken.seconds), 0
        row.note = "" if taken.quiet else timing.BUSY
        rows.append(row)
    ours, sdpa = rows
    assert isinstance(ours.seconds, float) and isinstance(sdpa.seconds, float)
    ours.over_dense = sdpa.seconds / ours.seconds
    ours.bar = f"sdpa >= {bar:g}x"
    ours.verdict = "pass" if ours.over_dense >= bar else "FAIL"
    return rows
