"""Progress bars of the command line, with rich."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Gives `begin(description, total)`, which starts a bar and returns the function that advances it.

    On a terminal the bars move; elsewhere (a log, CI) each one is a single line once it is full.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def begin(description: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(description, total=total)

            def advance(amount: int) -> None:
                progress.advance(task, amount)
                if not console.is_terminal and progress.tasks[task].finished:
                    console.print(f"done: {description}", highlight=False)

            return advance

        yield begin
