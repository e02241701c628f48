"""What a run shows and leaves of its steps: a progress bar's notes, log.csv, log.json and loss.png."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Entry = Mapping[str, Any]
COLUMNS = (
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "memory_bytes",
    "eval_loss",
    "eval_perplexity",
)


class RunLog(TrainerCallback):
    """Shows each step, and writes what is logged to log.csv as it comes; in the main process only.

    Args:
        path: of log.csv; what a run that was killed wrote there after its last checkpoint is taken away.
        advance: moves a progress bar by a number of steps, with a note beside it.
    """

    def __init__(self, path: Path, advance: Callable[[int, str], None]) -> None:
        self.path = path
        self.advance = advance
        self.note = ""
        self._written = 0
        self._steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._steps = state.global_step
            self.advance(state.global_step, "")
            with self.path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)
            self._written = 0
            self._write(state.log_history)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._write(state.log_history)
        if logs and "loss" in logs:
            self.note = f"loss {logs['loss']:.4f}"
            if "tokens_per_second" in logs:
                self.note += f"  {logs['tokens_per_second']:,.0f} tokens/s"
        self.advance(state.global_step - self._steps, self.note)
        self._steps = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not control.should_log:
            self.advance(state.global_step - self._steps, self.note)
            self._steps = state.global_step

    def _write(self, history: Sequence[Entry]) -> None:
        new = history[self._written :]
        self._written = len(history)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writerows(entry for entry in new if "loss" in entry or "eval_loss" in entry)


def losses(history: Sequence[Entry], name: str) -> dict[float, float]:
    """Step -> value of every entry that has `name`."""
    return {float(entry["step"]): float(entry[name]) for entry in history if name in entry}


def write_log(history: Sequence[Entry], summary: Mapping[str, Any], path: Path) -> None:
    """log.json: what the run came to, and every entry of its log."""
    kept = [{key: entry[key] for key in COLUMNS if key in entry} for entry in history]
    entries = [entry for entry in kept if "loss" in entry or "eval_loss" in entry]
    text = json.dumps({**summary, "log": entries}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def draw_losses(history: Sequence[Entry], title: str, path: Path) -> None:
    """loss.png: the training loss over the steps, and the evaluations where there are any."""
    from ..plots_curves import plot_lines

    lines = {"training": losses(history, "loss"), "held out, full attention": losses(history, "eval_loss")}
    figure = plot_lines(
        {name: line for name, line in lines.items() if line},
        x_label="step",
        y_label="loss, nats per token",
        title=title,
    )
    figure.savefig(path, dpi=120)
