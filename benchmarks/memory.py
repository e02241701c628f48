"""Peak extra memory of one call: the resident high-water mark of a fresh process above what it had before.

usage: python memory.py CANDIDATE DTYPE H/Hkv/N/D/G DIRECTION THREADS    (prints the bytes)

The inputs, the incoming gradient included, are there before; the output, the gradients and all scratch count.
A small call first loads libraries, starts threads and compiles kernels. The process returns freed blocks to
the system at once (MALLOC_MMAP_THRESHOLD_), so that nothing left over can serve the call unseen. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MMAP_THRESHOLD = 64 * 1024
WARM_TOKENS = 512


def _resident_high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes by which resident memory rose at most during the call. OSError where the system cannot tell."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _resident_high_water()
    call()
    return _resident_high_water() - before


def run_alone(script: str, arguments: list[str], threads: int) -> str:
    """What a script prints, in a process of its own set up as this module's text says. OSError, RuntimeError:
    the reason why it could not."""
    if not sys.platform.startswith("linux"):
        raise OSError(f"peak memory is measured on Linux only, this is {sys.platform}")
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
        "MALLOC_TRIM_THRESHOLD_": str(MMAP_THRESHOLD),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"memory of {arguments[0]}: {lines[-1]}")
    return done.stdout


def measure(name: str, dtype: str, shape: str, direction: str, threads: int) -> int:
    """``peak_extra_bytes`` of a candidate in a process of its own. OSError, RuntimeError: the reason."""
    return int(run_alone(__file__, [name, dtype, shape, direction, str(threads)], threads))


def main(arguments: list[str]) -> None:
    name, dtype, shape, direction, threads = arguments
    import torch
    from shapes import Case, Inputs, candidate, make_call

    torch.set_num_threads(int(threads))
    case = Case.parse(dtype, shape)
    small = case.smaller(WARM_TOKENS)
    make_call(candidate(name, small).attention, Inputs.of(small), direction)()
    call = make_call(candidate(name, case).attention, Inputs.of(case), direction)
    print(peak_extra_bytes(call))


if __name__ == "__main__":
    main(sys.argv[1:])
