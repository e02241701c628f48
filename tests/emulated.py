"""The CUDA kernels' own sources, compiled for the host and run on the emulator in tests/emulator.

``library()`` builds a shared library of csrc/core, csrc/cuda and the emulator; the functions below call its
operations on CPU tensors that are declared to be CUDA memory. A report of the emulator is a RuntimeError.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import emulation
import pytest
import torch
from emulation import BLANK, READ, ROOT, WRITE, Emulator
from torch import Tensor

from sinklora import SFPattern

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 7,
}
CUDA, CLASSES = 2, {1: ValueError, 2: TypeError, 3: NotImplementedError, 6: RuntimeError}


class TensorStruct(ctypes.Structure):
    """struct sl_tensor of csrc/core/tensor.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("n_dim", ctypes.c_int32),
        ("read_only", ctypes.c_bool),
        ("shape", ctypes.c_int64 * 8),
        ("stride", ctypes.c_int64 * 8),
    )


class PatternStruct(ctypes.Structure):
    _fields_ = (
        ("group_size", ctypes.c_int64),
        ("shift", ctypes.c_int64),
        ("n_sink", ctypes.c_int64),
        ("shifted_fraction", ctypes.c_double),
        ("causal", ctypes.c_bool),
    )


def _struct(*fields: str | tuple[str, Any]) -> type[ctypes.Structure]:
    """A C struct: texts name tensors."""
    flat: list[tuple[str, Any]] = []
    for field in fields:
        flat += [(name, TensorStruct) for name in field.split()] if isinstance(field, str) else [field]
    return type("Arguments", (ctypes.Structure,), {"_fields_": flat})


_SCALE = (("scale", ctypes.c_double), ("stream", ctypes.c_void_p))
_COUNTED = (("window", ctypes.c_int64), ("mean", ctypes.c_bool))
OPERATIONS: dict[str, Any] = {
    "attention_forward": _struct(
        "query key value output lse grad_output grad_query grad_key grad_value",
        "cu_seqlens padding_mask position_ids",
        ("n_past", ctypes.c_int64),
        ("pattern", PatternStruct),
        *_SCALE,
    ),
    "h2o_score": _struct("query key lse scores padding_mask", *_COUNTED, *_SCALE),
    "h2o_decode": _struct(
        "query key value output lse padding_mask scores",
        *_COUNTED,
        "new_key new_value new_mask positions free_slot rows",
        ("n_sink", ctypes.c_int64),
        *_SCALE,
    ),
    "h2o_select": _struct(
        "key value scores positions rows key_out value_out scores_out positions_out",
        ("n_sink", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    ),
}
OPERATIONS["attention_backward"] = OPERATIONS["attention_forward"]


# Tensors that an operation writes; of those in the second set it also reads what they held before.
WRITTEN: dict[str, tuple[set[str], set[str]]] = {
    "attention_forward": ({"output", "lse"}, set()),
    "attention_backward": ({"grad_query", "grad_key", "grad_value"}, set()),
    "h2o_score": ({"scores"}, set()),
    "h2o_decode": (
        {"output", "lse"},
        {"key", "value", "scores", "positions", "free_slot", "rows"},
    ),
    "h2o_select": ({"key_out", "value_out", "scores_out", "positions_out"}, {"rows"}),
}


def sources() -> list[str]:
    """Everything that the emulated library is made of, as paths in the tree."""
    found = [*(ROOT / "csrc/core").glob("*.c"), *(ROOT / "csrc/cuda").rglob("*.cu")]
    return [*(p.relative_to(ROOT).as_posix() for p in found), "tests/emulator/no_cpu.c"]


def library(build: str | None = None, defines: tuple[str, ...] = ()) -> Emulator:
    """Built and loaded once. Skips the test with the reason where no emulator can be built."""
    if reason := emulation.missing():
        pytest.skip(reason)
    made = _library(build, defines)
    if isinstance(made, RuntimeError):
        raise RuntimeError(*made.args)
    return made


@functools.cache
def _library(build: str | None, defines: tuple[str, ...]) -> Emulator | RuntimeError:
    """Kernels that do not compile are compiled once too, not by each of hundreds of tests."""
    try:
        return prepare(emulation.load(emulation.build(sources(), build, ("-DSL_WITH_CUDA", *defines))))
    except RuntimeError as error:
        return error


def prepare(emulator: Emulator) -> Emulator:
    for name in OPERATIONS:
        getattr(emulator.lib, f"sl_{name}_workspace").restype = ctypes.c_int64
    return emulator


def tensor_struct(tensor: Tensor | None) -> TensorStruct:
    if tensor is None:
        return TensorStruct()
    shape, stride = (ctypes.c_int64 * 8)(*tensor.shape), (ctypes.c_int64 * 8)(*tensor.stride())
    return TensorStruct(tensor.data_ptr(), DTYPES[tensor.dtype], CUDA, 0, tensor.dim(), False, shape, stride)


def access(name: str, argument: str) -> int:
    written, updated = WRITTEN[name]
    return READ | WRITE | BLANK if argument in written else READ | WRITE if argument in updated else READ


def call(name: str, *, emulator: Emulator | None = None, **arguments: Any) -> None:
    """Checks and runs one operation on the emulator; tensors by their names in the C struct. It may touch
    their elements and nothing between them, and write only what it is for."""
    emulator = emulator or library()
    given = {key: x for key, x in arguments.items() if x is not None}
    struct = OPERATIONS[name](
        **{key: tensor_struct(x) if isinstance(x, Tensor) else x for key, x in given.items()}
    )
    lib, error = emulator.lib, ctypes.create_string_buffer(400)
    emulator.clear()
    status = getattr(lib, f"sl_{name}_check")(ctypes.byref(struct), error)
    if status == 0:
        size = getattr(lib, f"sl_{name}_workspace")(ctypes.byref(struct), 1)
        workspace = torch.full((max(size, 1),), 0xFF, dtype=torch.uint8)
        seen: list[Tensor] = []
        for key, x in given.items():
            if isinstance(x, Tensor):
                item = x.element_size()
                strides = [stride * item for stride in x.stride()]
                again = any(x.data_ptr() == y.data_ptr() for y in seen)  # in place: what it holds is read
                may = access(name, key) & ~BLANK if again else access(name, key)
                emulator.allow_strided(x.data_ptr(), x.shape, strides, item, may)
                seen.append(x)
        emulator.allow(workspace.data_ptr(), size, READ | WRITE | BLANK)
        pointer = ctypes.c_void_p(workspace.data_ptr())
        status = getattr(lib, f"sl_{name}")(ctypes.byref(struct), pointer, ctypes.c_int64(size), 1, error)
    if status:
        raise CLASSES[status](emulator.report() or error.value.decode())


def pattern_struct(pattern: SFPattern) -> PatternStruct:
    return PatternStruct(*pattern.settings)


def empty_rows(like: Tensor) -> Tensor:
    """(B, H, N, D) in memory as (B, N, H, D), full of NaN."""
    batch, heads, tokens, dim = like.shape
    return torch.full((batch, tokens, heads, dim), torch.nan, dtype=like.dtype).transpose(1, 2)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pattern: SFPattern,
    *,
    scale: float | None = None,
    **sequences: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Output (None without value) and lse. More keys than queries: the first ones are past tokens."""
    output = None if value is None else empty_rows(query)
    lse = torch.full(query.shape[:3], torch.nan)
    call(
        "attention_forward",
        query=query,
        key=key,
        value=value,
        output=output,
        lse=lse,
        n_past=key.shape[2] - query.shape[2],
        pattern=pattern_struct(pattern),
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        **sequences,
    )
    return output, lse


def score(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    window: int = 0,
    mean: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Column sums of the causal attention whose lse is given, (B, Hkv, N)."""
    scores = torch.full(key.shape[:3], torch.nan)
    call(
        "h2o_score",
        query=query,
        key=key,
        lse=lse,
        scores=scores,
        padding_mask=mask,
        window=window,
        mean=mean,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
    )
    return scores


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scores: Tensor | None = None,
    window: int = 0,
    mean: bool = False,
    scale: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """Output and lse; scores are added to."""
    output, lse = empty_rows(query), torch.full(query.shape[:3], torch.nan)
    call(
        "h2o_decode",
        **{"query": query, "key": key, "value": value, "output": output, "lse": lse},
        **{"padding_mask": mask, "scores": scores, "window": window, "mean": mean, "scale": scale},
    )
    return output, lse


def step(
    cache: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    *,
    new_mask: Tensor | None = None,
    num_sinks: int = 0,
    mean: bool = False,
    scale: float = 0.25,
    output: Tensor | None = None,
) -> Tensor:
    """One step of a cache (key, value, scores, positions, free_slot, rows): its output."""
    output = empty_rows(query) if output is None else output
    names = ("key", "value", "scores", "positions", "free_slot", "rows")
    call(
        "h2o_decode",
        **{
            "query": query,
            "output": output,
            "new_key": new_key,
            "new_value": new_value,
            "new_mask": new_mask,
        },
        **{"n_sink": num_sinks, "mean": mean, "scale": scale},
        **dict(zip(names, cache, strict=True)),
    )
    return output


def seed(number: int) -> None:
    """The order in which the emulator runs blocks, warps and lanes."""
    library().seed(number)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SFPattern,
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    gradients: Sequence[Tensor] | None = None,
    processors: int = 4,
    **sequences: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value. On a device of few processors a block owns a group, where that
    is possible."""
    gradients = tuple(gradients or (empty_rows(x) for x in (query, key, value)))
    emulator = library()
    emulator.device(processors)
    try:
        call(
            "attention_backward",
            query=query,
            key=key,
            value=value,
            output=output,
            lse=lse,
            grad_output=grad,
            grad_query=gradients[0],
            grad_key=gradients[1],
            grad_value=gradients[2],
            pattern=pattern_struct(pattern),
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            **sequences,
        )
    finally:
        emulator.device()
    return gradients


def select(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], num_sinks: int = 0) -> None:
    """inputs: key, value, scores, positions, rows; outputs: the first four, which may be the inputs."""
    names = ("key", "value", "scores", "positions")
    call(
        "h2o_select",
        **dict(zip((*names, "rows"), inputs, strict=True)),
        **{f"{name}_out": x for name, x in zip(names, outputs, strict=True)},
        n_sink=num_sinks,
    )
