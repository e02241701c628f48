"""Errors planted in the CUDA kernels are told: by the emulator's report, or by a result that is not the same.

Every barrier, wait, commit and fence of every kernel is taken away once, every wait is made weaker once (``-m
slow``; the ordinary run takes one of each file); so are the classical mistakes of a tiled kernel, and one for
each wrapper.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import emulation
import planted
import planted_wrappers
import pytest
from emulation import ROOT
from planted import Planted, replaced
from ptx_expected import UNITS
from test_ptx import PTX, compare, given, run_unit, wrappers

SYNCS = {file: found for file in planted.kernel_files() if (found := planted.find_syncs(file))}

# What may be taken away unnoticed, and why: (file, what it was, the how-manieth of its text, from 0).
HARMLESS: dict[tuple[str, str, int], str] = {}


def unnoticed(errors: list[Planted], folder: Path) -> list[str]:
    return [str(error) for error in errors if not harmless(error) and not planted.told_by(error, folder)]


def harmless(error: Planted) -> bool:
    was = error.source[error.start : error.end]
    return (error.file, was, error.source.count(was, 0, error.start)) in HARMLESS


def test_harmless_ones_are_there() -> None:
    assert len(HARMLESS) == sum(harmless(error) for found in SYNCS.values() for error in found)


@pytest.fixture(autouse=True)
def a_compiler() -> None:
    if reason := emulation.missing():
        pytest.skip(reason)


def test_no_error_is_not_told(tmp_path: Path) -> None:
    spaces = replaced("csrc/cuda/sequences.cu", r"__syncthreads\(\);", "__syncthreads( );")
    assert not planted.told_by(spaces, tmp_path, planted.LADDER[:1])


@pytest.mark.parametrize("file", SYNCS)
def test_a_missing_barrier_is_told(file: str, tmp_path: Path) -> None:
    assert not unnoticed([error for error in SYNCS[file] if not harmless(error)][:1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", SYNCS)
def test_every_missing_barrier_is_told(file: str, tmp_path: Path) -> None:
    assert not unnoticed(SYNCS[file], tmp_path)


# ---- what one gets wrong in a tiled kernel

FORWARD = "csrc/cuda/sm80/attention_forward.cuh"
IN_TILE, IN_BLOCK = (FORWARD.replace(".cuh", f"_{part}.cuh") for part in ("tile", "block"))
COPY, TILE = "csrc/cuda/sm80/copy.cuh", "csrc/cuda/sm80/tile.cuh"
MISTAKES = {
    "off-by-one shared row": (
        COPY,
        r"sl_cp_async_16_if\(in, to \+",
        "sl_cp_async_16_if(in, to + (n == end - 1) * D * 2 +",
    ),
    "wrong ldmatrix lane map": (
        IN_BLOCK,
        r"\(lane & 7\) \+ \(\(lane >> 4\) << 3\), \(lane >> 3\) & 1",
        "lane & 15, lane >> 4",
    ),
    "unguarded ragged tail": (
        COPY,
        r"n < end \?([\s\S]*?)const bool in = n < end",
        r"n <= end ?\1const bool in = n <= end",
    ),
    "no swizzle": (TILE, r"chunk \^ \(row & 7\)", "chunk"),
    "packed halves swapped": (IN_TILE, r"\(x\[0\], x\[1\]\)", "(x[1], x[0])"),
    "global store out of bounds": (FORWARD, r"p->lse\[\(", "p->lse[1 + ("),
    "shuffle in a divergent branch": (
        IN_TILE,
        r"m = (fmaxf\(m, __shfl_xor_sync\(0xffffffffu, m, 1\)\));",
        r"if (threadIdx.x < 77) { m = \1; }",
    ),
    "a warp leaves before a barrier": (
        FORWARD,
        r"int moving = -1;",
        "int moving = -1; if (threadIdx.x >= 96) return;",
    ),
    "plain race in shared memory": (
        FORWARD,
        r"int moving = -1;",
        "int moving = -1; float *scratch = (float *)SL_SHARED_BASE(); sl_cp_async_wait<0>(); "
        "__syncthreads(); scratch[threadIdx.x] = 1; row_sum[0] += scratch[threadIdx.x ^ 64] - 1;",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake: str, tmp_path: Path) -> None:
    assert not unnoticed([replaced(*MISTAKES[mistake])], tmp_path)


# ---- the wrappers


def test_every_wrapper_has_a_planted_error() -> None:
    names = {name for header in PTX.glob("*.cuh") for name in wrappers(header)}
    assert names - planted_wrappers.EXEMPT == set(planted_wrappers.ERRORS)


def wrapper_is_told(wrapper: str, folder: Path) -> None:
    kernel, old, new = planted_wrappers.ERRORS[wrapper]
    file = f"{emulation.ENGINE}/ptx/{kernel}.cu"
    error, tree = replaced(file, old, new), folder / "tree"
    for part in ("csrc/core", "csrc/cuda/ptx", emulation.ENGINE):
        shutil.copytree(ROOT / part, tree / part)
    (tree / file).write_text(error.source[: error.start] + error.text + error.source[error.end :])
    emulator = emulation.Emulator(emulation.build([file], "race", ("-w",), tree, folder))
    for unit in UNITS:
        if unit.kernel == kernel:
            inputs, expected = given(unit)
            try:
                compare(unit, run_unit(emulator, unit, inputs, len(expected)), expected)
            except (RuntimeError, AssertionError):
                return
    pytest.fail(f"{error} goes unnoticed")


@pytest.mark.parametrize("wrapper", sorted(planted_wrappers.ERRORS)[::10])
def test_an_error_with_a_wrapper_is_told(wrapper: str, tmp_path: Path) -> None:
    wrapper_is_told(wrapper, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", planted_wrappers.ERRORS)
def test_an_error_with_any_wrapper_is_told(wrapper: str, tmp_path: Path) -> None:
    wrapper_is_told(wrapper, tmp_path)
