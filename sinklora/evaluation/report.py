"""What an evaluation leaves: results.json with everything, a CSV and a picture for each task, and the lines
of the tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..about import info
from ..folders import write_whole
from .run import Results
from .task import Row, Task

FILE_NAME = "results.json"


def write_results(
    results: Results, tasks: Sequence[Task], configuration: dict[str, Any], folder: Path
) -> list[Path]:
    """Writes results.json, and TASK.csv and TASK.png for each task with rows; each whole or not at all.

    Returns the files. Raises OSError.
    """
    written = {FILE_NAME: json.dumps(as_json(results, tasks, configuration), indent=2).encode() + b"\n"}
    for task in tasks:
        rows = results.rows[task.name]
        if rows:
            written[f"{task.name}.csv"] = as_csv(task, rows).encode()
            written[f"{task.name}.png"] = _as_png(task, rows)
    for name, content in written.items():
        write_whole(folder / name, content)
    return [folder / name for name in written]


def as_json(results: Results, tasks: Sequence[Task], configuration: dict[str, Any]) -> dict[str, Any]:
    """Everything there is to say about an evaluation, as plain JSON."""
    found: dict[str, Any] = {}
    for task in tasks:
        rows = results.rows[task.name]
        found[task.name] = {
            "settings": task.settings(),
            "rows": [
                {"model": row.model, "way": row.way, **dataclasses.asdict(row.cell), "values": row.values}
                for row in rows
            ],
            "notes": task.notes(rows) if rows else [],
        }
    return {
        "configuration": configuration,
        "models": results.models,
        "tasks": found,
        "failures": [failure._asdict() for failure in results.failures],
        "machine": json.loads(json.dumps(info(), default=str)),
    }


def as_csv(task: Task, rows: Sequence[Row]) -> str:
    """A line for each measured cell; values that are missing are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = list(task.columns())
    writer.writerow(["model", "way", "length", "depth", *columns])
    for row in rows:
        values = (row.values.get(column) for column in columns)
        writer.writerow([row.model, row.way, row.cell.length, row.cell.depth, *values])
    return file.getvalue()


def _as_png(task: Task, rows: Sequence[Row]) -> bytes:
    file = io.BytesIO()
    task.draw(rows).savefig(file, format="png", dpi=120)
    return file.getvalue()


def table(task: Task, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: models x ways by lengths, of the task's first column, the mean over depths."""
    column = task.columns()[0]
    lengths = sorted({row.cell.length for row in rows})
    lines: dict[tuple[str, str], dict[int, list[Any]]] = {}
    for row in rows:
        line = lines.setdefault((row.model, row.way), {})
        line.setdefault(row.cell.length, []).append(row.values.get(column))
    headers = ["model", "way", *(f"{column} {length}" for length in lengths)]
    return headers, [
        [*names, *(_shown(line.get(length, [])) for length in lengths)] for names, line in lines.items()
    ]


def _shown(values: Sequence[Any]) -> str:
    """The mean of numbers; a word as it is; "-" where there is none."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    if any(isinstance(value, str) for value in found):
        return ", ".join(dict.fromkeys(map(str, found)))
    return f"{fmean(found):.3f}"
