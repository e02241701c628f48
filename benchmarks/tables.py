"""The tables of figures, made from the newest results: no figure is typed by hand.

usage: python benchmarks/tables.py            prints all
       python benchmarks/tables.py --write    puts them between the markers of the pages named below
       python benchmarks/tables.py --check    exit status 1 where one of them holds others

README.md has room for the main ones, benchmarks/RESULTS.md has all, a guide those of training.

The newest CSV of each kind counts, by the date in its rows.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import tables_extension
import tables_h2o
import tables_memory
import timing

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
GUIDE = ROOT / "notebooks" / "guides" / "memory_and_time.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
OURS = "sinklora"
DTYPES = ("float32", "bfloat16", "float16")
# A README has room for some of the cases; the CSV has the others.
SHOWN_DTYPES, SHOWN_HEAD_DIM, SHOWN_KV_HEADS = ("float32", "bfloat16"), "128", "2"
# The columns that make two rows the same case.
CASE = (
    "section",
    "direction",
    "dtype",
    "num_heads",
    "num_kv_heads",
    "num_tokens",
    "head_dim",
    "group_size",
)

Rows = list[dict[str, str]]


def newest(results: Path, column: str) -> Rows:
    """The rows of the newest CSV that has this column; none where there is no such file."""
    found: list[tuple[str, str, Rows]] = []
    for path in results.glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and column in rows[0]:
            found.append((rows[0]["date"], path.name, rows))
    return max(found)[2] if found else []


def measured_on(rows: Rows) -> str:
    """One line on machine, versions and commit, from the first row."""
    row = rows[0]
    dirty = " with local changes" if row["dirty"] == "true" else ""
    busy = sum(timing.BUSY in row.get("note", "") for row in rows)
    noise = f"; {busy} of {len(rows)} rows while other processes were busy" if busy else ""
    return (
        f"{row['cpu']}, {row['threads']} threads, kernels {row['cpu_level']}, torch {row['torch']}, "
        f"commit {row['commit']}{dirty}, {row['date'][:10]}{noise}"
    )


def _milliseconds(text: str) -> str:
    return f"{float(text) * 1e3:.0f}" if text else "-"


def _times(text: str) -> str:
    return f"{float(text):.2f}x" if text else "-"


def _mebibytes(text: str) -> str:
    return f"{int(text) / 2**20:.0f}" if text else "-"


def _least_s2(rows: Rows, ours: dict[str, str], column: str) -> str:
    """The S2 form with the least time on ours' case: its value in a column, or nothing."""
    same = [row for row in rows if all(row[name] == ours[name] for name in CASE)]
    forms = [row for row in same if row["candidate"].startswith("s2_") and row["seconds"]]
    return min(forms, key=lambda row: float(row["seconds"]))[column] if forms else ""


def attention_table(rows: Rows) -> list[str]:
    """Ours on the cases shown: time, rate, share of the machine's GEMM rate, against the rivals, memory."""
    lines = [
        "| pass | dtype | heads | N | D | group | ms | GFLOP/s | of torch.mm | vs S2 form |"
        " vs full attention | extra MiB (S2 form's) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = (
            row["dtype"] in SHOWN_DTYPES
            and row["head_dim"] == SHOWN_HEAD_DIM
            and row["num_kv_heads"] == SHOWN_KV_HEADS
        )
        if row["candidate"] != OURS or row["section"] == "tiny" or not row["seconds"] or not shown:
            continue
        share = f"{float(row['gflops']) / float(row['gemm_gflops']):.0%}"
        extra = "-"
        if row["extra_bytes"]:
            extra = f"{_mebibytes(row['extra_bytes'])} ({_mebibytes(_least_s2(rows, row, 'extra_bytes'))})"
        cells = (
            row["direction"],
            row["dtype"],
            f"{row['num_heads']}/{row['num_kv_heads']}",
            row["num_tokens"],
            row["head_dim"],
            row["group_size"],
            _milliseconds(row["seconds"]),
            f"{float(row['gflops']):.0f}",
            share,
            _times(row["over_s2"]),
            _times(row["over_dense"]),
            extra,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tiny_line(rows: Rows) -> list[str]:
    tiny = [row for row in rows if row["section"] == "tiny" and row["candidate"] == OURS]
    parts = []
    for row in tiny:
        speed = f"{_times(row['over_dense'])} the speed of SDPA's call"
        parts.append(f"{row['dtype']} {float(row['seconds']) * 1e6:.1f} µs ({speed})")
    return [f"A tiny call (N=16, H=4, D=64, no gradient): {', '.join(parts)}."] if parts else []


def step_table(rows: Rows) -> list[str]:
    """One optimiser step: ours in tokens per second, and how many times as long the others take."""
    lines = [
        "| one training step | tokens | group | sinklora, tokens/s | S2 form takes | full attention takes |",
        "|---|---|---|---|---|---|",
    ]
    keys = sorted({(DTYPES.index(row["dtype"]), int(row["tokens"])) for row in rows})
    for dtype_index, tokens in keys:
        here = [row for row in rows if row["dtype"] == DTYPES[dtype_index] and int(row["tokens"]) == tokens]
        ours = max((row for row in here if row["attention"] == OURS), key=_tokens_per_second, default=None)
        others = {row["attention"]: _times(row["speedup"]) for row in here if row["attention"] != OURS}
        if ours is None:
            continue
        name = f"LLaMA, {ours['layers']} layers of {ours['hidden']}, {ours['dtype']}"
        rate = f"{_tokens_per_second(ours):.0f}"
        cells = (name, str(tokens), ours["group_size"], rate, others.get("s2", "-"), others.get("full", "-"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _tokens_per_second(row: dict[str, str]) -> float:
    return float(row["tokens_per_second"])


def figures(results: Path = RESULTS) -> str:
    """All tables, ending in a newline. LookupError where there are no attention results."""
    attention, steps = newest(results, "candidate"), newest(results, "attention")
    if not attention:
        raise LookupError(f"no results of bench_attention.py in {results}")
    blocks = [f"{measured_on(attention)}:", "\n".join(attention_table(attention))]
    blocks += tiny_line(attention)
    if steps:
        blocks += [f"{measured_on(steps)}:", "\n".join(step_table(steps))]
    if h2o := newest(results, "cache_bytes"):
        blocks += [f"{measured_on(h2o)}, H=8/2, D=128:", *tables_h2o.tables(h2o)]
    if extension := newest(results, "extension"):
        blocks += [f"{measured_on(extension)}:", *tables_extension.tables(extension)]
    if memory := newest(results, "trained_with"):
        blocks += [f"{measured_on(memory)}:", *tables_memory.tables(memory)]
    return "\n\n".join(blocks) + "\n"


def headlines(results: Path = RESULTS) -> str:
    """The main tables, ending in a newline: an extension, and a model with smaller caches."""
    blocks = []
    if extension := newest(results, "extension"):
        blocks += [f"{measured_on(extension)}:", *tables_extension.tables(extension)]
    if h2o := newest(results, "cache_bytes"):
        blocks += [f"{measured_on(h2o)}:", *tables_h2o.tables(h2o)[-1:]]
    return "\n\n".join(blocks) + "\n"


def training(results: Path = RESULTS) -> str:
    """What training takes, ending in a newline: memory, time of a step, an extension."""
    blocks = []
    for column, make in (
        ("trained_with", tables_memory.tables),
        ("attention", lambda rows: ["\n".join(step_table(rows))]),
        ("extension", tables_extension.tables),
    ):
        if rows := newest(results, column):
            blocks += [f"{measured_on(rows)}:", *make(rows)]
    return "\n\n".join(blocks) + "\n"


# The files with tables, and what makes them.
PAGES = {README: headlines, PAGE: figures, GUIDE: training}


def between_markers(text: str) -> str | None:
    """What stands between the markers; None where they are missing. ValueError: one, or wrong order."""
    if BEGIN not in text and END not in text:
        return None
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README: expected {BEGIN} and then {END}")
    return text[begin + len(BEGIN) : end]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.write and not options.check:
        print(figures(), end="")
        return 0
    status = 0
    for path, make in PAGES.items():
        page, new = path.read_text(encoding="utf-8"), f"\n{make()}"
        old = between_markers(page)
        if old is None:
            print(f"{path.name} has no {BEGIN} and {END}", file=sys.stderr)
            status = 1
        elif options.write:
            path.write_text(page.replace(BEGIN + old + END, BEGIN + new + END), encoding="utf-8")
        elif old != new:
            print(f"{path.name}: not the newest results' figures; run tables.py --write", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
