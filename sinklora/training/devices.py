"""What a training run asks of the machine: is there a GPU, how much memory was used, who writes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def has_gpu() -> bool:
    """Whether transformers' Trainer finds something else than the CPU to train on."""
    return torch.accelerator.is_available()


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: torch's on a CUDA device, else the process's own."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def on_main(work: Callable[[], Result]) -> Result:
    """Runs work in the main process; all processes get its result, or raise its error.

    The result, or the error, must be one that pickle takes.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return work()
    box: list[Any] = [None, None]
    if state.is_main_process:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The machine's first process goes through the block, then the others: what it makes, they find."""
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield
