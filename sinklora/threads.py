"""How many threads the CPU kernels use."""

from __future__ import annotations

import sys

from . import _C

# What set_num_threads chose; None is the default. Other modules read it at every call.
chosen: int | None = None


def set_num_threads(num_threads: int | None) -> None:
    """Sets the number of threads of every following call; None goes back to the default.

    The default is ``torch.get_num_threads()`` for torch tensors, and otherwise ``OMP_NUM_THREADS``, else the
    processors that this process may run on. Results do not depend on the number, not in one bit.

    Raises:
        ValueError: not from 1 to 1024. TypeError: not an integer.
    """
    global chosen  # noqa: PLW0603 - the setting is the process's, as torch's own is
    if num_threads is None:
        chosen = None
        return
    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__"):
        raise TypeError(f"num_threads: expected an integer, got {type(num_threads)!r}")
    number = num_threads.__index__()
    most = int(_C.build_info()["max_threads"])
    if not 1 <= number <= most:
        raise ValueError(f"num_threads: expected an integer from 1 to {most}, got {number}")
    chosen = number


def get_num_threads() -> int:
    """The number of threads that a call would use now: with torch tensors where torch is imported."""
    if chosen is not None:
        return chosen
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else _C.default_threads()
