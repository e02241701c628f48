"""What the demo finds about caches: its table, its files, its pictures."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from ..plots_curves import plot_lines

# Cache policies by their names in the table and the pictures.
METHODS = ("H2O", "recent only", "StreamingLLM")


@dataclasses.dataclass
class CacheRow:
    """One cache policy at one budget.

    entries: keys that each head may hold, all kinds together. perplexity: per byte of the continuation.
    tokens_per_second: of decoding, all rows of the batch together. cache_bytes: held at the end.
    """

    method: str
    budget: float
    entries: int
    perplexity: float
    tokens_per_second: float
    cache_bytes: int


@dataclasses.dataclass
class CacheResults:
    """What the section found.

    prompt, continuation: tokens of each text that are read at once, and that are decoded behind them. texts:
    how many. rows: by method and budget. streams: by method, tokens read -> perplexity of the last stretch.
    """

    prompt: int
    continuation: int
    texts: int
    rows: list[CacheRow] = dataclasses.field(default_factory=list)
    streams: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)

    def headers(self) -> list[str]:
        perplexities = (f"ppl {method}" for method in METHODS)
        return ["budget", "entries", *perplexities, "tokens/s H2O", "KiB H2O"]

    def lines(self) -> list[list[str]]:
        """The table's cells: a line for each budget."""
        found = []
        for budget in dict.fromkeys(row.budget for row in self.rows):
            here = {row.method: row for row in self.rows if row.budget == budget}
            ours = here["H2O"]
            perplexities = [f"{here[method].perplexity:.3f}" for method in METHODS]
            numbers = [f"{ours.tokens_per_second:.0f}", f"{ours.cache_bytes / 1024:.0f}"]
            found.append([f"{budget:.0%}", str(ours.entries), *perplexities, *numbers])
        return found

    def notes(self) -> list[str]:
        """What the table's columns mean, and the streams in words."""
        found = [
            f"budget: what the SF-Attn model's cache may keep of a text's {self.prompt + self.continuation} "
            "tokens; at 100% nothing is evicted.",
            "H2O: half of it heavy, half recent. StreamingLLM: 4 sinks, the rest recent, positions by rank.",
            f"ppl: per byte of {self.continuation} tokens, decoded one by one after {self.prompt}, "
            f"{self.texts} texts at once; tokens/s: of that. KiB: of the cache, for all of them.",
        ]
        recent = [row.perplexity for row in self.rows if row.method == "recent only"]
        if min(recent) < recent[0]:
            found.append(
                "Some recent tokens alone predict better than the whole text: this small model makes no good "
                "use of what is far away, so keeping some of it, heavy or not, does not pay here."
            )
        for name, points in self.streams.items():
            values = list(points.values())
            change = f"perplexity {values[0]:.2f} at first, {values[-1]:.2f} at last"
            found.append(f"{name} over {max(points)} tokens: {change}.")
        return found


def write_cache_results(results: CacheResults, folder: Path) -> None:
    """caches.csv, caches.png and stream.png in folder."""
    names = [field.name for field in dataclasses.fields(CacheRow)]
    with (folder / "caches.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in results.rows)
    lines = {
        method: {100 * row.budget: row.perplexity for row in results.rows if row.method == method}
        for method in METHODS
    }
    y_label = "perplexity per byte"
    plot_lines(
        lines,
        x_label="budget, % of the tokens",
        y_label=y_label,
        title="What a smaller cache costs",
        log_x=True,
    ).savefig(folder / "caches.png", dpi=120)
    plot_lines(
        {
            name: {float(at): value for at, value in points.items()}
            for name, points in results.streams.items()
        },
        x_label="tokens read",
        y_label=y_label,
        title="Far beyond the trained length",
        log_y=True,
    ).savefig(folder / "stream.png", dpi=120)
