"""The emulator itself: every kind of mistake is reported at its source line, and the process lives on."""

from __future__ import annotations

import ctypes
import re

import emulated
import emulation
import numpy as np
import ptx_expected
import pytest
from emulation import BLANK, READ, ROOT, WRITE, Emulator

SOURCE = "tests/emulator/engine_test/mistakes.cu"
# What the report says, in the order of the kernel's enum; None: no report.
MISTAKES: dict[str, str | None] = {
    "none": None,
    "no barrier": "race: read, unordered with a write|nothing was written to",
    "no syncwarp": "race: read, unordered with a write|nothing was written to",
    "overwritten": "race: write, unordered with a read|race: read, unordered with a write",
    "unwritten shared": "which nothing was written to",
    "outside shared": r"st.shared: shared offset \d+ \+ 4 out of 4096 bytes",
    "misaligned": "shared offset 8 is not a multiple of 16",
    "not shared": "is not into shared memory",
    "divergent": r"divergent warp collective: another lane is at .*mistakes.cu:\d+",
    "divergent barrier": r"divergent barrier: a lane of the same warp is at .*mistakes.cu:\d+",
    "deadlock": r"deadlock: no thread can run; warp 0 lanes 0-31: exited; warp 1 .* barrier at .*:\d+",
    "exited lanes": "deadlock|lanes that have exited",
    "other lanes' shuffle": "shuffle from lane 3, which is not in the mask 0xffff0000",
    "barrier counts": "barrier 2",
    "left at a barrier": r"the block ended with threads that arrived at barrier \d",
    "some reduce": "some threads reduce, others do not",
    "copy too early": "read of data that a cp.async has not delivered",
    "copy not waited for": "cp.async still in flight when its thread exited",
    "copy's target written": "write into the target of a cp.async in flight",
    "read beyond": "ld.global: read of 4 bytes at 0x.*, out",
    "read of a gap": "out of bounds: a gap",
    "write to an input": "st.global: write of 4 bytes at 0x.*, which is read-only",
    "global race": "race: read, unordered with a write|race: write, unordered with a read",
    "blocks write": "race: two blocks write",
    "blocks read": "race: read of what another block writes|race: write of .* which another block reads",
    "no fence": "race: read of what another block writes",
    "fenced": None,
    "atomic and read": "race: (read|write), unordered with",
    "plain race": r"mistakes.cu:\d+ \(plain access\): (race|read of shared)",
    "plain beyond": r"mistakes.cu:\d+ \(plain access\): plain access: read of 4 bytes at 0x.*, out",
    "blank read": "which nothing was written to",
    "conflicts": None,
    "broadcast": None,
    "matrix conflicts": None,
    "order": None,
}
# Seen where plain accesses are hooked only.
HOOKED = {"plain race", "plain beyond", "blank read"}
NUMBER = {name: i for i, name in enumerate(MISTAKES)}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    if reason := emulation.missing():
        pytest.skip(reason)
    return emulation.load(emulation.build([SOURCE]))


def make(
    emulator: Emulator, mistake: str, blocks: int = 4, shared: int = 4096, stream: int = 0
) -> np.ndarray:
    given, out = np.arange(264, dtype=np.uint32), np.zeros(4096, np.uint32)
    emulator.clear()
    emulator.allow(given.ctypes.data, given.nbytes)
    emulator.forbid(given.ctypes.data + 1024, 16)
    emulator.allow(out.ctypes.data, out.nbytes, READ | WRITE | (BLANK if mistake == "blank read" else 0))
    pointers = (ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    status = emulator.lib.make_mistake(*pointers, NUMBER[mistake], blocks, shared, ctypes.c_void_p(stream))
    if status:
        raise RuntimeError(emulator.report() or f"CUDA error {status}")
    return out


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_and_the_next_launch_works(mistake: str, emulator: Emulator) -> None:
    expected = MISTAKES[mistake]
    if mistake in HOOKED and emulator.kind != "hook":
        pytest.skip("plain accesses are seen in the hook build")
    for seed in (1, 2, 3):
        emulator.seed(seed)
        if expected is None:
            make(emulator, mistake)
            assert emulator.report() == ""
            continue
        with pytest.raises(RuntimeError) as error:
            make(emulator, mistake)
        assert re.search(expected, str(error.value)), str(error.value)
        if "block ended" not in str(error.value):
            assert re.search(r"\[block \d+,0,0 thread \d+ seed \d\]$", str(error.value))
            assert "mistakes.cu:" in str(error.value)
        assert list(make(emulator, "none")[:128]) == [*range(64), *range(64)]
    emulator.seed(1)


def test_names_are_the_kernels() -> None:
    names = re.findall(r"^    ([A-Z_]+),$", (ROOT / SOURCE).read_text(), re.MULTILINE)
    assert len(names) == len(MISTAKES)


def test_order_of_blocks_is_the_seeds(emulator: Emulator) -> None:
    def order(seed: int) -> list[int]:
        emulator.seed(seed)
        return make(emulator, "order", blocks=9)[1:10].tolist()

    assert order(5) == order(5)
    assert sorted(order(5)) == list(range(9))
    assert len({tuple(order(seed)) for seed in range(1, 9)}) > 4
    emulator.seed(1)


def test_bank_conflicts_are_counted(emulator: Emulator) -> None:
    make(emulator, "conflicts", blocks=1)
    counts = emulator.statistics()
    assert (counts.write_ideal, counts.write_wavefronts) == (2, 64)
    assert re.search(r"mistakes.cu:\d+: st.shared: 32.000 wavefronts", emulator.conflicts()[0])
    make(emulator, "broadcast", blocks=1)
    counts = emulator.statistics()
    assert (counts.read_ideal, counts.read_wavefronts) == (2, 2)
    make(emulator, "matrix conflicts", blocks=1)
    counts = emulator.statistics()
    assert (counts.ldmatrix, counts.ldmatrix_wavefronts) == (8, 64)
    assert any("ldmatrix: 8.000" in line for line in emulator.conflicts())
    make(emulator, "none")
    assert not emulator.conflicts()


def test_limits_of_a_launch(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match="CUDA error 9"):
        make(emulator, "none", blocks=0)
    with pytest.raises(RuntimeError, match=r"CUDA error 1$"):
        make(emulator, "none", shared=50 << 10)  # more than 48 KB, and not asked for
    assert emulator.lib.allow_shared(50 << 10) == 0
    make(emulator, "none", shared=50 << 10)
    assert emulator.lib.allow_shared(100 << 10) == 1
    emulator.device(shared=163 << 10)
    assert emulator.lib.allow_shared(100 << 10) == 0
    emulator.device()


def test_work_on_another_stream_is_reported(emulator: Emulator) -> None:
    make(emulator, "none", stream=64)
    memory = np.ones(4, np.uint32)
    pointer, size = ctypes.c_void_p(memory.ctypes.data), ctypes.c_int64(memory.nbytes)
    emulator.allow(memory.ctypes.data, memory.nbytes, READ | WRITE)
    emulator.expect_stream(64)
    assert emulator.lib.set_memory(pointer, 255, size, ctypes.c_void_p(64)) == 0
    assert memory[3] == 0xFFFFFFFF
    assert emulator.lib.set_memory(pointer, 0, size, None) != 0
    assert "on stream" in emulator.report()
    assert memory[3] == 0xFFFFFFFF


def test_strided_memory_is_its_elements(emulator: Emulator) -> None:
    wide = np.zeros((3, 4, 24), np.uint32)
    part = wide[::2, 1:3, 4:8]
    emulator.clear()
    emulator.allow_strided(part.ctypes.data, part.shape, part.strides, 4, READ | WRITE)
    size = ctypes.c_int64(16)
    for index in np.ndindex(3, 4, 6):
        at = (index[0], index[1], index[2] * 4)
        row = wide[at[0], at[1], at[2] :]
        inside = at[0] != 1 and at[1] in (1, 2) and at[2] == 4
        status = emulator.lib.set_memory(ctypes.c_void_p(row.ctypes.data), 1, size, None)
        assert (status == 0) == inside, at
    assert wide.astype(bool).sum() == part.size


@pytest.mark.parametrize("bf16", (False, True), ids=("float16", "bfloat16"))
def test_16_bit_floats_round_as_numpy_does(bf16: bool, emulator: Emulator, rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    every = np.arange(65536, dtype=np.uint32) << 16
    bits = np.concatenate([bits, every, every | 0x8000, every + 0x7FFF, bits & 0xFFFFE000, bits & 0x8FFFF000])
    given = bits.view(np.float32)
    given = np.ascontiguousarray(given[~np.isnan(given)])
    to, back = np.zeros(len(given), np.uint32), np.zeros(65536, np.float32)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (given, to, back)]
    emulator.lib.convert_all(*pointers, ctypes.c_int64(len(given)), int(bf16))
    rounded = ptx_expected.round_to_bf16 if bf16 else ptx_expected.round_to_f16
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(to, rounded(given))
    numbers = np.arange(65536, dtype=np.uint16)
    if bf16:
        wide = (numbers.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = numbers.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(back, wide)


def test_without_a_compiler_kernels_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "CXX", "no-such-compiler")
    with pytest.raises(pytest.skip.Exception, match="the emulator needs no-such-compiler, not found on PATH"):
        emulated.library()


def test_kernels_that_do_not_compile_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by each of hundreds of tests."""
    asked: list[str] = []

    def fails(*args: object) -> None:
        asked.append("built")
        raise RuntimeError("attention.cu: error")

    monkeypatch.setattr(emulation, "missing", lambda: "")
    monkeypatch.setattr(emulation, "build", fails)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"attention\.cu: error"):
            emulated.library("race", ("-DSL_NO_SUCH_BUILD",))
    assert asked == ["built"]
