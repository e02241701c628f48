"""Progress bars of the command line, with rich."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Where no bar moves, a bar with notes is a line as often as this.
SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int], Callable[..., None]]]:
    """Gives `begin(description, total)`, which starts a bar and returns the function that advances it.

    That function takes an amount, and perhaps a note that stands beside the bar from then on. On a terminal
    the bars move; elsewhere (a log, CI) each one is a single line once it is full, and one with notes also a
    line every half minute.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def begin(description: str, total: int) -> Callable[..., None]:
            task = progress.add_task(description, total=total, note="")
            lines = None if console.is_terminal else _Lines(console, progress, task)

            def advance(amount: int, note: str | None = None) -> None:
                progress.advance(task, amount)
                if note is not None:
                    progress.update(task, note=escape(note))
                if lines is not None:
                    lines.show(note or "")

            return advance

        yield begin


class _Lines:
    """One bar as lines of a log."""

    def __init__(self, console: Console, progress: Progress, task: TaskID) -> None:
        self.console, self.progress, self.task = console, progress, task
        self.begun = self.shown = time.monotonic()
        self.first = 0.0
        self.done = False

    def show(self, note: str) -> None:
        task = self.progress.tasks[self.task]
        now = time.monotonic()
        if task.finished and not self.done:
            self.done = True
            self._print(f"done: {task.description}", note)
        elif note and now - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = now
            left = ""
            if task.total and task.completed > self.first:
                rate = (now - self.begun) / (task.completed - self.first)
                left = f"{_duration(rate * (task.total - task.completed))} left"
            self._print(f"{task.description} {task.completed:.0f}/{task.total:.0f}", note, left)
        elif not note:  # what a resumed run begins with took no time
            self.first = task.completed

    def _print(self, *parts: str) -> None:
        self.console.print("  ".join(part for part in parts if part), highlight=False, markup=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
