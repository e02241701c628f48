"""A made-up library with DLPack's C exchange table: tests decide what its tensors and its stream are."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from producers import DLTensor, Producer

_int = ctypes.c_int
_pointer = ctypes.c_void_p


class _Table(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1.3."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", _pointer),
        ("allocate", _pointer),
        ("managed_from_object", _pointer),
        ("managed_to_object", _pointer),
        ("tensor_from_object", _pointer),
        ("current_work_stream", _pointer),
    )


_FROM_OBJECT = ctypes.PYFUNCTYPE(_int, ctypes.py_object, ctypes.POINTER(DLTensor))
_STREAM = ctypes.PYFUNCTYPE(_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(_pointer))
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (_pointer, ctypes.c_char_p, _pointer)


def make_library(stream: int | None = None, *, fails: bool = False) -> tuple[type, list[tuple[int, int]]]:
    """A class of tensors, made as Producers are, and the devices whose stream somebody has asked for.

    stream is its current one, None for a table without that entry; with fails, asking for it is an error
    without an exception.
    """
    asked: list[tuple[int, int]] = []

    def from_object(tensor: Any, out: Any) -> int:
        ctypes.memmove(out, ctypes.addressof(tensor.managed.tensor), ctypes.sizeof(DLTensor))
        return 0

    def current_stream(device_type: int, device_id: int, out: Any) -> int:
        asked.append((device_type, device_id))
        out[0] = stream
        return -1 if fails else 0  # ctypes cannot leave an exception set

    functions = [_FROM_OBJECT(from_object), _STREAM(current_stream)]
    addresses = [ctypes.cast(function, _pointer).value for function in functions]
    table = _Table(major=1, minor=3, tensor_from_object=addresses[0])
    if stream is not None or fails:
        table.current_work_stream = addresses[1]

    class Tensor(Producer):
        # Kept as long as the class, which the extension keeps.
        _alive = (table, functions)
        __dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(table), b"dlpack_exchange_api", None)

        def __dlpack__(self, **options: Any) -> Any:
            raise AssertionError("the table was to be used")

    return Tensor, asked


class Listening(Producer):
    """Notes the stream that it was asked to synchronise with; None where none was named."""

    def __init__(self, array: np.ndarray, **fields: Any) -> None:
        super().__init__(array, **fields)
        self.streams: list[int | None] = []

    def __dlpack__(self, **options: Any) -> Any:
        self.streams.append(options.get("stream"))
        return super().__dlpack__(**options)
