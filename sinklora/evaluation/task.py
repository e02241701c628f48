"""What the evaluation runs: tasks made of cells, each measured for one model and one way to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import Cache, PreTrainedModel

    from ..loading import OpenedModel

# Tells a progress bar of so much more done, in the unit of Task.work.
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model reads a text.

    Args:
        name: as it stands in tables: "full", "sf", "h2o 20%", "streaming 512".
        attention: "full" attends to everything; "sf" keeps the training pattern in eval mode, which scores
            whole texts only and cannot generate. The runner has patched the model so before it measures.
        make_cache: an empty cache for a model and a cell's length, which shares of it count from; None where
            everything is kept.
        chunk: tokens read at a time where given tokens are scored through the cache.
        settings: what the name does not say, as plain JSON; a change measures anew.
    """

    name: str
    attention: str = "full"
    make_cache: Callable[[PreTrainedModel, int], Cache] | None = None
    chunk: int = 1
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
    """The unit that is measured, stored and, after an interruption, not measured again.

    length: tokens that the model sees at once. depth: where the thing to find stands in the text, 0 to 1.
    """

    length: int
    depth: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured cell: which model read how, and what came out (plain JSON values)."""

    task: str
    model: str
    way: str
    cell: Cell
    values: dict[str, Any]


def with_values(row: Row, more: Mapping[str, Any]) -> Row:
    """The row with values added; the one given is left as it is."""
    return dataclasses.replace(row, values={**row.values, **more})


class NotMeasurableError(ValueError):
    """A cell that the given texts, lengths or ways do not fit: it is skipped with this word, which is an
    error only where nothing else is measured."""


class Task(Protocol):
    """One question to a model; made from settings that are checked before any model is opened.

    Subclass it: what has a body here may be left as it is.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """What the values depend on besides model and way, as plain JSON; a change measures anew."""
        ...

    def cells(self) -> list[Cell]:
        """What is to be measured for each model and way."""
        ...

    def takes(self, way: Way) -> bool:
        """Whether the task can be measured that way (generation cannot with attention "sf")."""
        return True

    def work(self, opened: OpenedModel, way: Way, cell: Cell) -> int:
        """Tokens that the model reads for a cell, for the progress bar: the sum of what advance gets."""
        ...

    def measure(self, opened: OpenedModel, way: Way, cell: Cell, advance: Advance) -> dict[str, Any]:
        """Plain JSON values; deterministic for given settings. The model is patched and in eval mode.

        Raises any Exception where it cannot be measured: that is reported, and the other cells go on.
        """
        ...

    def finish(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with values added that only all of them together tell, as a difference to a base model."""
        return list(rows)

    def columns(self) -> Sequence[str]:
        """Names of the values in the CSV, in order. The terminal's table shows the first one: a line for each
        model and way, a column for each length, the mean over depths."""
        ...

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """Lines below the table: what is measured, and what was left out."""
        return []

    def draw(self, rows: Sequence[Row]) -> Figure:
        """A picture of the rows of this task, all models and ways."""
        ...
