"""Packing, padding and restarting positions: the bits of every sequence alone, and nothing crosses over."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accuracy import NAMES, Result, assert_accurate, assert_same_bits, kernel
from cases import DTYPES, Inputs, case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinklora import SFPattern, torch_ops

LENGTHS = {
    "one": [65],
    "ones": [1] * 9,
    "odd": [1, 63, 0, 33, 7],
    "empty ends": [0, 40, 0],
    "long and short": [130, 2],
    "nothing": [0, 0],
}
PATTERNS = {
    "sf": SFPattern(16, 4, 0.5),
    "many sinks": SFPattern(16, 66, 0.5),
    "both ways": SFPattern(20, 3, 0.5, causal=False),
    "one group": SFPattern(1000, 0, 0.0),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def random_inputs(
    batch: int, tokens: int, dtype: torch.dtype, generator: torch.Generator, dim: int = 16
) -> Inputs:
    return case((batch, 4, 2, tokens, dim), 1).inputs(dtype, generator)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def take(inputs: Inputs, row: int, tokens: Tensor | slice) -> Inputs:
    return Inputs(*(x[row : row + 1, :, tokens] for x in inputs))


def run(inputs: Inputs, pattern: SFPattern, **options: Tensor) -> Result:
    return kernel(*inputs[:3], pattern, inputs.grad, **options)


def assert_rows_equal(got: Result, row: int, tokens: Tensor | slice, alone: Result, where: str) -> None:
    for name in (*NAMES, "lse"):
        assert_same_bits(
            getattr(got, name)[row : row + 1, :, tokens], getattr(alone, name), f"{where}: {name}"
        )


# ---- packing ----


@every_pattern
@every_dtype
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sequences_equal_each_alone(
    lengths: list[int], dtype: torch.dtype, pattern: SFPattern, cpu_level: str, torch_rng: torch.Generator
) -> None:
    inputs = random_inputs(1, sum(lengths), dtype, torch_rng)
    bounds = offsets(lengths)
    packed = run(inputs, pattern, cu_seqlens=bounds)
    for lo, hi in pairwise(bounds.tolist()):
        alone = run(take(inputs, 0, slice(lo, hi)), pattern)
        assert_rows_equal(packed, 0, slice(lo, hi), alone, f"sequence [{lo}, {hi})")


@every_pattern
def test_restarting_positions_equal_packing(
    pattern: SFPattern, cpu_level: str, torch_rng: torch.Generator
) -> None:
    inputs = random_inputs(2, 71, torch.float32, torch_rng)
    rows = [[30, 1, 1, 39], [71]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    positions[0, 20:30] += 5  # a jump forward starts no sequence
    positions[1] += 7  # nor does a start that is not 0
    got = run(inputs, pattern, position_ids=positions)
    for row, lengths in enumerate(rows):
        alone = run(take(inputs, row, slice(None)), pattern, cu_seqlens=offsets(lengths))
        assert_rows_equal(got, row, slice(None), alone, f"row {row}")
    both = run(inputs, pattern, position_ids=positions[:1])
    first = run(take(inputs, 0, slice(None)), pattern, cu_seqlens=offsets(rows[0]))
    assert_rows_equal(both, 0, slice(None), first, "one row of positions for every batch row")


# ---- padding ----


def padding_masks(tokens: int, generator: torch.Generator) -> Tensor:
    """One row each: all kept, left, right, both sides, holes, every second, one token, none."""
    keep = torch.ones(8, tokens, dtype=torch.bool)
    keep[1, :23] = False
    keep[2, -30:] = False
    keep[3, :5], keep[3, -9:] = False, False
    keep[4] = torch.rand(tokens, generator=generator) < 0.7
    keep[5, ::2] = False
    keep[6] = torch.arange(tokens) == tokens // 2
    keep[7] = False
    return keep


@every_pattern
@every_dtype
def test_padded_rows_equal_their_kept_tokens(
    dtype: torch.dtype, pattern: SFPattern, cpu_level: str, torch_rng: torch.Generator
) -> None:
    keep = padding_masks(97, torch_rng)
    inputs = random_inputs(len(keep), 97, dtype, torch_rng)
    for x in inputs:
        x.transpose(1, 2)[~keep] = float("nan")
    got = run(inputs, pattern, padding_mask=keep)
    for row, kept in enumerate(keep):
        assert_rows_equal(got, row, kept, run(take(inputs, row, kept), pattern), f"row {row}")
    for name in NAMES:
        assert (getattr(got, name).transpose(1, 2)[~keep] == 0).all(), f"{name} of padding is not zero"
    assert (got.lse.transpose(1, 2)[~keep] == float("-inf")).all()


def test_padding_mask_of_any_layout(torch_rng: torch.Generator) -> None:
    keep = padding_masks(97, torch_rng)
    inputs = random_inputs(len(keep), 97, torch.float32, torch_rng)
    want = run(inputs, PATTERNS["sf"], padding_mask=keep)
    wide = torch.zeros(len(keep), 200, dtype=torch.bool)
    wide[:, 3:197:2] = keep
    for odd in (keep.t().contiguous().t(), wide[:, 3:197:2]):
        got = run(inputs, PATTERNS["sf"], padding_mask=odd)
        assert_rows_equal(got, 0, slice(None), Result(*(x[:1] for x in want)), "strided mask")
    row = torch.zeros(1, 97, dtype=torch.bool).expand(len(keep), -1)
    assert (run(inputs, PATTERNS["sf"], padding_mask=row).output == 0).all()


# ---- nothing crosses over ----


@every_dtype
def test_nan_in_one_sequence_changes_no_bit_of_another(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    inputs = random_inputs(1, 100, dtype, torch_rng)
    bounds = offsets([33, 7, 60])
    for pattern in PATTERNS.values():
        clean = run(inputs, pattern, cu_seqlens=bounds)
        broken = Inputs(*(x.clone() for x in inputs))
        for x in broken:
            x[:, :, 33:40] = float("nan")
        got = run(broken, pattern, cu_seqlens=bounds)
        for part in (slice(0, 33), slice(40, 100)):
            alone = Result(*(x[:, :, part] for x in clean))
            assert_rows_equal(got, 0, part, alone, f"tokens {part}")
        assert got.output[:, :, 33:40].isnan().all()


@every_dtype
def test_nan_in_one_batch_row_changes_no_bit_of_another(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    inputs = random_inputs(3, 65, dtype, torch_rng)
    for x in inputs:
        x[1] = float("nan")
    got = run(inputs, PATTERNS["sf"])
    for row in (0, 2):
        assert_rows_equal(
            got, row, slice(None), run(take(inputs, row, slice(None)), PATTERNS["sf"]), f"row {row}"
        )


# ---- against the definition ----


@every_dtype
def test_packed_accuracy(dtype: torch.dtype, cpu_level: str) -> None:
    inputs = random_inputs(1, 150, dtype, torch.Generator().manual_seed(7), dim=40)
    bounds = offsets([70, 1, 0, 79])
    assert_accurate(*inputs[:3], SFPattern(32, 4, 0.5), inputs.grad, cu_seqlens=bounds)


@every_dtype
def test_padded_accuracy(dtype: torch.dtype, cpu_level: str) -> None:
    generator = torch.Generator().manual_seed(8)
    keep = padding_masks(65, generator)
    inputs = random_inputs(len(keep), 65, dtype, generator, dim=24)
    assert_accurate(*inputs[:3], SFPattern(16, 4, 0.5), inputs.grad, padding_mask=keep)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    group_size=st.integers(1, 50),
    shift=st.floats(0, 1),
    sinks=st.integers(0, 45),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=st.sampled_from([8, 16, 24, 56]),
    fraction=st.floats(0, 1),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    lengths: list[int],
    group_size: int,
    shift: float,
    sinks: int,
    heads: tuple[int, int],
    dim: int,
    fraction: float,
    causal: bool,
    seed: int,
) -> None:
    """Float32, whatever the sizes: within the rule, and each sequence as if alone."""
    pattern = SFPattern(group_size, sinks, fraction, round(shift * group_size), causal)
    shape = case((1, heads[0] * heads[1], heads[0], sum(lengths), dim), 1)
    inputs = shape.inputs(torch.float32, torch.Generator().manual_seed(seed))
    bounds = offsets(lengths)
    got = assert_accurate(*inputs[:3], pattern, inputs.grad, cu_seqlens=bounds)
    for lo, hi in pairwise(bounds.tolist()):
        part = slice(lo, hi)
        output, _ = torch_ops.sf_attention(*(x[:, :, part] for x in inputs[:3]), pattern)
        assert_same_bits(got.output[:, :, part], output, f"sequence [{lo}, {hi})")
