"""Tests on a CUDA device: whether there is one, and moving a call's inputs there and its results back."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import Result, kernel
from cases import Case
from torch import Tensor

from sinklora import _C


def missing() -> str:
    """Why nothing can run on a device here; empty where it can."""
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} sees none"
    if not _C.build_info()["cuda"]:
        return "a CUDA device, but this sinklora was built without CUDA (SINKLORA_CUDA=1 builds it in)"
    return ""


def moved(thing: Any, device: torch.device | str) -> Any:
    """Tensors, and those in dicts, lists, tuples and named tuples, on a device; the rest as it is."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, dict):
        return {name: moved(item, device) for name, item in thing.items()}
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(moved(item, device) for item in thing))
    if isinstance(thing, list | tuple):
        return type(thing)(moved(item, device) for item in thing)
    return thing


def run(shape: Case, inputs: Any, device: torch.device, **options: Any) -> Result:
    """Forward and backward of inputs that lie on the CPU, computed on the device; the results on the CPU."""
    query, key, value, grad = moved(inputs, device)
    result = kernel(query, key, value, shape.pattern, grad, **moved({**shape.options, **options}, device))
    assert all(x.device.type == device.type for x in result)
    return Result(*moved(tuple(result), "cpu"))


def bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


class Repeats:
    """Counts results that differ from the first in any bit, without waiting for the device."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []
        self.differing: Any = 0

    def add(self, *tensors: Tensor) -> None:
        if not self.first:
            self.first = [bits(x).clone() for x in tensors]
            return
        for x, want in zip(tensors, self.first, strict=True):
            self.differing = self.differing + (bits(x) != want).any().int()

    def count(self) -> int:
        return int(self.differing)
