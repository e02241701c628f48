"""Borrowing: every way in gives the same bits and owns nothing afterwards; what it refuses, and how."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from producers import Failing, Lying, Producer, Twice

from sinklora import _C, SFPattern

SETTINGS = (*SFPattern(3, 1).settings, 0.25, 1)
SHAPE = (1, 4, 7, 8)


def scratch(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, np.uint8)


def run(
    query: Any, key: Any, value: Any, output: Any, lse: Any, allocate: Any = scratch, settings: Any = SETTINGS
) -> None:
    _C.attention_forward(query, key, value, output, lse, None, None, None, *settings, allocate)


def arrays(rng: np.random.Generator, dtype: Any = np.float32) -> list[np.ndarray]:
    return [rng.standard_normal(SHAPE).astype(dtype) for _ in range(3)]


def outputs(dtype: Any = np.float32) -> list[np.ndarray]:
    return [np.full(SHAPE, 7, dtype), np.full(SHAPE[:3], 7, np.float32)]


def expected(inputs: list[np.ndarray]) -> np.ndarray:
    output, lse = outputs(inputs[0].dtype)
    run(*inputs, output, lse)
    return output


WAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "torch": torch.from_numpy,
    "parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x)),
    "versioned": Producer,
    "legacy": lambda x: Producer(x, legacy=True),
    "compact": lambda x: Producer(x, compact=True),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_gives_the_same_bits(rng: np.random.Generator, way: str, dtype: Any) -> None:
    inputs = arrays(rng, dtype)
    output, lse = outputs(dtype)
    run(*(WAYS[way](x) for x in inputs), output, lse)
    assert (output == expected(inputs)).all()


def test_torch_outputs_are_written_in_place(rng: np.random.Generator) -> None:
    inputs = arrays(rng)
    output, lse = (torch.from_numpy(x) for x in outputs())
    pointer = output.data_ptr()
    run(*(torch.from_numpy(x) for x in inputs), output, lse)
    assert output.data_ptr() == pointer
    assert (output.numpy() == expected(inputs)).all()


def test_strided_and_reversed_inputs(rng: np.random.Generator) -> None:
    base = rng.standard_normal((1, 7, 3, 4, 16)).astype(np.float32)  # as a fused projection has them
    inputs = [base[:, :, i, :, 4:12].transpose(0, 2, 1, 3) for i in range(3)]
    inputs[1] = inputs[1][:, ::-1, ::-1]
    output, lse = outputs()
    run(*inputs, output, lse)
    assert (output == expected([np.ascontiguousarray(x) for x in inputs])).all()


def test_byte_offset_is_added(rng: np.random.Generator) -> None:
    inputs = arrays(rng)
    room = np.zeros(inputs[0].size + 5, np.float32)
    room[5:] = inputs[0].ravel()
    query = Producer(inputs[0], data=room.ctypes.data, byte_offset=20)
    output, lse = outputs()
    run(query, inputs[1], inputs[2], output, lse)
    assert (output == expected(inputs)).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_deleter_runs_once_after_the_call(rng: np.random.Generator, legacy: bool) -> None:
    inputs = arrays(rng)
    query = Producer(inputs[0], legacy=legacy)
    seen = []

    def allocate(num_bytes: int) -> np.ndarray:
        seen.append(query.deleted)  # still borrowed here
        return np.empty(num_bytes, np.uint8)

    run(query, inputs[1], inputs[2], *outputs(), allocate)
    assert query.deleted == 1
    assert set(seen) <= {0}
    assert query.capsule_name == ("used_dltensor" if legacy else "used_dltensor_versioned")


@pytest.mark.parametrize("legacy", [False, True])
def test_the_deleter_runs_once_after_a_failure(rng: np.random.Generator, legacy: bool) -> None:
    inputs = arrays(rng)
    query = Producer(inputs[0], legacy=legacy)
    with pytest.raises(TypeError, match="key"):
        run(query, "no array", inputs[2], *outputs())
    assert query.deleted == 1
    broken = Producer(inputs[0], legacy=legacy, lanes=2)
    with pytest.raises(TypeError, match=r"query: .*DLPack type code 2"):
        run(broken, *inputs[1:], *outputs())
    assert broken.deleted == 1


REFUSED: dict[str, tuple[Callable[[np.ndarray], Any], type[Exception], str]] = {
    "list": (lambda x: x.tolist(), TypeError, "query: expected a torch tensor, .* got <class 'list'>"),
    "none": (lambda x: None, TypeError, "query: expected an array, got None"),
    "bytes": (lambda x: x.tobytes(), TypeError, "query: expected"),
    "object": (lambda x: x.astype(object), TypeError, "query: .*object"),
    "structured": (lambda x: x.view([("a", "f4")]), TypeError, "query: "),
    "complex": (lambda x: torch.from_numpy(x).to(torch.complex64), TypeError, "query: .*code 5 of 64"),
    "byte-swapped": (lambda x: x.astype(">f4"), BufferError, "query: expected native byte order, got >f4"),
    "odd strides": (
        lambda x: np.zeros(SHAPE, [("a", "f4"), ("b", "i1")])["a"],
        BufferError,
        "query: expected strides in whole elements of 4 bytes",
    ),
    "misaligned": (
        lambda x: np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(SHAPE),
        BufferError,
        "query: expected memory aligned",
    ),
    "rank 0": (lambda x: np.array(1, np.float32), ValueError, "query: expected 1 to 8 dimensions, got 0"),
    "rank 9": (lambda x: x.reshape((1,) * 5 + SHAPE), ValueError, "query: expected 1 to 8 dimensions, got 9"),
    "torch rank 0": (lambda x: torch.tensor(1.0), ValueError, "query: expected 1 to 8 dimensions, got 0"),
    "negative size": (lambda x: Producer(x, shape=_negative()), BufferError, "query: expected sizes >= 0"),
    "null": (lambda x: Producer(x, data=0), BufferError, "query: expected memory, got a NULL pointer"),
    "null, offset": (lambda x: Producer(x, data=0, byte_offset=64), BufferError, "NULL pointer"),
    "version 2": (lambda x: Producer(x, major=2), BufferError, "query: expected DLPack version 1, got 2"),
    "vulkan": (lambda x: Producer(x, device_type=7), NotImplementedError, "query: .*device type 7"),
    "lying": (lambda x: Lying(x, device_type=7), BufferError, "query: .*device 1:0, .* got 7:0"),
    "used capsule": (
        lambda x: Twice(x, legacy=False),
        BufferError,
        "query: expected an unused DLPack capsule",
    ),
    "failing": (lambda x: Failing(x, RuntimeError("gone")), BufferError, "query: .*exchanged: gone"),
    "no capsule": (lambda x: Failing(x, None), BufferError, "query: expected an unused DLPack capsule"),
}


_NEGATIVE = np.array([1, 4, -7, 8], np.int64)


def _negative() -> int:
    return _NEGATIVE.ctypes.data


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_outputs_untouched(rng: np.random.Generator, name: str) -> None:
    make, error, message = REFUSED[name]
    inputs = arrays(rng)
    query = make(inputs[0])
    output, lse = outputs()
    with pytest.raises(error, match=message):
        run(query, inputs[1], inputs[2], output, lse)
    assert (output == 7).all()
    assert (lse == 7).all()
    if isinstance(query, Producer) and query.capsule is not None:
        assert query.deleted == 1


def test_the_producers_own_error_is_the_cause(rng: np.random.Generator) -> None:
    inputs = arrays(rng)
    with pytest.raises(BufferError) as caught:
        run(Failing(inputs[0], RuntimeError("gone")), *inputs[1:], *outputs())
    assert isinstance(caught.value.__cause__, RuntimeError)
    for error in (KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)):
            run(Failing(inputs[0], error), *inputs[1:], *outputs())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: np.broadcast_to(x, SHAPE),
        lambda x: Producer(x, read_only=True),
        lambda x: Producer(x, legacy=True),  # a legacy capsule cannot say that it may be written to
    ],
    ids=["numpy", "versioned", "legacy"],
)
def test_read_only_memory_is_read_but_not_written(rng: np.random.Generator, make: Any) -> None:
    inputs = arrays(rng)
    output, lse = outputs()
    run(*(make(x) for x in inputs), output, lse)
    assert (output == expected(inputs)).all()
    with pytest.raises(BufferError, match="output: expected writable memory"):
        run(*inputs, make(output), lse)
    assert (output == expected(inputs)).all()


def test_empty_memory_may_be_null() -> None:
    empty = np.zeros((1, 4, 0, 8), np.float32)
    run(Producer(empty, data=0), empty, empty, empty.copy(), np.zeros((1, 4, 0), np.float32))


def test_a_type_with_a_foreign_exchange_table_uses_its_capsules(rng: np.random.Generator) -> None:
    """An unknown major version of the table, or another object under its name, is not called."""

    class Foreign(Producer):
        __dlpack_c_exchange_api__ = 5

    inputs = arrays(rng)
    output, lse = outputs()
    query = Foreign(inputs[0])
    run(query, *inputs[1:], output, lse)
    assert query.deleted == 1
    assert (output == expected(inputs)).all()


@pytest.mark.parametrize("size", [0, 16])
def test_refuses_short_scratch_memory(rng: np.random.Generator, size: int) -> None:
    shape = (1, 8, 512, 128)  # large enough to need more than the binding keeps on its stack
    query = rng.standard_normal(shape).astype(np.float32)
    settings = (*SFPattern(512).settings, 0.25, 1)
    output, lse = np.full(shape, 7, np.float32), np.full(shape[:3], 7, np.float32)
    wrong: list[Any] = [np.empty(size, np.uint8), np.empty(2**24, np.int8), np.empty((2, 2**24), np.uint8), 3]
    for memory in wrong:
        with pytest.raises((ValueError, TypeError), match="allocate: "):
            run(query, query, query, output, lse, lambda _, memory=memory: memory, settings)
    with pytest.raises(ZeroDivisionError):
        run(query, query, query, output, lse, lambda n: n // 0, settings)
    assert (output == 7).all()


def _rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("way", ["numpy", "torch", "versioned", "legacy"])
def test_no_leak_with_or_without_errors(rng: np.random.Generator, way: str) -> None:
    make = WAYS.get(way, lambda x: x)
    inputs = [make(x) for x in arrays(rng)]
    output, lse = outputs()

    def calls(n: int) -> None:
        for _ in range(n):
            run(*inputs, output, lse)
            with pytest.raises(ValueError, match="lse"):
                run(*inputs, output, lse[:, :, :3])
            with pytest.raises(TypeError, match="value"):
                run(inputs[0], inputs[1], [], output, lse)

    calls(300)
    counts = [sys.getrefcount(x) for x in (*inputs, output, lse)]
    bytes_before, blocks = _rss(), sys.getallocatedblocks()
    calls(1500)
    assert [sys.getrefcount(x) for x in (*inputs, output, lse)] == counts
    assert _rss() - bytes_before < 2 << 20  # collects first
    assert sys.getallocatedblocks() - blocks < 500


def test_the_gil_is_released_around_compute(rng: np.random.Generator) -> None:
    shape = (1, 4, 6000, 64)
    query = rng.standard_normal(shape).astype(np.float32)
    settings = (*SFPattern(6000, 0).settings, 0.1, 1)
    output, lse = np.empty(shape, np.float32), np.empty(shape[:3], np.float32)
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        run(query, query, query, output, lse, scratch, settings)
        span.append(time.perf_counter())

    thread = threading.Thread(target=work)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0)
    thread.join()
    inside = [t for t in ticks if span[0] < t < span[1]]
    longest = max(np.diff([span[0], *inside, span[1]]))
    assert longest < 0.7 * (span[1] - span[0]), f"{len(inside)} ticks, longest gap {longest:.3f} s of {span}"
