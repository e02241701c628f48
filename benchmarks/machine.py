"""What a figure was measured on: every CSV row carries these columns."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_name() -> str:
    """The CPU's name with family and model, which tell generations with one name apart."""
    info = _cpuinfo()
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']} (family {info.get('cpu family', '?')} model {info.get('model', '?')})"


def has_amx() -> bool:
    return "amx_bf16" in _cpuinfo().get("flags", "").split()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def date() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def commit() -> dict[str, str]:
    """Columns "commit" and "dirty" of the tree."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        # Results are what a run writes; they do not change what was measured.
        "dirty": str(bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results"))).lower(),
    }


def system() -> str:
    return f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"


def describe(threads: int) -> dict[str, str]:
    """Column name -> value: date (UTC), machine, commit, versions."""
    import sinklora

    return {
        "date": date(),
        "cpu": cpu_name(),
        "cpus": str(os.cpu_count()),
        "cpu_level": str(sinklora.info()["cpu_level"]),
        "amx": str(has_amx()).lower(),
        "threads": str(threads),
        **commit(),
        "sinklora": sinklora.__version__,
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "system": system(),
    }
