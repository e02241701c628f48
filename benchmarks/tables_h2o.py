"""The README's tables of the heavy-hitter cache, from rows of bench_h2o.py's CSV."""

from __future__ import annotations

from h2o_model import WAYS
from h2o_rows import BAR_SHAPE, DYNAMIC, GENERATE, PREFILL, PROMPT, SCORED_STEPS, STEP
from h2o_ways import CHUNKED, EAGER, FORWARD, OURS, SCORES, SDPA

Rows = list[dict[str, str]]
# A README has room for some rows; the CSV has the others.
SHOWN_TOKENS = ("4096", "8192")
SHOWN_SLOTS = ("4096", "32768")
LEFT_OUT_WAYS = ("H2O 50 %", "H2O 10 %")
DTYPES = ("float32", "bfloat16")


def tables(rows: Rows) -> list[str]:
    """Each section's table; none for a section without rows."""
    found = [_prompt_table(rows), _step_table(rows), _model_table(rows)]
    return ["\n".join(lines) for lines in found if len(lines) > 2]


def _cases(rows: Rows, section: str) -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """(dtype, tokens) -> way -> row, in the order of the rows."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["section"] == section:
            found.setdefault((row["dtype"], row["num_tokens"]), {})[row["way"]] = row
    return found


def _seconds(ways: dict[str, dict[str, str]], *names: str) -> float | None:
    """The least time of these ways; None where none was measured."""
    found = [float(ways[name]["seconds"]) for name in names if name in ways and ways[name]["seconds"]]
    return min(found, default=None)


def _ratio(above: float | None, below: float | None) -> str:
    return "-" if above is None or below is None else f"{above / below:.2f}x"


def _mebibytes(text: str) -> str:
    return f"{int(text) / 2**20:.0f}" if text else "-"


def _prompt_table(rows: Rows) -> list[str]:
    lines = [
        "| prompt with scores | N | ms | score pass / forward | eager N x N takes | eager in chunks takes |"
        " SDPA without scores takes | extra MiB (eager's) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = {case: ways for case, ways in _cases(rows, PROMPT).items() if case[1] in SHOWN_TOKENS}
    for (dtype, tokens), ways in shown.items():
        ours, rival = ways[OURS], ways.get(EAGER, {}).get("extra_bytes", "")
        seconds = _seconds(ways, OURS)
        cells = (
            dtype,
            tokens,
            f"{seconds * 1e3:.0f}" if seconds is not None else "-",
            _ratio(_seconds(ways, SCORES), _seconds(ways, FORWARD)),
            *(_ratio(_seconds(ways, name), seconds) for name in (EAGER, CHUNKED, SDPA)),
            f"{_mebibytes(ours['extra_bytes'])} ({_mebibytes(rival)})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _step_table(rows: Rows) -> list[str]:
    lines = [
        "| one step with scores and eviction | slots | µs | of read bandwidth | fastest in torch takes |"
        " H2O's published scheme takes |",
        "|---|---|---|---|---|---|",
    ]
    cases = _cases(rows, STEP)
    shown = {case: ways for case, ways in cases.items() if case[1] in SHOWN_SLOTS} or cases
    for (dtype, slots), ways in shown.items():
        seconds, share = _seconds(ways, OURS), ways[OURS]["read_share"]
        cells = (
            dtype,
            slots,
            f"{seconds * 1e6:.0f}" if seconds is not None else "-",
            f"{float(share):.0%}" if share else "-",
            _ratio(_seconds(ways, *SCORED_STEPS), seconds),
            _ratio(_seconds(ways, "published"), seconds),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _model_table(rows: Rows) -> list[str]:
    prompts, steps = ({way: row for ways in _cases(rows, name).values() for way, row in ways.items()}
                      for name in (PREFILL, GENERATE))  # fmt: skip
    tokens = next((row["num_tokens"] for row in steps.values()), str(BAR_SHAPE[2]))
    lines = [
        f"| LLaMA, bfloat16, prompt of {tokens} | prompt, s | tokens/s | cache, MiB | peak extra MiB |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        if way not in steps or way not in prompts or way in LEFT_OUT_WAYS:
            continue
        cells = (
            "DynamicCache, transformers' sdpa" if way == DYNAMIC else way,
            f"{float(prompts[way]['seconds']):.2f}",
            f"{1 / float(steps[way]['seconds']):.0f}",
            f"{int(steps[way]['cache_bytes']) / 2**20:.1f}",
            _mebibytes(steps[way]["extra_bytes"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines
