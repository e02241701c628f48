"""Runs that are killed, interrupted, or whose loss is no number any more."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import logged, make_base, make_texts, options, settings, train

from sinklora.training import checkpoints
from sinklora.training.continued import FinetuneRun
from sinklora.training.stopping import StopRequest
from sinklora.training.trainer import LongTrainer, NonFiniteLossError

LONG = {"steps": 80, "save_every": 3, "accumulate": 1, "lora_dropout": 0.1, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder / "base")
    make_texts(folder / "texts")
    return folder


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the block."""
    command = [sys.executable, "-W", "ignore", "-m", "sinklora", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_step(process: subprocess.Popen[str], log: Path, step: int) -> None:
    """Until the run has logged a step."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        if len(lines) > 1 and lines[-1].partition(",")[0].isdigit() and int(lines[-1].split(",")[0]) >= step:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def test_a_run_killed_and_interrupted_goes_on_with_the_same_losses(root: Path) -> None:
    """kill -9 at any moment, also while a checkpoint is written; Ctrl-C; and then to the end."""
    train(root, root / "whole", **LONG)
    output = root / "killed"
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    given = options(settings(root, output, **LONG))
    with started(given) as process:
        wait_for_step(process, output / "log.csv", draw.randrange(1, 20))
        time.sleep(draw.random() / 20)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    with started([*given, "--resume"]) as process:
        wait_for_step(process, output / "log.csv", draw.randrange(30, 50))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "stopped by Ctrl-C after step" in errors and "--resume" in errors
    (checkpoint,) = checkpoints.find_checkpoints(output / "checkpoints")
    checkpoints.check_whole(checkpoint)
    train(root, output, resume=True, **LONG)
    assert logged(output) == logged(root / "whole")
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == ["checkpoint-80", "run.json"]


def test_a_second_ctrl_c_acts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (request.signal_number, request.name) == (signal.SIGTERM, "SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)  # a manager that repeats itself is heard once
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Poisoned(LongTrainer):
    """Its loss, or the gradient of a finite loss, is no number in one step."""

    step: int
    value: float
    only_gradient: bool

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        if self.state.global_step == self.step and model.training:
            return _bad_gradient(loss, self.value) if self.only_gradient else loss * self.value
        return loss


def _bad_gradient(loss: torch.Tensor, value: float) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * value)
    return loss * 1.0


class PoisonedRun(FinetuneRun):
    poison: dict[str, Any]

    def trainer(self, *args: Any) -> Any:
        made = super().trainer(*args)
        made.__class__ = Poisoned
        vars(made).update(self.poison)
        return made


@pytest.mark.parametrize(
    ("value", "only_gradient"), [(float("nan"), False), (float("inf"), False), (float("nan"), True)]
)
def test_a_loss_that_is_no_number_stops_before_the_step(
    root: Path, value: float, only_gradient: bool
) -> None:
    output = root / f"poisoned-{value}-{only_gradient}"
    run = PoisonedRun(settings(root, output))
    run.poison = {"step": 9, "value": value, "only_gradient": only_gradient}
    with pytest.raises(
        NonFiniteLossError, match=r"NaN or infinite in step 10; .*checkpoint-8 is kept; begin again"
    ):
        run.run()
    assert [path.name for path in checkpoints.find_checkpoints(output / "checkpoints")] == [
        "checkpoint-8",
        "checkpoint-4",
    ]
    assert not (output / "log.json").exists()
    train(root, output, resume=True)
    assert all(entry["loss"] < 10 for entry in logged(output))


def test_without_a_checkpoint_the_error_says_so(root: Path) -> None:
    run = PoisonedRun(settings(root, root / "poisoned-first"))
    run.poison = {"step": 0, "value": float("nan"), "only_gradient": False}
    with pytest.raises(NonFiniteLossError, match=r"in step 1; .*there is no checkpoint yet"):
        run.run()
