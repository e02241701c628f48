"""SFPattern: validation, hand-drawn masks, counts, and its ways in and out."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sinklora
from sinklora import SFPattern


def draw(mask: np.ndarray) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask]


# Four heads of eight tokens, groups of four shifted by two, one sink. The definition against pictures.
PLAIN = [
    "x.......",
    "xx......",
    "xxx.....",
    "xxxx....",
    "x...x...",
    "x...xx..",
    "x...xxx.",
    "x...xxxx",
]
SHIFTED = [
    "x.......",
    "xx......",
    "x.x.....",
    "x.xx....",
    "x.xxx...",
    "x.xxxx..",
    "x.....x.",
    "x.....xx",
]
TWO_WAY = [
    "xxxxxxx",
    "xxx....",
    "xxx....",
    "x..xxx.",
    "x..xxx.",
    "x..xxx.",
    "x.....x",
]


def test_causal_mask_as_drawn() -> None:
    mask = SFPattern(group_size=4, num_sink_tokens=1).mask(4, 8)
    assert [draw(head) for head in mask] == [PLAIN, PLAIN, PLAIN, SHIFTED]


def test_two_way_mask_as_drawn() -> None:
    """Not causal, a short last group: sink queries see everything, every query sees the sink."""
    mask = SFPattern(3, num_sink_tokens=1, shifted_fraction=0.0, causal=False).mask(1, 7)
    assert draw(mask[0]) == TWO_WAY


@pytest.mark.parametrize("shift", [0, 4])
def test_no_shift_and_a_whole_groups_shift_are_the_plain_groups(shift: int) -> None:
    shifted = SFPattern(4, num_sink_tokens=1, shifted_fraction=1.0, shift=shift)
    assert [draw(head) for head in shifted.mask(2, 8)] == [PLAIN, PLAIN]


@pytest.mark.parametrize(
    ("num_heads", "fraction", "expected"),
    [(8, 0.25, 2), (3, 0.25, 0), (4, 1.0, 4), (5, 0.5, 2), (10, 0.3, 3), (1, 0.999, 0), (10, 0.7, 7)],
)
def test_shifted_heads_are_the_last_ones(num_heads: int, fraction: float, expected: int) -> None:
    mask = SFPattern(4, num_sink_tokens=0, shifted_fraction=fraction).mask(num_heads, 8)
    plain = SFPattern(4, num_sink_tokens=0, shifted_fraction=0.0).mask(1, 8)[0]
    differs = [bool((head != plain).any()) for head in mask]
    assert differs == [False] * (num_heads - expected) + [True] * expected


@settings(max_examples=60, deadline=None)
@given(
    group_size=st.integers(1, 12),
    sinks=st.integers(0, 30),
    fraction=st.floats(0, 1),
    causal=st.booleans(),
    heads=st.integers(0, 5),
    tokens=st.integers(0, 25),
    data=st.data(),
)
def test_flops_count_the_masks_pairs(
    group_size: int, sinks: int, fraction: float, causal: bool, heads: int, tokens: int, data: Any
) -> None:
    shift = data.draw(st.none() | st.integers(0, group_size))
    pattern = SFPattern(group_size, sinks, fraction, shift, causal)
    mask = pattern.mask(heads, tokens)
    assert mask.shape == (heads, tokens, tokens)
    assert mask.dtype == np.bool_
    assert pattern.pairs(heads, tokens) == mask.sum()
    assert pattern.flops(heads, tokens, 16) == 4 * 16 * int(mask.sum())
    if tokens:
        assert mask.any(-1).all()  # every query sees itself
    if causal:
        assert not np.triu(mask, 1).any()


def test_flops_of_long_sequences() -> None:
    """Counted by groups, not by pairs: n = 2^20 is instant. Full causal attention has n (n + 1) / 2 pairs."""
    n = 1 << 20
    assert SFPattern(2**62, 0).flops(2, n, 128) == 2 * 4 * 128 * n * (n + 1) // 2


def test_defaults_and_dict() -> None:
    pattern = SFPattern()
    plain = {
        "group_size": 2048,
        "num_sink_tokens": 4,
        "shifted_fraction": 0.25,
        "shift": None,
        "causal": True,
    }
    assert pattern.to_dict() == plain
    assert pattern.settings == (2048, 1024, 4, 0.25, True)
    assert SFPattern.from_dict({}) == pattern
    other = SFPattern(np.int64(6), np.int32(2), np.float32(0.5), np.int8(1), False)
    assert json.loads(json.dumps(other.to_dict())) == other.to_dict()
    assert SFPattern.from_dict(json.loads(json.dumps(other.to_dict()))) == other


def test_is_a_value() -> None:
    pattern = SFPattern(7, shift=3)
    for twin in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern), dataclasses.replace(pattern)):
        assert twin == pattern
        assert hash(twin) == hash(pattern)
        assert twin.settings == pattern.settings
    assert dataclasses.replace(pattern, group_size=9).settings[0] == 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.group_size = 8  # type: ignore[misc]


def test_from_ratio_rounds_up() -> None:
    assert SFPattern.from_ratio(8192).group_size == 2048
    assert SFPattern.from_ratio(10, 0.25).group_size == 3
    assert SFPattern.from_ratio(100, 0.07).group_size == 7  # 0.07 * 100 is 7.000000000000001
    assert SFPattern.from_ratio(9, 1 / 3).group_size == 3
    assert SFPattern.from_ratio(1, 0.25).group_size == 1
    assert SFPattern.from_ratio(1000, 1e-9).group_size == 1
    assert SFPattern.from_ratio(16, 1).group_size == 16
    assert SFPattern.from_ratio(16, num_sink_tokens=0, causal=False) == SFPattern(4, 0, causal=False)


def test_s2_is_half_the_heads_and_no_sinks() -> None:
    assert SFPattern.s2(512) == SFPattern(512, num_sink_tokens=0, shifted_fraction=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 0}, ValueError, "group_size: expected an integer >= 1, got 0"),
        ({"group_size": -4}, ValueError, "group_size: .*-4"),
        ({"group_size": 4.0}, TypeError, "group_size: expected an integer, got <class 'float'>"),
        ({"group_size": True}, TypeError, "group_size: expected an integer, got <class 'bool'>"),
        ({"group_size": "4"}, TypeError, "group_size: expected an integer"),
        ({"group_size": None}, TypeError, "group_size: expected an integer"),
        ({"group_size": 2**63}, ValueError, "group_size: expected an integer that fits 64 bits"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: .*-1"),
        ({"num_sink_tokens": 1.5}, TypeError, "num_sink_tokens"),
        ({"num_sink_tokens": -(2**70)}, ValueError, "num_sink_tokens"),
        ({"shifted_fraction": 1.01}, ValueError, r"shifted_fraction: .* in \[0, 1\], got 1.01"),
        ({"shifted_fraction": -0.1}, ValueError, "shifted_fraction"),
        ({"shifted_fraction": float("nan")}, ValueError, "shifted_fraction: .*nan"),
        ({"shifted_fraction": "half"}, TypeError, "shifted_fraction: expected a number"),
        ({"shifted_fraction": True}, TypeError, "shifted_fraction"),
        ({"shifted_fraction": 10**400}, ValueError, "shifted_fraction"),
        ({"shift": -1}, ValueError, "shift: .*-1"),
        ({"shift": 9}, ValueError, r"shift: expected 0 <= shift <= group_size \(8\), got 9"),
        ({"shift": 2.0}, TypeError, "shift: expected an integer"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got <class 'int'>"),
        ({"causal": None}, TypeError, "causal"),
    ],
)
def test_refuses_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SFPattern(**{"group_size": 8, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.mask(-1, 4), ValueError, "num_heads: .*-1"),
        (lambda p: p.mask(1, 2.0), TypeError, "num_tokens: expected an integer"),
        (lambda p: p.flops(1, -4, 8), ValueError, "num_tokens"),
        (lambda p: p.flops(1, 2**40, 8), ValueError, "num_tokens"),
        (lambda p: SFPattern(2**31).flops(2**31, 2**31, 8), ValueError, "num_heads"),
        (lambda p: p.flops(1, 4, True), TypeError, "head_dim"),
        (lambda p: p.from_ratio(0), ValueError, "num_tokens: .*0"),
        (lambda p: p.from_ratio(8, 0), ValueError, "ratio"),
        (lambda p: p.from_ratio(8, 1.5), ValueError, "ratio"),
        (lambda p: p.from_ratio(8, float("nan")), ValueError, "ratio"),
        (lambda p: p.from_ratio(8, "1/4"), TypeError, "ratio"),
        (lambda p: p.from_dict({"group": 3}), ValueError, "settings: .*group_size.*got group"),
        (lambda p: p.from_dict([3]), TypeError, "settings: expected a mapping"),
    ],
)
def test_refuses_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(sinklora.SFPattern(4))
