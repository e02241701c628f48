"""Tasks of lm-evaluation-harness (EleutherAI, package lm-eval), run on the models opened here."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..extras import MissingExtraError
from .task import Advance, Cell, NotMeasurableError, Row, Task, Way

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..loading import OpenedModel

MODULE = "lm_eval"
PACKAGE = "lm-eval"


@functools.cache
def task_manager() -> Any:
    """lm-evaluation-harness's index of its tasks, read once: it is in thousands of files.

    Its `metadata`, which tasks are made with, is changed in place for each length.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata={"max_seq_lengths": [4096]})


def find_task(name: str, known: Sequence[str]) -> None:
    """Raises where lm-evaluation-harness is not installed (MissingExtraError), or has no task, group or tag
    of that name (ValueError). known: our own tasks, which the messages name too.
    """
    ours = f"task: expected one of {', '.join(known)}"
    if importlib.util.find_spec(MODULE) is None:
        raise MissingExtraError(
            f"{ours}, got {name}; for tasks of lm-evaluation-harness run: pip install {PACKAGE}"
        )
    if name not in task_manager().all_tasks:
        raise ValueError(f"{ours} or of lm-evaluation-harness (lm_eval ls tasks), got {name}")


class HarnessTask(Task):
    """One task, group or tag of lm-evaluation-harness, for each length.

    A length is the most tokens that the model gets, longer prompts lose their beginning; tasks that make
    prompts of a given length (RULER) make them of that one.

    Args:
        limit: questions of each task; None: all.

    Raises:
        ValueError: limit below 1, no such task. MissingExtraError: lm-eval is not installed.
    """

    def __init__(
        self,
        name: str,
        lengths: Sequence[int],
        *,
        limit: int | None = None,
        seed: int = 0,
        tokens_per_batch: int = 8192,
        known: Sequence[str] = (),
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        find_task(name, known)
        self.name, self.lengths, self.limit, self.seed = name, sorted(set(lengths)), limit, seed
        self.tokens_per_batch = tokens_per_batch

    def settings(self) -> dict[str, Any]:
        return {PACKAGE: metadata.version(PACKAGE), "limit": self.limit, "seed": self.seed}

    def cells(self) -> list[Cell]:
        return [Cell(length) for length in self.lengths]

    def takes(self, way: Way) -> bool:
        """Most tasks generate, which goes on from cached tokens."""
        return way.attention == "full"

    def work(self, opened: OpenedModel, way: Way, cell: Cell) -> int:
        """How much a task reads is not known before: a cell counts by its length."""
        return cell.length

    def measure(self, opened: OpenedModel, way: Way, cell: Cell, advance: Advance) -> dict[str, Any]:
        import lm_eval

        logging.getLogger(MODULE).setLevel(logging.ERROR)
        model = make_lm(opened, way, cell.length, max(1, self.tokens_per_batch // cell.length))
        with tempfile.TemporaryDirectory() as folder:
            # RULER opens the tokenizer itself, by its name.
            opened.tokenizer.save_pretrained(folder)
            manager = task_manager()
            manager.metadata.update(max_seq_lengths=[cell.length], tokenizer=folder)
            try:
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=[self.name],
                    limit=self.limit,
                    log_samples=False,
                    bootstrap_iters=0,
                    random_seed=self.seed,
                    numpy_random_seed=self.seed,
                    torch_random_seed=self.seed,
                    fewshot_random_seed=self.seed,
                    task_manager=manager,
                )
            except OSError as error:
                # Missing files, datasets that are not there, no network.
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ValueError(
                    f"task: {self.name}: its data cannot be loaded: {lines[0]} (lm-evaluation-harness "
                    "downloads it on first use)"
                ) from error
        advance(cell.length)
        return scores(found, cell.length)

    def columns(self) -> Sequence[str]:
        return ("score", "metric", "num_tasks")

    def notes(self, rows: Sequence[Row]) -> list[str]:
        metrics = ", ".join(dict.fromkeys(row.values["metric"] for row in rows))
        limit = "" if self.limit is None else f", {self.limit} questions of each"
        return [
            f"{self.name}: of lm-evaluation-harness, mean over tasks of {metrics}{limit}; columns are the "
            "most tokens that the model gets."
        ]

    def draw(self, rows: Sequence[Row]) -> Figure:
        from ..plots_curves import plot_lines

        lines: dict[str, dict[float, float]] = {}
        for row in rows:
            lines.setdefault(f"{row.model}, {row.way}", {})[row.cell.length] = row.values["score"]
        return plot_lines(
            lines,
            x_label="most tokens that the model gets",
            y_label="score",
            title=f"{self.name} (lm-evaluation-harness)",
            log_x=True,
        )


def make_lm(opened: OpenedModel, way: Way, length: int, batch_size: int) -> Any:
    """lm-evaluation-harness's model around the opened one; it generates through the way's cache."""
    from lm_eval.models.huggingface import HFLM

    make_cache = way.make_cache

    class CachedLM(HFLM):  # type: ignore[misc]
        def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
            if make_cache is not None:
                options["past_key_values"] = make_cache(opened.model, length)
            return super()._model_generate(context, max_length, stop, **options)

        def _model_call(self, *args: Any, **options: Any) -> Any:
            if make_cache is not None:
                raise NotMeasurableError(
                    f"task: it scores given answers in one forward, which no cache changes; {way.name} is "
                    "for tasks that generate"
                )
            return super()._model_call(*args, **options)

    return CachedLM(
        pretrained=opened.model, tokenizer=opened.tokenizer, max_length=length, batch_size=batch_size
    )


def scores(found: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The mean over tasks of each one's first metric, and all numbers, of what simple_evaluate returns.

    A task with a metric for each length (RULER) is taken by that of `length`.
    """
    groups = {name for name, parts in (found.get("group_subtasks") or {}).items() if parts}
    metrics: dict[str, dict[str, float]] = {}
    for task, values in found["results"].items():
        numbers = {
            key.partition(",")[0]: float(value)
            for key, value in values.items()
            if isinstance(value, (int, float))
            and math.isfinite(value)  # NaN is no JSON
            and "_stderr" not in key
            and "," in key
            and (not key.partition(",")[0].isdigit() or key.partition(",")[0] == str(length))
        }
        if numbers and task not in groups:
            metrics[task] = numbers
    if not metrics:
        raise ValueError("task: lm-evaluation-harness gave no number")
    firsts = [next(iter(numbers.items())) for numbers in metrics.values()]
    named = sorted({"right answers" if name.isdigit() else name for name, _ in firsts})
    return {
        "score": fmean(value for _, value in firsts),
        "metric": ", ".join(named),
        "num_tasks": len(metrics),
        "metrics": metrics,
    }
