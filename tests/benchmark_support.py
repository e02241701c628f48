"""Running the scripts of benchmarks/ and reading what they write."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import sinklora

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def start_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a benchmark with the sinklora that is under test, to its end."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(sinklora.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONSAFEPATH", None)  # the scripts import their neighbours
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def run_script(name: str, *arguments: str) -> str:
    """A benchmark's standard output; it must succeed."""
    done = start_script(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
