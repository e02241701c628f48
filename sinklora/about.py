"""What is installed and which path would run."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from . import _C, cuda, threads

# Shown where installed; only looked up, never imported.
_PACKAGES = ("numpy", "torch", "transformers", "peft", "accelerate")


class Info(dict[str, Any]):
    """A dict that prints as a table."""

    def __str__(self) -> str:
        width = max(len(name) for name in self)
        return "\n".join(f"{name:<{width}}  {_text(value)}" for name, value in self.items())


def info() -> Info:
    """Versions, the CPU and its instruction sets, threads, CUDA or why not, and the path of a call.

    Where CUDA was built in, this starts its driver: a process that forks afterwards cannot use CUDA in
    the child.

    Raises:
        ValueError: SINKLORA_CPU names an instruction set that is not available here; lists those that are.
    """
    from . import __version__

    level = _C.cpu_level()
    build = _C.build_info()
    num_threads = threads.get_num_threads()
    found = cuda.describe()
    return Info(
        sinklora=__version__,
        python=platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_model(),
        cpu_level=level,
        cpu_levels=_C.cpu_levels(),
        num_threads=num_threads,
        cuda=build["cuda"],
        cuda_build=found.built,
        cuda_driver=found.driver,
        gpus=found.devices,
        compiler=build["compiler"],
        path=f"C kernels on the CPU, {level}, {num_threads} thread{'s' if num_threads > 1 else ''}"
        + ("; CUDA kernels for tensors on a GPU" if cuda.runs() else ""),
    )


def _text(value: object) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def _version(package: str) -> str | None:
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The processor's name as the system tells it; platform.processor() is empty on many Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
