"""Timing on a CUDA device: events, cold and warm L2, interleaved; and what the device is.

A sample is one call between two events. Before it the stream sleeps, so that the host is ahead and its own
time does not count; "cold" calls find a buffer several times L2's size in L2, "warm" ones run right after the
same call. Candidates take turns, each round begins with another one, as in timing.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import machine
import timing
import torch

COLD, WARM = "cold", "warm"
CACHES = (COLD, WARM)
# About two milliseconds: longer than the host takes to enqueue a rival's copies and its backward.
SLEEP_CYCLES = 4_000_000
FLUSH_SHARE = 4
# What takes this many seconds in all its samples is sampled less often, but at least so often.
MOST_SECONDS, LEAST_SAMPLES = 2.0, 10
# Column -> what nvidia-smi calls it.
SMI = {
    "gpu": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "celsius": "temperature.gpu",
    "throttled": "clocks_event_reasons.active",
}


def refusal() -> str:
    """Why nothing can be timed on a device here; empty where it can."""
    from sinklora import _C

    if not torch.cuda.is_available():
        return f"--device cuda: torch {torch.__version__} sees no CUDA device"
    if not _C.build_info()["cuda"]:
        return "--device cuda: this sinklora was built without CUDA (SINKLORA_CUDA=1 builds it in)"
    return ""


@dataclass(frozen=True)
class Call:
    """run(state) is timed, state = prepare() is not: a backward needs its own forward each time."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> object:
        return self.run(self.prepare())


class Timer(Protocol):
    def sample(self, call: Call, cache: str) -> float:
        """Seconds of one run of the call."""
        ...


class EventTimer:
    """Owns the buffer that takes L2's place; of the current device and stream."""

    def __init__(self) -> None:
        size = FLUSH_SHARE * torch.cuda.get_device_properties().L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, call: Call, cache: str) -> float:
        if cache == WARM:
            call()
        state = call.prepare()
        if cache == COLD:
            self.buffer.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        self.start.record()
        result = call.run(state)
        self.end.record()
        self.end.synchronize()
        del result, state
        return float(self.start.elapsed_time(self.end)) / 1e3


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    *,
    rounds: int,
    warmup: int = 3,
    caches: Sequence[str] = CACHES,
) -> dict[tuple[str, str], timing.Timing]:
    """(name, one of caches) -> samples. Slow calls get fewer, as MOST_SECONDS says."""
    wanted: dict[str, int] = {}
    for name, call in calls.items():
        seconds = min(timer.sample(call, WARM) for _ in range(max(1, warmup)))
        least = min(rounds, LEAST_SAMPLES)
        wanted[name] = max(least, min(rounds, int(MOST_SECONDS / max(seconds, 1e-9))))
    found: dict[tuple[str, str], list[float]] = {(name, cache): [] for name in calls for cache in caches}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn < wanted[name]:
                for cache in caches:
                    found[name, cache].append(timer.sample(calls[name], cache))
    return {key: timing.Timing(tuple(seconds)) for key, seconds in found.items()}


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of the call: what the host takes to launch small kernels does not count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    # The graph writes into what the capture made, so that must live as long.
    return lambda: (graph.replay(), kept)[0]


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Device memory by which the allocator's peak rose during one call; its output counts."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def smi() -> dict[str, str]:
    """Columns of SMI for the current device; empty where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(SMI, "")
    lines = done.stdout.strip().splitlines()
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return parse_smi(lines[index] if index < len(lines) else "")


def parse_smi(line: str) -> dict[str, str]:
    cells = [cell.strip() for cell in line.split(",")]
    cells += [""] * (len(SMI) - len(cells))
    return dict(zip(SMI, cells, strict=False))


def describe(load: Callable[[], object] | None = None) -> dict[str, str]:
    """The columns of every row. Clocks are read while ``load`` runs again and again, if it is given."""
    if load is not None:
        for _ in range(200):
            load()
    clocks = smi()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        clocks["gpu"] = clocks["gpu"] or torch.cuda.get_device_name()
    versions = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return clocks | versions | machine.describe(torch.get_num_threads())
