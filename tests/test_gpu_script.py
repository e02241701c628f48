""".ci/gpu, which no CI runs: a step that fails or hangs costs no other, and everything is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "gpu"
# In place of Python: the first test fails, the matrix hangs, benchmarks write their files.
FAKE = """#!/bin/sh
case "${SINKLORA_GOLDEN:-} $*" in
*gpu_matrix.py*) sleep 60 ;;
write*"-m pytest"*) echo fragment >"$SINKLORA_FRAGMENTS/mma.txt" ;;
*"-m pytest"*) echo one test failed; exit 1 ;;
*--output*) while [ "$1" != --output ]; do shift; done; echo figures >"$2" ;;
esac
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not SCRIPT.exists() or shutil.which("timeout") is None,
    reason="needs bash, timeout and the source tree",
)


def run(tmp_path: Path, *steps: str, **settings: str) -> tuple[int, dict[str, str]]:
    """Exit status, and each step's line of the summary."""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "SINKLORA_GPU_STEP_SECONDS": "5"} | settings
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), *steps]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    return done.returncode, {name: said.strip() for name, _, said in (line.partition(" ") for line in lines)}


def test_a_step_that_hangs_or_fails_costs_no_other(tmp_path: Path) -> None:
    status, summary = run(tmp_path, "smoke", "tests", "h2o", "fragments")
    assert status == 1
    assert summary["smoke"] == "TIME OUT after 5 s" and summary["tests"].startswith("FAILED with 1")
    assert summary["h2o"].startswith("ok") and summary["fragments"].startswith("ok") and len(summary) == 4
    out = tmp_path / "out"
    assert (out / "h2o-cuda.csv").read_text() == "figures\n"
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert logs.extractfile("logs/tests.log").read() == b"one test failed\n"
    with tarfile.open(out / "fragments.tar.gz") as fragments:
        assert "fragments/mma.txt" in fragments.getnames()


def test_the_whole_ends_in_time(tmp_path: Path) -> None:
    status, summary = run(tmp_path, "smoke", "h2o", SINKLORA_GPU_SECONDS="4")
    # On a busy machine the script's own beginning takes seconds too.
    assert status == 1 and re.fullmatch("TIME OUT after [1-4] s", summary["smoke"])
    assert summary["h2o"] == "not run: 4 seconds are over"
