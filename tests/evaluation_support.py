"""Tiny models and texts to evaluate, and a task that counts what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chat_support import save_model
from matplotlib.figure import Figure

from sinklora import SFPattern, patch
from sinklora.evaluation.models import NamedModel
from sinklora.evaluation.run import Evaluation, Results
from sinklora.evaluation.store import Store
from sinklora.evaluation.task import Cell, Row, Task, Way
from sinklora.loading import open_model

FULL = Way("full")


def save_models(folder: Path) -> list[NamedModel]:
    """Two models of other weights: "base", and "long", which carries a pattern."""
    save_model(folder / "base")
    opened = open_model(save_model(folder / "long", initializer_range=0.25))
    patch(opened.model, SFPattern(group_size=16, num_sink_tokens=2)).save_pretrained(folder / "long")
    return [NamedModel(name, str(folder / name)) for name in ("base", "long")]


def write_texts(folder: Path, *lengths: int) -> Path:
    """A file of so many bytes for each length."""
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(lengths):
        line = f"{number} of these lines, and again number {number}. "
        (folder / f"{number}.txt").write_text((line * length)[:length])
    return folder


@dataclasses.dataclass
class Counting(Task):
    """Measures nothing; remembers what it was asked for, and calls `on_cell` before."""

    on_cell: Callable[[int], None] = lambda number: None
    lengths: tuple[int, ...] = (8, 16)
    text: str = "a"
    measured: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)

    name = "counting"

    def settings(self) -> dict[str, Any]:
        return {"text": self.text}

    def cells(self) -> list[Cell]:
        return [Cell(length) for length in self.lengths]

    def work(self, opened: Any, way: Way, cell: Cell) -> int:
        return cell.length

    def measure(self, opened: Any, way: Way, cell: Cell, advance: Callable[[int], None]) -> dict[str, Any]:
        self.on_cell(len(self.measured))
        self.measured.append((Path(opened.name).name, way.name, cell.length))
        advance(cell.length)
        return {"number": cell.length / 3}

    def columns(self) -> tuple[str, ...]:
        return ("number",)

    def draw(self, rows: Any) -> Figure:
        return Figure()


def evaluate(models: list[NamedModel], ways: list[Way], task: Task, output: Path, **options: Any) -> Results:
    evaluation = Evaluation(models, ways, [task], Store(output), **options)
    return evaluation.run(lambda description, total: lambda amount: None)


def values(results: Results, task: str, column: str) -> dict[tuple[str, str, int], Any]:
    rows: list[Row] = results.rows[task]
    return {(row.model, row.way, row.cell.length): row.values[column] for row in rows}
