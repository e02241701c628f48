"""What this build can do on CUDA, and what is there to do it on. Imports neither torch nor a CUDA library."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from . import _C

Capability = tuple[int, int]

_BUILD = _C.build_info()

# Compute capabilities that there is binary code for, oldest first; of the last one there is PTX too.
ARCHS: tuple[Capability, ...] = tuple(
    (int(major), int(minor))
    for major, _, minor in (arch.partition(".") for arch in _BUILD["cuda_archs"].split())
)

# torch's device types that the operators compute on.
DEVICE_TYPES = ("cpu", "cuda") if _BUILD["cuda"] else ("cpu",)


class Found(NamedTuple):
    """What `describe` found, as it is printed."""

    built: str
    driver: str
    devices: tuple[str, ...]


def covers(capability: Capability) -> bool:
    """Does the code that was built run on devices of this compute capability?

    Binary code runs on its own major version from its minor on; PTX on whatever is not older.
    """
    major, minor = capability
    binary = any(arch[0] == major and arch[1] <= minor for arch in ARCHS)
    return binary or (bool(ARCHS) and ARCHS[-1] <= capability)


def computes_on() -> str:
    """The kinds of tensors that this build computes on, and why no other."""
    if _BUILD["cuda"]:
        return "CPU and CUDA tensors only"
    return f"CPU tensors only (built without CUDA: {_BUILD['cuda_absent']}; SINKLORA_CUDA=1 builds with it)"


def checks_values() -> bool:
    """Are values on a device checked too, at the price of waiting for it? SINKLORA_CHECK=1 says so."""
    return os.environ.get("SINKLORA_CHECK", "0") not in ("", "0")


def readable(tensor: Any) -> bool:
    """May the host read a torch tensor's values without waiting for a device or breaking a graph?"""
    import torch

    return bool(tensor.device.type == "cpu" and not torch.compiler.is_compiling())


def describe() -> Found:
    """What was built in and which devices are there; starts the driver where there is one."""
    if not _BUILD["cuda"]:
        return Found(f"not built in: {_BUILD['cuda_absent']}", "not looked for", ())
    archs = ", ".join(f"{major}.{minor}" for major, minor in ARCHS)
    state = _C.cuda_state()
    number = state["driver"]
    return Found(
        f"CUDA {_BUILD['cuda_toolkit']} for {archs} and later (PTX)",
        f"CUDA {number // 1000}.{number % 1000 // 10}" if number else "none",
        tuple(map(_device_text, state["devices"])) or (f"none: {state['problem']}",),
    )


def runs() -> bool:
    """Is there a device that this build computes on?"""
    return bool(_BUILD["cuda"]) and any(covers(capability) for _, capability in _C.cuda_state()["devices"])


def _device_text(device: tuple[str, Capability]) -> str:
    name, capability = device
    return f"{name} ({capability[0]}.{capability[1]}{'' if covers(capability) else ', not built for'})"


def takes(device: Any) -> bool:
    """Does this build compute on a torch device?"""
    if device.type != "cuda" or not _BUILD["cuda"]:
        return bool(device.type == "cpu")
    import torch

    if torch.compiler.is_compiling():  # asking would break the graph; a launch that cannot be says so
        return True
    index = device.index if device.index is not None else torch.cuda.current_device()
    known = _covered.get(index)
    if known is None:
        known = _covered[index] = covers(torch.cuda.get_device_capability(index))
    return known


_covered: dict[int, bool] = {}  # by torch's index of the device
