"""DLPack producers made by hand with ctypes: a test decides every field and counts the deleter's calls."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

CODES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "int32": (0, 32), "bool": (6, 8)}


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype = ctypes.c_char_p
_get_name.argtypes = (ctypes.py_object,)


class Producer:
    """Offers an array's memory; keywords replace fields of the DLTensor, ``deleted`` counts deleter calls."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        legacy: bool = False,
        major: int = 1,
        read_only: bool = False,
        compact: bool = False,
        **fields: Any,
    ) -> None:
        self.array = array
        self.legacy = legacy
        self.deleted = 0
        self.capsule: Any = None
        self.dtype = array.dtype
        rank = array.ndim
        self._shape = (ctypes.c_int64 * max(rank, 1))(*array.shape)
        self._strides = (ctypes.c_int64 * max(rank, 1))(*(s // array.itemsize for s in array.strides))
        self._deleter = _DELETER(self._count)
        code, bits = CODES.get(array.dtype.name, (2, 64))
        tensor = DLTensor(
            data=array.ctypes.data,
            device_type=1,
            device_id=0,
            ndim=rank,
            code=code,
            bits=bits,
            lanes=1,
            shape=ctypes.addressof(self._shape),
            strides=None if compact else ctypes.addressof(self._strides),
            byte_offset=0,
        )
        for name, value in fields.items():
            setattr(tensor, name, value)
        self.device = (tensor.device_type, tensor.device_id)
        deleter = ctypes.cast(self._deleter, ctypes.c_void_p).value
        self.managed: Any = (
            Legacy(tensor=tensor, deleter=deleter)
            if legacy
            else Versioned(major=major, minor=0, deleter=deleter, flags=int(read_only), tensor=tensor)
        )

    def _count(self, _managed: int) -> None:
        self.deleted += 1

    @property
    def capsule_name(self) -> str:
        return _get_name(self.capsule).decode()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        if self.legacy and "max_version" in options:
            raise TypeError("this producer is older than max_version")
        name = b"dltensor" if self.legacy else b"dltensor_versioned"
        # No destructor: a capsule that nobody opened would show as a missing call of the deleter.
        self.capsule = _new_capsule(ctypes.addressof(self.managed), name, None)
        return self.capsule


class Failing(Producer):
    def __init__(self, array: np.ndarray, error: BaseException | None) -> None:
        super().__init__(array)
        self.error = error

    def __dlpack__(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return "no capsule"


class Lying(Producer):
    """Says CPU, and hands out another device's memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class Twice(Producer):
    """Hands out a capsule that somebody else has opened already."""

    def __dlpack__(self, **options: Any) -> Any:
        super().__dlpack__()
        torch.from_dlpack(Once(self.capsule))
        return self.capsule


class Once:
    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule
