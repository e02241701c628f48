"""Shared fixtures: seeded random numbers, and every instruction set that this CPU has."""

from __future__ import annotations

import importlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

try:
    from sinklora import _C
except ImportError as error:
    raise pytest.UsageError(
        "The tests need sinklora with its extension: `pip install .`, then `pytest` (`python -m pytest` "
        "finds the source tree first); or `python setup.py build_ext --inplace` and PYTHONPATH set "
        f"to the tree. Importing it said: {error}"
    ) from error

# Child processes find the package that is tested, not the source tree that they are started in.
os.environ.setdefault("PYTHONSAFEPATH", "1")

_SEED = pytest.StashKey[int]()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's seed: SINKLORA_TEST_SEED, else a new one each run; printed where the test fails."""
    chosen = os.environ.get("SINKLORA_TEST_SEED")
    value = int(chosen) if chosen else random.SystemRandom().randrange(2**31)
    request.node.stash[_SEED] = value
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def torch_rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The emulator's builds that are ten times slower take every twelfth case of each test and at least one, not
# the same ones, and none of those marked race_only; "race" runs them all.
_SHARE, _FIRST = 12, {"hook": 0, "asan": 1}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = _FIRST.get(os.environ.get("SINKLORA_EMULATOR", ""))
    if first is None:
        return
    seen: Counter[str] = Counter()
    cases = Counter(item.nodeid.partition("[")[0] for item in items)
    kept: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        if seen[test] % _SHARE == first % min(cases[test], _SHARE) and not item.get_closest_marker(
            "race_only"
        ):
            kept.append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and _SEED in item.stash:
        report.sections.append(("random seed", f"repeat with SINKLORA_TEST_SEED={item.stash[_SEED]}"))
    return report


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of benchmarks/ as its scripts do: from their own folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # child processes find it too
    return importlib.import_module


@pytest.fixture(params=_C.cpu_levels())
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each available instruction set in turn."""
    before = _C.cpu_level()
    _C.select_cpu_level(request.param)
    yield request.param
    _C.select_cpu_level(before)


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device; skips with the reason where there is none, fails with SINKLORA_REQUIRE_GPU=1."""
    from device_support import missing

    if reason := missing():
        if os.environ.get("SINKLORA_REQUIRE_GPU", "0") not in ("", "0"):
            pytest.fail(reason)
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())
