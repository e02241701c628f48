"""CUDA tensors at the kernels' door, without a GPU: streams, devices, scratch memory, refusals.

The tensors are made up: their memory is the CPU's, which nobody touches, because without a driver every call
ends before a kernel starts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from exchange import Listening, make_library
from producers import Lying, Producer

from sinklora import _C, SFPattern

CUDA = 2
BUILD = _C.build_info()
with_cuda = pytest.mark.skipif(not BUILD["cuda"], reason="built without CUDA")
without_cuda = pytest.mark.skipif(BUILD["cuda"], reason="built with CUDA")
no_device = pytest.mark.skipif(bool(_C.cuda_state()["devices"]), reason="a GPU would be given made-up memory")

SETTINGS = (*SFPattern(3, 1).settings, 0.25, 1)
SHAPE = (1, 4, 7, 8)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def arguments(make: Any = Producer, **changed: Any) -> list[Any]:
    """query, key, value, output, lse on device cuda:0, made by make, but for those that are given."""
    arrays = {name: zeros(*SHAPE) for name in ("query", "key", "value", "output")}
    arrays["lse"] = zeros(*SHAPE[:3])
    return [changed.get(name) or make(array, device_type=CUDA) for name, array in arrays.items()]


def no_scratch(num_bytes: int) -> Any:
    pytest.fail(f"{num_bytes} bytes were asked for")


def scratch(num_bytes: int, **fields: Any) -> Any:
    return Producer(zeros(num_bytes, dtype=np.uint8), code=1, bits=8, **fields)


def run(tensors: list[Any], allocate: Any = no_scratch, cu_seqlens: Any = None) -> None:
    _C.attention_forward(*tensors, cu_seqlens, None, None, *SETTINGS, allocate)


@without_cuda
@pytest.mark.parametrize("way", ["capsule", "table"])
def test_a_build_without_cuda_refuses(way: str) -> None:
    make = Producer if way == "capsule" else make_library(5)[0]
    with pytest.raises(NotImplementedError, match=r"query: this build computes on CPU memory only, .*type 2"):
        run(arguments(make))


def test_the_stream_is_asked_for_once_on_the_first_array() -> None:
    tensor, asked = make_library(stream=5)
    tensors = arguments(tensor, query=tensor(zeros(*SHAPE), device_type=CUDA, device_id=1))
    with pytest.raises((NotImplementedError, ValueError)):  # without and with CUDA
        run(tensors)
    assert asked == [(CUDA, 1)]
    del asked[:]
    with pytest.raises((NotImplementedError, ValueError), match=r"^key: "):
        run([zeros(*SHAPE), *arguments(tensor)[1:]])
    assert asked == []


def test_a_library_that_cannot_name_its_stream() -> None:
    tensor, _ = make_library(fails=True)
    with pytest.raises(BufferError, match="query: its memory could not be exchanged"):
        run(arguments(tensor))


@with_cuda
@pytest.mark.parametrize(
    ("stream", "number"),
    [(0x1234560, 0x1234560), (0, 1), (None, 1)],  # CUDA's NULL stream is number 1 of the standard
)
def test_others_wait_for_the_first_ones_stream(stream: int | None, number: int) -> None:
    tensor, _ = make_library(stream)
    key = Listening(zeros(*SHAPE), device_type=CUDA)
    value = Listening(zeros(*SHAPE), device_type=CUDA, legacy=True)
    with pytest.raises(ValueError, match="lse: expected shape"):
        run(arguments(tensor, key=key, value=value, lse=tensor(zeros(2), device_type=CUDA)))
    assert key.streams == [number]
    assert value.streams == [number, number]  # older than DLPack 1.0: asked again, without max_version


@with_cuda
def test_capsules_alone_work_on_the_legacy_default_stream() -> None:
    tensors = [Listening(x.array, device_type=CUDA) for x in arguments()]
    tensors[4] = Listening(zeros(2), device_type=CUDA)
    with pytest.raises(ValueError, match="lse: expected shape"):
        run(tensors)
    assert [x.streams for x in tensors] == [[1]] * 5
    assert all(x.deleted == 1 for x in tensors)


@with_cuda
def test_another_device_is_not_waited_for_and_refused() -> None:
    key = Listening(zeros(*SHAPE), device_type=CUDA, device_id=1)
    with pytest.raises(ValueError, match=r"key: expected the query's device \(2:0\), got 2:1"):
        run(arguments(key=key))
    assert key.streams == [-1]
    assert key.deleted == 1
    with pytest.raises(ValueError, match=r"value: expected the query's device \(2:0\), got 1:0"):
        run([*arguments()[:2], zeros(*SHAPE), *arguments()[3:]])


def test_no_stream_is_named_for_cpu_memory() -> None:
    query = Listening(zeros(*SHAPE))
    run([query, *(x.array for x in arguments()[1:])])
    assert query.streams == [None]


@with_cuda
def test_a_capsule_of_another_device_than_it_said() -> None:
    query = Lying(zeros(*SHAPE), device_type=CUDA)
    with pytest.raises(BufferError, match=r"query: expected memory on DLPack device 1:0, .* got 2:0"):
        run(arguments(query=query))
    assert query.deleted == 1


@with_cuda
@pytest.mark.parametrize("device_type", [7, 10, 13])
def test_other_devices_are_refused(device_type: int) -> None:
    query = Producer(zeros(*SHAPE), device_type=device_type)
    message = f"query: this build computes on CPU and CUDA memory only, got DLPack device type {device_type}"
    with pytest.raises(NotImplementedError, match=message):
        run(arguments(query=query))
    assert query.capsule is None


@with_cuda
def test_scratch_memory_lies_on_the_arrays_device() -> None:
    wrong = {
        "1:0": lambda n: zeros(n, dtype=np.uint8),
        "2:1": lambda n: scratch(n, device_type=CUDA, device_id=1),
    }
    for device, allocate in wrong.items():
        message = f"allocate: expected scratch memory on the arrays' DLPack device 2:0, got {device}"
        with pytest.raises(ValueError, match=re.escape(message)):
            run(arguments(), allocate)
    with pytest.raises(ValueError, match=r"allocate: expected .* writable contiguous uint8"):
        run(arguments(), lambda n: scratch(n, device_type=CUDA, read_only=True))


@with_cuda
@no_device
def test_without_a_device_the_call_fails_and_the_next_works() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cuda\w+: expected no CUDA error, got .*driver"):
            run(arguments(), lambda n: scratch(n, device_type=CUDA))
        run([x.array for x in arguments()])


@with_cuda
def test_the_module_needs_no_cuda_library() -> None:
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    done = subprocess.run(["readelf", "-d", str(_C.__file__)], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*?)\]", done.stdout)
    assert needed
    assert not [name for name in needed if re.match(r"libcuda|libnv|libstdc", name)]


@with_cuda
@no_device
def test_without_a_device_info_says_so() -> None:
    state = _C.cuda_state()
    assert state["devices"] == ()
    assert state["problem"]


def test_values_on_a_device_are_left_alone() -> None:
    starts = np.array([3, 1], np.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected to start with 0, got 3"):
        _C.check_cu_seqlens(starts, 7)
    if BUILD["cuda"]:
        _C.check_cu_seqlens(Producer(starts, device_type=CUDA), 7)
        with pytest.raises(ValueError, match="lse: "):  # what comes after it
            cu_seqlens = Producer(starts, device_type=CUDA)
            run(arguments(lse=Producer(zeros(2), device_type=CUDA)), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 7], None),
        ([0, 3, 3, 7], None),
        ([1, 7], "expected to start with 0, got 1"),
        ([0, 5, 3, 7], "expected non-decreasing values, got 3 after 5 at 2"),
        ([0, 6], "expected to end with the number of tokens 7, got 6"),
        ([0], "at least 2 elements"),
    ],
)
def test_check_cu_seqlens(starts: list[int], message: str | None) -> None:
    array = np.array(starts, np.int32)
    if message is None:
        _C.check_cu_seqlens(array, 7)
    else:
        with pytest.raises(ValueError, match=f"cu_seqlens: .*{message}"):
            _C.check_cu_seqlens(array, 7)
    with pytest.raises(TypeError, match="cu_seqlens: expected dtype int32, got int64"):
        _C.check_cu_seqlens(array.astype(np.int64), 7)
