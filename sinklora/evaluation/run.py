"""Measures models x ways x tasks x cells, one model in memory at a time, and stores each cell at once."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..hf.patching import patched
from ..loading import OpenedModel, on_the_hub, open_model
from .fingerprint import fingerprint
from .models import NamedModel, carried_pattern, start_context
from .store import Store, cell_key
from .task import Cell, NotMeasurableError, Row, Task, Way

# begin(description, total) starts a progress bar and returns what advances it.
Begin = Callable[[str, int], Callable[[int], None]]


class Failure(NamedTuple):
    """What was not measured, and why.

    way, task: None where the model cannot be opened. skipped: it cannot be measured with these texts or
    lengths, which is no error.
    """

    model: str
    way: str | None
    task: str | None
    message: str
    skipped: bool = False


@dataclasses.dataclass
class Results:
    """What an evaluation found.

    rows: by task, in the order of models, ways and cells. models: what is known of each, by name. measured,
    stored: cells that were computed now, and those that an earlier call had.
    """

    rows: dict[str, list[Row]]
    failures: list[Failure]
    models: dict[str, dict[str, Any]]
    measured: int
    stored: int


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an evaluation; str() says what is kept."""


class _Place(NamedTuple):
    """A cell to be measured of one model."""

    task: Task
    way: Way
    cell: Cell
    key: str


class Evaluation:
    """One call: everything that is to be measured, and the store that keeps it.

    Args:
        dtype, device: of the models.
        open_: opens a model, as loading.open_model does.

    Raises:
        ValueError: a task that none of the ways can measure.
    """

    def __init__(
        self,
        models: Sequence[NamedModel],
        ways: Sequence[Way],
        tasks: Sequence[Task],
        store: Store,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        open_: Callable[[str, str], OpenedModel] = open_model,
    ) -> None:
        for task in tasks:
            if not any(task.takes(way) for way in ways):
                names = ", ".join(way.name for way in ways)
                raise ValueError(f"task: {task.name} cannot be measured with {names}")
        self.models, self.ways, self.tasks, self.store = models, ways, tasks, store
        self.dtype, self.device, self.open = dtype, device, open_
        self.failures: list[Failure] = []
        self.measured = 0

    def run(self, begin: Begin) -> Results:
        """Measures what the store lacks.

        What goes wrong with a model is among the results' failures, and the others go on. Raises OSError
        where a cell cannot be stored, Interrupted by Ctrl-C.
        """
        facts: dict[str, dict[str, Any]] = {}
        rows: dict[str, list[Row]] = {task.name: [] for task in self.tasks}
        for model in self.models:
            places: list[_Place] = []
            try:
                self._model(model, begin, facts, places)
            except _StoreError as error:
                raise error.cause from None
            except KeyboardInterrupt:
                raise Interrupted(
                    f"{self.measured} newly measured cells are kept in {self.store.folder}; the same command "
                    "goes on from there"
                ) from None
            except Exception as error:
                self._failed(model, None, None, error)
            finally:
                _free()
            for place in places:
                values = self.store.get(place.key)
                if values is not None:
                    name = place.task.name
                    rows[name].append(Row(name, model.name, place.way.name, place.cell, values))
        total = sum(len(each) for each in rows.values())
        finished = {task.name: task.finish(rows[task.name]) for task in self.tasks}
        return Results(finished, self.failures, facts, self.measured, total - self.measured)

    def _model(
        self, model: NamedModel, begin: Begin, facts: dict[str, dict[str, Any]], places: list[_Place]
    ) -> None:
        """Measures what is missing of a model; adds what is known of it, and to places all its cells."""
        opened: OpenedModel | None = None
        commit = None
        if on_the_hub(model.source):
            # Only the loaded config tells which state of it the Hub gave.
            opened = self._open(model)
            commit = getattr(opened.model.config, "_commit_hash", None)
        digest, pattern = fingerprint(model.source, commit), carried_pattern(model)
        facts[model.name] = {
            "source": model.source,
            "fingerprint": digest,
            "commit": commit,
            "start_context": start_context(model),
            "pattern": pattern,
        }
        places += [
            _Place(task, way, cell, self._key(digest, task, way, cell))
            for task in self.tasks
            for way in self.ways
            if task.takes(way)
            for cell in task.cells()
        ]
        missing: dict[tuple[str, str], list[_Place]] = {}
        for place in places:
            if self.store.get(place.key) is None:
                missing.setdefault((place.task.name, place.way.name), []).append(place)
        if not missing:
            return
        opened = opened or self._open(model)
        for group in missing.values():
            task, way = group[0].task, group[0].way
            try:
                with _reading(opened.model, way, pattern):
                    total = sum(task.work(opened, way, place.cell) for place in group)
                    advance = begin(f"{task.name}  {model.name}  {way.name}", total)
                    for place in group:
                        self._cell(model, opened, place, advance)
            except _StoreError:
                raise
            except Exception as error:
                self._failed(model, way, task, error)

    def _open(self, model: NamedModel) -> OpenedModel:
        opened = self.open(model.source, self.dtype)
        if self.device != "cpu":
            opened.model.to(torch.device(self.device))  # type: ignore[arg-type]
        return opened

    def _key(self, digest: str, task: Task, way: Way, cell: Cell) -> str:
        return cell_key(
            version=__version__,
            model=digest,
            dtype=self.dtype,
            task=task.name,
            settings=task.settings(),
            way=[way.name, way.attention, dict(way.settings), way.chunk],
            cell=dataclasses.asdict(cell),
        )

    def _cell(
        self, model: NamedModel, opened: OpenedModel, place: _Place, advance: Callable[[int], None]
    ) -> None:
        task, way, cell, key = place
        try:
            values = task.measure(opened, way, cell, advance)
        except Exception as error:
            self._failed(model, way, task, error, cell)
            return
        about = {"task": task.name, "model": model.name, "way": way.name, **dataclasses.asdict(cell)}
        try:
            self.store.add(key, values, about)
        except OSError as error:
            raise _StoreError(error) from error
        self.measured += 1

    def _failed(
        self,
        model: NamedModel,
        way: Way | None,
        task: Task | None,
        error: Exception,
        cell: Cell | None = None,
    ) -> None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = lines[0] if cell is None else f"at {cell.length}: {lines[0]}"
        failure = Failure(
            model.name,
            way.name if way is not None else None,
            task.name if task is not None else None,
            message,
            isinstance(error, NotMeasurableError),
        )
        if failure not in self.failures:
            self.failures.append(failure)


class _StoreError(Exception):
    """A cell cannot be stored: ends the evaluation, unlike what goes wrong with a model."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextlib.contextmanager
def _reading(model: Any, way: Way, pattern: dict[str, Any] | None) -> Iterator[None]:
    """The model patched for a way; open_model left it with full attention."""
    if way.attention == "full":
        yield
        return
    if pattern is None:
        raise NotMeasurableError(
            "attention: the model carries no settings of SF-Attn, so has no pattern to keep"
        )
    with patched(model, eval_attention=way.attention):
        yield


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
