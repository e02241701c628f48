"""Rows of the heavy-hitter cache's benchmark, its bars, and both as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import machine
import report
from h2o_ways import EAGER, FORWARD, OURS, READS, SCORES, SDPA, STEP_RIVALS, Case

PROMPT, STEP, PREFILL, GENERATE = "prompt", "step", "model's prompt", "model's step"
DYNAMIC, FIFTH = "DynamicCache, sdpa", "H2O 20 %"
BAR_SHAPE = (8, 2, 4096, 128)
SCORED_STEPS = tuple(name for name in STEP_RIVALS if "alone" not in name and name != "published")
BARE_STEPS = tuple(name for name in STEP_RIVALS if "alone" in name)
MIB = 2**20


@dataclass
class Row:
    """One way of doing one thing. Empty strings: not measured, or does not apply.

    seconds: of one call; of a step, one step. over_ours: its time over ours'; for the model's sections, its
    time over the cache's with the smallest budget. gigabytes: of the entries that a step must read, a second;
    of the reads, what they read. extra_bytes: peak of resident memory above what was there before the call.
    cache_bytes: of the cache's storages once the prompt is in.
    """

    section: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    way: str
    seconds: float | str = ""
    first_quartile: float | str = ""
    third_quartile: float | str = ""
    samples: int | str = ""
    dropped: int | str = ""
    over_ours: float | str = ""
    gigabytes: float | str = ""
    read_share: float | str = ""
    extra_bytes: int | str = ""
    cache_bytes: int | str = ""
    note: str = ""

    @classmethod
    def of(cls, section: str, case: Case, way: str) -> Row:
        numbers = (case.num_heads, case.num_kv_heads, case.num_tokens, case.head_dim)
        return cls(section, case.dtype, *numbers, way)

    def label(self) -> str:
        heads = f"H{self.num_heads}/{self.num_kv_heads}"
        return f"{self.section} {self.dtype} {heads} N{self.num_tokens} D{self.head_dim}"


def add_ratios(rows: Sequence[Row], reference: str = OURS) -> None:
    """Fills over_ours, and of steps read_share: rows of one case."""
    times = {row.way: row.seconds for row in rows if not isinstance(row.seconds, str)}
    reads = [row.gigabytes for row in rows if row.way in READS and not isinstance(row.gigabytes, str)]
    for row in rows:
        if isinstance(row.seconds, str):
            continue
        if reference in times:
            row.over_ours = row.seconds / times[reference]
        if reads and not isinstance(row.gigabytes, str):
            row.read_share = row.gigabytes / max(reads)


@dataclass(frozen=True)
class Bar:
    """The fastest of `rivals` must take `least` times as long as `way`, for BAR_SHAPE."""

    what: str
    section: str
    dtype: str
    way: str
    rivals: tuple[str, ...]
    least: float
    only_without_amx: bool = False

    def ratio(self, rows: Sequence[Row]) -> float | None:
        times = {row.way: row.seconds for row in rows if not isinstance(row.seconds, str)}
        found = [times[name] for name in self.rivals if name in times]
        return min(found) / times[self.way] if found and self.way in times else None


BARS = (
    Bar("prompt with scores, over eager N x N", PROMPT, "bfloat16", OURS, (EAGER,), 6.0),
    Bar("prompt with scores, over eager N x N", PROMPT, "float32", OURS, (EAGER,), 3.5),
    # 0.8 times the forward's time or less.
    Bar("the score pass, over our causal forward", PROMPT, "bfloat16", SCORES, (FORWARD,), 1 / 0.8),
    Bar("the score pass, over our causal forward", PROMPT, "float32", SCORES, (FORWARD,), 1 / 0.8),
    Bar(
        "causal forward, over torch's SDPA", PROMPT, "bfloat16", FORWARD, (SDPA,), 1.5, only_without_amx=True
    ),
    Bar("causal forward, over torch's SDPA", PROMPT, "float32", FORWARD, (SDPA,), 1.0),
    Bar(
        "step with scores and eviction, over the fastest in torch", STEP, "bfloat16", OURS, SCORED_STEPS, 4.0
    ),
    Bar("step with scores and eviction, over SDPA alone", STEP, "float32", OURS, BARE_STEPS, 3.0),
)
READ_SHARE_BAR = 0.85
CACHE_SHARE_BAR = 0.22
# What a prompt with scores may hold beside its output: lse, scores and each thread's scratch, far below the
# 512 MiB that one N x N matrix of every head takes in float32.
PROMPT_SLACK = 24 * MIB


def at_bar_shape(rows: Iterable[Row], section: str, dtype: str) -> list[Row]:
    return [
        row
        for row in rows
        if (row.section, row.dtype) == (section, dtype)
        and (row.num_heads, row.num_kv_heads, row.num_tokens, row.head_dim) == BAR_SHAPE
    ]


def verdicts(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """(what, got, bar, pass or FAIL or not measured) of every bar but those that AMX lifts."""
    lines = []
    for bar in BARS:
        if bar.only_without_amx and machine.has_amx():
            continue
        got = bar.ratio(at_bar_shape(rows, bar.section, bar.dtype))
        what = f"{bar.what}, {bar.dtype}"
        lines.append(
            _verdict(what, got, "{:.2f}x", f">= {bar.least:.2f}x", got is not None and got >= bar.least)
        )
    for dtype in ("bfloat16", "float32"):
        ours = _ours(rows, PROMPT, dtype)
        extra = ours.extra_bytes if ours and not isinstance(ours.extra_bytes, str) else None
        size = 2 if dtype == "bfloat16" else 4
        bound = BAR_SHAPE[0] * BAR_SHAPE[2] * BAR_SHAPE[3] * size + PROMPT_SLACK
        got = None if extra is None else extra / MIB
        what = f"prompt with scores, extra memory with its output, {dtype}"
        lines.append(_verdict(what, got, "{:.1f} MiB", f"<= {bound / MIB:.1f} MiB", (extra or 0) <= bound))
    step = _ours(rows, STEP, "bfloat16")
    share = step.read_share if step and not isinstance(step.read_share, str) else None
    what = "step, share of the measured read bandwidth, bfloat16"
    lines.append(_verdict(what, share, "{:.0%}", f">= {READ_SHARE_BAR:.0%}", (share or 0) >= READ_SHARE_BAR))
    share = cache_share(rows)
    what = "cache's bytes at a 20 % budget, of DynamicCache's, bfloat16"
    lines.append(
        _verdict(what, share, "{:.1%}", f"<= {CACHE_SHARE_BAR:.0%}", (share or 1) <= CACHE_SHARE_BAR)
    )
    return lines


def _ours(rows: Sequence[Row], section: str, dtype: str) -> Row | None:
    return next((row for row in at_bar_shape(rows, section, dtype) if row.way == OURS), None)


def cache_share(rows: Sequence[Row]) -> float | None:
    here = at_bar_shape(rows, GENERATE, "bfloat16")
    found = {row.way: row.cache_bytes for row in here if row.cache_bytes != ""}
    whole, fifth = found.get(DYNAMIC), found.get(FIFTH)
    if whole is None or fifth is None:
        return None
    return int(fifth) / int(whole)


def _verdict(what: str, got: float | None, form: str, bar: str, passed: bool) -> tuple[str, str, str, str]:
    if got is None:
        return what, "-", bar, "not measured"
    return what, form.format(got), bar, "pass" if passed else "FAIL"


def verdict_table(rows: Sequence[Row]) -> report.Table:
    return report.Table(("what", "got", "bar", "verdict"), list(verdicts(rows)))


def figures(rows: Iterable[Row]) -> report.Table:
    head = (
        "case",
        "way",
        "ms",
        "quartiles",
        "/ ours",
        "GB/s",
        "of read",
        "extra MiB",
        "cache MiB",
        "n",
        "note",
    )
    table = report.Table(head)
    for row in rows:
        milliseconds = [report.number(x, "{:.4g}", 1e3) for x in (row.first_quartile, row.third_quartile)]
        table.lines.append(
            (
                row.label(),
                row.way,
                report.number(row.seconds, "{:.4g}", 1e3),
                "..".join(milliseconds) if row.seconds != "" else "-",
                report.number(row.over_ours, "{:.2f}"),
                report.number(row.gigabytes, "{:.1f}"),
                report.number(row.read_share, "{:.0%}"),
                report.number(row.extra_bytes, "{:.1f}", 1 / MIB),
                report.number(row.cache_bytes, "{:.2f}", 1 / MIB),
                f"{row.samples}" + (f" (-{row.dropped})" if row.dropped else ""),
                row.note,
            )
        )
    return table
