"""Each wrapper of csrc/cuda/ptx against the PTX manual: unit kernels dump what they got, on the emulator and,
with ``-m gpu``, on a GPU, whose dump is kept in tests/emulator/golden (SINKLORA_GOLDEN=write) and compared
ever after.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import emulation
import numpy as np
import pytest
import torch
from emulation import BLANK, READ, ROOT, WRITE, Emulator
from ptx_expected import UNITS, Unit

PTX = ROOT / "csrc" / "cuda" / "ptx"
KERNELS = ROOT / "tests" / "emulator" / "ptx"
GOLDEN = ROOT / "tests" / "emulator" / "golden"
SOURCES = [path.relative_to(ROOT).as_posix() for path in sorted(KERNELS.glob("*.cu"))]
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.id)


def given(unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and what they give; the same in every run, as golden dumps need."""
    inputs = unit.inputs(np.random.default_rng(sum(unit.id.encode())))
    return inputs, unit.expected(inputs)


def without_payloads(unit: Unit, values: np.ndarray) -> np.ndarray:
    """Which NaN a float becomes is the device's business."""
    first = {"convert": 512, "minimum": 0, "widen": 0}.get(unit.kernel, len(values))
    floats = values[first:].copy()
    floats[np.isnan(floats.view(np.float32))] = 0x7FFFFFFF
    return np.concatenate([values[:first], floats])


def compare(unit: Unit, got: np.ndarray, expected: np.ndarray) -> None:
    if unit.tolerance:
        a, b = got.view(np.float32), expected.view(np.float32)
        np.testing.assert_allclose(a, b, rtol=unit.tolerance, atol=unit.tolerance, err_msg=unit.id)
    else:
        got, expected = without_payloads(unit, got), without_payloads(unit, expected)
        np.testing.assert_array_equal(got, expected, err_msg=unit.id)


def run_unit(emulator: Emulator, unit: Unit, inputs: np.ndarray, size: int) -> np.ndarray:
    emulator.clear()
    out = np.zeros(size, np.uint32)
    emulator.allow(inputs.ctypes.data, inputs.nbytes)
    emulator.allow(out.ctypes.data, out.nbytes, READ | WRITE | (0 if unit.kernel == "atomic" else BLANK))
    pointers = (ctypes.c_void_p(inputs.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    status = getattr(emulator.lib, f"unit_{unit.kernel}")(*pointers, unit.mode, None)
    if status:
        raise RuntimeError(emulator.report() or f"CUDA error {status}")
    return out


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    if reason := emulation.missing():
        pytest.skip(reason)
    return emulation.load(emulation.build(SOURCES))


@each_unit
def test_wrapper_does_what_the_manual_says(unit: Unit, emulator: Emulator) -> None:
    inputs, expected = given(unit)
    for seed in (1, 2, 3):
        emulator.seed(seed)
        compare(unit, run_unit(emulator, unit, inputs, len(expected)), expected)
    emulator.seed(1)
    golden = GOLDEN / f"{unit.id}.npy"
    if golden.exists():
        compare(unit, np.load(golden), expected)


def wrappers(header: Path) -> list[str]:
    """The names of the functions of a header of csrc/cuda/ptx."""
    function = r"^(?:template <[^>]*> *\n?)?SL_DEV [\w ]+?[ *](sl_\w+)\("
    return re.findall(function, header.read_text(), re.MULTILINE)


def test_every_wrapper_has_a_unit() -> None:
    """A function of csrc/cuda/ptx that no unit kernel calls is not tested."""
    called = " ".join(path.read_text() for path in KERNELS.glob("*.cu"))
    for header in PTX.glob("*.cuh"):
        for name in wrappers(header):
            assert re.search(rf"\b{name}\b", called), f"{header.name}: no unit kernel calls {name}"


# What the device's body of a wrapper must become: one of these in the PTX of the unit kernel.
MMA = "mma.sync.aligned.m16n8k16.row.col.f32"
INSTRUCTIONS = {
    "address": ("mad.wide.s32", "add.s64"),
    "minimum": ("min.NaN.f32",),
    "floats": (
        *("ld.shared.v4.f32", "st.shared.v4.f32", "ld.shared.f32", "st.shared.f32"),
        *("ld.global.v4", "st.global.v4"),
    ),
    "widen": ("cvt.f32.f16", "mul.rn.f32"),
    "ldmatrix": ("ldmatrix.sync.aligned.m8n8.x1.shared.b16", "m8n8.x4.trans.shared.b16", "movmatrix.sync"),
    "mma": (f"{MMA}.bf16.bf16.f32", f"{MMA}.f16.f16.f32"),
    "cp_async": (
        *("cp.async.cg.shared.global", "cp.async.ca.shared.global"),
        *("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"),
    ),
    "memory": (
        *("st.shared.b16", "ld.shared.b16", "st.shared.v2.b32", "ld.shared.v4.b32", "st.shared.v4.b32"),
        *("ld.global.cs", "st.global.cs"),
    ),
    "warp": (
        *("shfl.sync.bfly", "shfl.sync.up", "shfl.sync.down", "shfl.sync.idx"),
        *("vote.sync.ballot", "match.any.sync", "redux.sync"),
    ),
    "barrier": ("bar.sync", "bar.arrive"),
    "atomic": ("atom.shared.add.u32", "atom.shared.min.s32", "atom.shared.cas.b32", "atom.shared.exch.b32"),
    "convert": (
        *("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32", "cvt.rn.bf16.f32", "cvt.f32.f16"),
        *("ex2.approx.ftz", "lg2.approx.ftz", "rcp.approx.ftz"),
    ),
}


@pytest.mark.parametrize("kernel", sorted(path.stem for path in KERNELS.glob("*.cu")))
def test_device_body_is_the_instruction(kernel: str, tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    out = tmp_path / "unit.ptx"
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", str(KERNELS / f"{kernel}.cu"), "-o", str(out)]
    # The sanitizers' runtime is for this process: nvcc does not start with it.
    environment = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    for instruction in INSTRUCTIONS[kernel]:
        assert instruction in text, instruction


# ---- on a device


@pytest.fixture(scope="module")
def device_units(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    out = tmp_path_factory.mktemp("units") / "units.so"
    files = [str(ROOT / source) for source in SOURCES]
    command = ["nvcc", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC", *files, "-o", str(out)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(out))


@pytest.mark.gpu
@each_unit
def test_device_does_what_the_manual_says(unit: Unit, device_units: ctypes.CDLL) -> None:
    inputs, expected = given(unit)
    source = torch.from_numpy(inputs.view(np.int32)).cuda()
    out = torch.zeros(len(expected), dtype=torch.int32, device="cuda")
    run = getattr(device_units, f"unit_{unit.kernel}")
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status = run(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()), unit.mode, stream)
    assert status == 0
    torch.cuda.synchronize()
    got = out.cpu().numpy().view(np.uint32)
    if os.environ.get("SINKLORA_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        np.save(GOLDEN / f"{unit.id}.npy", got)
    compare(unit, got, expected)
