"""Tables of what an extension costs and brings, from rows of bench_extension.py's CSV."""

from __future__ import annotations

import statistics

Rows = list[dict[str, str]]
NAMES = {
    "base": "before the extension",
    "full": "full attention",
    "s2": "S2-Attn, without the leak",
    "sf": "SF-Attn",
    "s2-torch": "S2-Attn in torch (LongLoRA's form)",
}


def tables(rows: Rows) -> list[str]:
    """Perplexity by length, and speed; none for a section without rows."""
    found = [_quality(rows), _speed(rows)]
    return ["\n".join(lines) for lines in found if len(lines) > 2]


def _quality(rows: Rows) -> list[str]:
    """Mean over the seeds, and half the distance of the extremes."""
    quality = [row for row in rows if row["section"] == "quality"]
    lengths = sorted({int(row["length"]) for row in quality})
    seeds = len({row["seed"] for row in quality})
    lines = [
        f"| trained at 4096 with ({seeds} seeds) | {' | '.join(f'perplexity at {n}' for n in lengths)} |",
        f"|---|{'---|' * len(lengths)}",
    ]
    for name in dict.fromkeys(row["extension"] for row in quality):
        cells = []
        for length in lengths:
            found = [
                float(row["perplexity"])
                for row in quality
                if row["extension"] == name and row["length"] == str(length)
            ]
            spread = (max(found) - min(found)) / 2
            cells.append(f"{statistics.mean(found):.3f} ± {spread:.3f}")
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return lines


def _speed(rows: Rows) -> list[str]:
    speed = {row["extension"]: row for row in rows if row["section"] == "speed"}
    lines = [
        "| `sinklora finetune`, float32 | tokens/s | SF-Attn is | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    ours = float(speed["sf"]["tokens_per_second"]) if "sf" in speed else None
    for name, row in speed.items():
        rate = float(row["tokens_per_second"])
        ratio = "-" if ours is None or name == "sf" else f"{ours / rate:.2f}x as fast"
        lines.append(f"| {NAMES[name]} | {rate:.0f} | {ratio} | {int(row['peak_bytes']) / 2**20:.0f} |")
    return lines
