"""Interleaved timing: candidates take turns in one process, so that a slow minute hits them all."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# A sample counts as disturbed when other processes used more of the processors than this share of its time.
# The kernel counts in ticks, so below two ticks nothing can be said.
DISTURBED_SHARE = 0.04
DISTURBED_TICKS = 2
# The note of a row whose timings are not to be trusted.
BUSY = "other processes were busy"


@dataclass(frozen=True)
class Timing:
    """Seconds of the samples kept, and how many were dropped because other processes were busy meanwhile.

    ``quiet`` is False where fewer than half the samples were quiet: then all of them are in ``seconds``.
    """

    seconds: tuple[float, ...]
    dropped: int = 0
    quiet: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; the extremes where there are fewer than four samples."""
        if len(self.seconds) < 4:
            return min(self.seconds), max(self.seconds)
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def others_cpu_seconds() -> float | None:
    """Processor seconds of other processes since boot; None where the system does not say (/proc/stat)."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields)
    mine = os.times()
    all_busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return all_busy - mine.user - mine.system


def sample(call: Callable[[], object]) -> tuple[float, bool]:
    """Runs the call once: seconds, and whether other processes disturbed it."""
    before = others_cpu_seconds()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    after = others_cpu_seconds()
    if before is None or after is None:
        return seconds, False
    least = DISTURBED_TICKS / os.sysconf("SC_CLK_TCK") + 1e-3
    return seconds, after - before > max(least, DISTURBED_SHARE * seconds)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    drop_disturbed: bool = True,
    max_retries: int = 3,
) -> dict[str, Timing]:
    """Times the calls in turn until each has ``rounds`` samples.

    Each round begins with another candidate, so that none always runs after the same neighbour. With
    ``drop_disturbed`` a sample during which other processes were busy is taken again in a later round, for at
    most ``max_retries * rounds`` more rounds. If then any candidate has fewer than half its samples, all of
    them keep all theirs: quiet samples of one against disturbed ones of another would compare the machine's
    moods.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    names = list(calls)
    busy = 0
    kept: dict[str, list[float]] = {name: [] for name in names}
    disturbed: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds * (1 + max_retries)):
        waiting = [name for name in names if len(kept[name]) < rounds]
        if not waiting:
            break
        first = turn % len(waiting)
        for name in waiting[first:] + waiting[:first]:
            seconds, was_disturbed = sample(calls[name])
            busy += was_disturbed
            (disturbed if was_disturbed and drop_disturbed else kept)[name].append(seconds)
    if not drop_disturbed:
        mostly_quiet = 2 * busy <= rounds * len(names)
        return {name: Timing(tuple(kept[name]), 0, mostly_quiet) for name in names}
    if any(2 * len(kept[name]) < rounds for name in names):
        return {name: Timing(tuple(kept[name] + disturbed[name]), 0, quiet=False) for name in names}
    return {name: Timing(tuple(kept[name]), len(disturbed[name])) for name in names}
