"""The table of a training step's memory, measured and foretold, from rows of bench_memory.py's CSV."""

from __future__ import annotations

Rows = list[dict[str, str]]
NAMES = {"sf": "SF-Attn", "full": "full attention (torch's SDPA)"}


def tables(rows: Rows) -> list[str]:
    """One table; none without rows."""
    lines = [
        "| LLaMA, float32 | context | checkpointing | peak, MiB | `memory_estimate` says | off by |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["peak_bytes"]:
            continue
        measured, foretold = int(row["peak_bytes"]), int(row["foretold_bytes"])
        cells = (
            f"{row['layers']} layers of {row['hidden']}, {NAMES[row['trained_with']]}",
            row["context"],
            "yes" if row["checkpointing"] == "True" else "no",
            f"{measured / 2**20:.0f}",
            f"{foretold / 2**20:.0f}",
            f"{foretold / measured - 1:+.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines)] if len(lines) > 2 else []
