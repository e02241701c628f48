"""The demo's results: what is computed from the losses, and the files they are written to."""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..about import info
from ..evaluation.perplexity import bootstrap_interval, improvement_share, mean_loss, perplexity
from ..plots import plot_pattern
from ..plots_curves import plot_curves
from .cache_report import CacheResults, write_cache_results
from .settings import DemoSettings

MARKER = "results.json"
Losses = list[torch.Tensor]


@dataclasses.dataclass
class Row:
    """One line of the table.

    perplexities: by window length. share: of full attention's improvement in perplexity over the sliding
    window, at the longest window; None where full attention does not improve or nothing was trained.
    above_full: nats per byte above full attention there, and its 95 % interval over files. tokens_per_second:
    of training.
    """

    name: str
    perplexities: dict[int, float]
    share: float | None = None
    above_full: tuple[float, float, float] | None = None
    tokens_per_second: float | None = None


class Results:
    """What a run of the demo found."""

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.sliding_stride = max(1, settings.start_context // 4)
        self.sliding: Losses = []
        self.scores: dict[tuple[str, int], Losses] = {}
        self.losses: dict[str, list[float]] = {}
        self.tokens_per_second: dict[str, float] = {}
        self.sample = ("", "")
        self.caches: CacheResults | None = None
        self.seconds = 0.0

    def rows(self) -> list[Row]:
        """The two baselines, then each attention that was trained."""
        settings, longest = self.settings, self.settings.lengths()[-1]
        sliding = perplexity(self.sliding)
        rows = [
            Row("start, interpolated", self._perplexities("untrained")),
            Row(
                f"start, sliding {settings.start_context}",
                dict.fromkeys(settings.lengths(), sliding),
            ),
        ]
        full = self.scores["full", longest]
        for name in settings.patterns():
            losses = self.scores[name, longest]
            above = None
            if name != "full":
                low, high = bootstrap_interval(losses, full, seed=settings.seed)
                above = (mean_loss(losses) - mean_loss(full), low, high)
            share = improvement_share(sliding, perplexity(full), perplexity(losses))
            rows.append(Row(name, self._perplexities(name), share, above, self.tokens_per_second[name]))
        return rows

    def _perplexities(self, name: str) -> dict[int, float]:
        return {length: perplexity(self.scores[name, length]) for length in self.settings.lengths()}

    def headers(self) -> list[str]:
        """Of the table that is shown; the names in results.csv are longer."""
        lengths = (f"ppl {length}" for length in self.settings.lengths())
        return ["model", *lengths, "share", "nats above full", "tokens/s"]

    def notes(self) -> list[str]:
        """What the table's columns mean, one line each."""
        settings, longest = self.settings, self.settings.lengths()[-1]
        tokens = sum(len(losses) for losses in self.sliding)
        window = f"sliding {settings.start_context}-token window"
        return [
            "ppl N: perplexity per byte with full attention over windows of N tokens, each moved by N/2; the "
            f"{window} is moved by {self.sliding_stride}.",
            f"Scored: {tokens} bytes of {settings.validation_files} files that no model was trained on.",
            f"share: of full attention's improvement in perplexity over the {window}, at {longest} tokens; "
            '"none" where full attention does not improve on it.',
            f"nats above full: per byte, at {longest} tokens, with the 95 % bootstrap interval over files.",
            "tokens/s: of training, on this machine.",
        ]


def cell_texts(row: Row) -> list[str]:
    """A row as it is shown: numbers rounded, "none" for a share that does not exist, "-" for what does not
    apply."""
    trained = row.tokens_per_second is not None
    share = "-" if not trained else "none" if row.share is None else f"{100 * row.share:.0f} %"
    above = "-" if row.above_full is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*row.above_full)
    speed = f"{row.tokens_per_second:.0f}" if row.tokens_per_second is not None else "-"
    return [row.name, *(f"{value:.3f}" for value in row.perplexities.values()), share, above, speed]


def write_results(results: Results, folder: Path) -> None:
    """results.json, results.csv, pattern.png, losses.png, start-losses.png and sample.txt in folder, and the
    caches' files."""
    rows = results.rows()
    _write_csv(results, rows, folder / "results.csv")
    settings = results.settings
    pattern = settings.patterns()["SF-Attn"]
    if pattern is not None:
        plot_pattern(pattern, settings.num_heads, settings.context).savefig(folder / "pattern.png", dpi=120)
    curves = dict(results.losses)
    start = curves.pop("start")
    labels = {"x_label": "step", "y_label": "training loss, nats per byte"}
    smooth = max(1, settings.extend_steps // 20)
    title = f"Extending from {settings.start_context} to {settings.context} tokens"
    plot_curves(curves, title=title, smooth=smooth, **labels).savefig(folder / "losses.png", dpi=120)
    title = f"The start model at {settings.start_context} tokens"
    smooth = max(1, settings.start_steps // 50)
    plot_curves({"start": start}, title=title, smooth=smooth, **labels).savefig(
        folder / "start-losses.png", dpi=120
    )
    if results.caches is not None:
        write_cache_results(results.caches, folder)
    prompt, continuation = results.sample
    (folder / "sample.txt").write_text(f"{prompt}\n===== continued =====\n{continuation}\n", encoding="utf-8")
    (folder / MARKER).write_text(json.dumps(_as_json(results, rows), indent=2) + "\n", encoding="utf-8")


def _write_csv(results: Results, rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        perplexities = [f"perplexity_{length}" for length in results.settings.lengths()]
        writer.writerow(
            ["model", *perplexities, "share", "nats_above_full", "low", "high", "training_tokens_per_second"]
        )
        for row in rows:
            above = row.above_full or ("", "", "")
            share = "" if row.tokens_per_second is None else "none" if row.share is None else row.share
            speed = "" if row.tokens_per_second is None else row.tokens_per_second
            writer.writerow([row.name, *row.perplexities.values(), share, *above, speed])


def _as_json(results: Results, rows: list[Row]) -> dict[str, Any]:
    import peft
    import transformers

    return {
        "settings": dataclasses.asdict(results.settings),
        "rows": [dataclasses.asdict(row) for row in rows],
        "notes": results.notes(),
        "training_losses": results.losses,
        "caches": None if results.caches is None else dataclasses.asdict(results.caches),
        "seconds": results.seconds,
        "versions": {
            "sinklora": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "machine": {
            "processor": platform.machine(),
            "num_threads": torch.get_num_threads(),
            **_plain(info()),
        },
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
