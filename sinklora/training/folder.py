"""The folder of a run: who may write into it, what a resumed run must have in common with it, its results.

run.yaml              the options, as --config takes them
log.csv               a line for every step that is logged, while the run goes on
checkpoints/          checkpoint-N, and run.json: what --resume compares
...                   the model or adapter and what else is written at the end
log.json              written last: a folder that has it holds a finished run
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..folders import write_whole
from . import checkpoints
from .settings import write_options

OPTIONS = "run.yaml"
RECORD = "run.json"
FINISHED = "log.json"
LOG = "log.csv"
_RESULTS = ".results.partial"
# Options that may change when a run goes on: they change no loss.
FREE = frozenset(
    {
        *("output", "save-every", "keep-checkpoints", "eval-every", "log-every", "report-to", "cache-dir"),
        *("gradient-checkpointing", "chunk-tokens", "threads", "batch-size", "accumulate"),
        "sharding",
    }
)


class RunFolder:
    """One run's folder. Only the main process is to call what writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def check(self, resume: bool) -> None:
        """Raises ValueError unless a run may start here, or with `resume` go on, saying what to do."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output: expected a folder, got the file {self.path}")
        # Before hours of tokenising, not after them.
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise ValueError(f"output: cannot write into {self.path}: {there} is no folder to write into")
        begun = (self.checkpoints / RECORD).is_file()
        if (self.path / FINISHED).is_file() and begun:
            raise ValueError(
                f"output: {self.path} holds a finished run; name another folder, or delete this one"
            )
        if resume and not begun:
            raise ValueError(f"resume: no run to go on with in {self.path}; leave out --resume to start one")
        if not resume and begun:
            raise ValueError(
                f"output: {self.path} holds an unfinished run; go on with it by --resume, name another "
                "folder, or delete it"
            )
        if not begun and self.path.is_dir() and not self._is_empty():
            raise ValueError(f"output: expected a new or empty folder, got {self.path}, which holds files")

    def begin(self, options: Mapping[str, Any], facts: Mapping[str, Any], resume: bool) -> None:
        """Writes run.yaml and what a later --resume compares; with `resume`, compares it.

        Args:
            options: as FinetuneSettings.as_options.
            facts: what else must stay, by names that a reader understands (tokens, rows of a step).

        Raises:
            ValueError: the run here was begun with something else. OSError: nothing can be written.
        """
        record = {"options": dict(options), "facts": dict(facts)}
        if resume:
            self._compare(record)
            checkpoints.clean(self.checkpoints)
            shutil.rmtree(self.path / _RESULTS, ignore_errors=True)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not resume:
                write_json(self.checkpoints / RECORD, record)
            write_options(self.path / OPTIONS, options)
        except OSError as error:
            raise OSError(f"output: cannot write into {self.path}: {error.strerror or error}") from error

    def begin_results(self) -> Path:
        """A new folder to write the results into."""
        scratch = self.path / _RESULTS
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        return scratch

    def finish_results(self) -> None:
        """Moves what was written there to the run's folder, log.json last."""
        scratch = self.path / _RESULTS
        for entry in sorted(scratch.iterdir(), key=lambda path: path.name == FINISHED):
            place = self.path / entry.name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            entry.replace(place)
        scratch.rmdir()

    def _is_empty(self) -> bool:
        """Whether nothing is there, or only what a run left that was killed while it wrote its first file."""
        left = [*self.path.iterdir(), *(self.checkpoints.iterdir() if self.checkpoints.is_dir() else [])]
        return all(path == self.checkpoints or path.name.startswith(f".{RECORD}.") for path in left)

    def _compare(self, record: dict[str, Any]) -> None:
        path = self.checkpoints / RECORD
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            options, facts = dict(before["options"]), dict(before["facts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume: cannot read {path}: {error!r}") from error
        now = json.loads(json.dumps(record))
        changed = [
            *_differences(options, now["options"], free=FREE),
            *_differences(facts, now["facts"], free=frozenset()),
        ]
        if changed:
            raise ValueError(
                f"resume: the run in {self.path} was begun with other settings: {'; '.join(changed)}"
            )


def _differences(before: dict[str, Any], now: dict[str, Any], free: frozenset[str]) -> list[str]:
    names = sorted({*before, *now} - free)
    return [
        f"{name} was {_text(before.get(name))}, got {_text(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _text(value: Any) -> str:
    return "not given" if value is None else str(value)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")
