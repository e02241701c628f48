"""What is installed and which path would run."""

from __future__ import annotations

from typing import Any

from . import _C


def info() -> dict[str, Any]:
    return {"cpu_level": _C.cpu_level(), "cpu_levels": _C.cpu_levels(), "num_threads": _C.default_threads()}
