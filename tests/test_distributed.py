"""Training in two processes (gloo, on the CPU): DDP and FSDP2 train as one process does, and go on for each
other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import distributed_runs as runs  # noqa: E402
import training_support as support  # noqa: E402

import sinklora  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch with gloo to run several processes",
)
TESTS = Path(__file__).resolve().parent
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def environment() -> dict[str, str]:
    installed = str(Path(sinklora.__file__).parent.parent)
    path = os.pathsep.join([installed, str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in one process, and after them those of distributed_runs.py in two."""
    root = tmp_path_factory.mktemp("distributed")
    support.make_base(root / "base")
    support.make_base(root / "tied", tied=True)
    support.make_texts(root / "texts")
    for name, changes in (
        ("one-lora", {}),
        ("one-tied", {"model": str(root / "tied")}),
        ("one-full", {"full_finetuning": True}),
    ):
        support.train(root, root / name, **{**runs.SHARED, "accumulate": 4, **changes})
    shutil.rmtree(root / "cache")
    done = subprocess.run(
        [*LAUNCH, str(TESTS / "distributed_runs.py"), str(root)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-12000:]
    return root


def assert_same_run(first: Path, second: Path) -> None:
    """The same log and the same result, to the rounding of sums in another order."""
    for expected, got in zip(support.logged(first), support.logged(second), strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=2e-4), (expected["step"], name)
    expected_weights, weights = support.weights(first), support.weights(second)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ("one-lora", "ddp-lora"),
        ("one-lora", "fsdp2-lora"),
        ("one-tied", "fsdp2-tied"),
        ("one-full", "fsdp2-full"),
        ("one-full", "one-to-fsdp2"),
        ("one-lora", "fsdp2-to-ddp"),
    ],
)
def test_two_processes_train_as_one(root: Path, expected: str, got: str) -> None:
    assert_same_run(root / expected, root / got)


def test_fsdp2_shards_all_weights_in_all_processes(root: Path) -> None:
    assert [seen(root, rank)["sharded"] for rank in (0, 1)] == [True, True]


def test_nan_in_one_process_stops_both_and_keeps_the_checkpoint(root: Path) -> None:
    for rank in (0, 1):
        assert "NaN or infinite in step 3" in seen(root, rank)["nan"]
    assert [path.name for path in sorted((root / "nan" / "checkpoints").glob("checkpoint-*"))] == [
        "checkpoint-2"
    ]


def test_tokens_are_made_once_and_a_dry_run_writes_nothing_else(root: Path) -> None:
    assert not (root / "dry").exists()
    assert len([path for path in (root / "cache").iterdir() if path.is_dir()]) == 1


def test_two_processes_checkpoint_goes_on_in_one(root: Path) -> None:
    for name, changes in (("fsdp2-tied", {"model": str(root / "tied")}), ("ddp-lora", {})):
        folder = root / f"{name}-to-one"
        shutil.copytree(root / name / "checkpoints", folder / "checkpoints")
        shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
        support.train(root, folder, **{**runs.SHARED, "accumulate": 4, "resume": True, **changes})
        assert_same_run(root / f"one-{name.partition('-')[2]}", folder)


def test_a_sharded_runs_results_open(root: Path) -> None:
    from sinklora.loading import open_model

    tokens = torch.arange(40)[None]
    for one, sharded in (("one-lora", "fsdp2-lora"), ("one-full", "fsdp2-full")):
        logits = [open_model(str(root / name))[0](tokens).logits for name in (one, sharded)]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)


def test_sigterm_saves_once_and_the_first_process_speaks(root: Path, tmp_path: Path) -> None:
    chosen = support.settings(root, tmp_path / "run", steps=100000, save_every=100000)
    command = [*LAUNCH, "-m", "sinklora", *support.options(chosen)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        log, end = tmp_path / "run" / "log.csv", time.monotonic() + 120
        while not (log.is_file() and len(log.read_text().splitlines()) > 2) and time.monotonic() < end:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    assert errors.count("stopping after this step") == 1, errors
    assert errors.count("stopped by SIGTERM after step") == 1, errors
    assert out.count("groups of 16 tokens") == 1, out
    kept = list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert len(kept) == 1
    assert (kept[0] / "checkpoint.json").is_file()


def test_sharding_needs_several_processes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sharding: fsdp2 needs several processes, got one"):
        support.train(root, tmp_path / "run", sharding="fsdp2")


def test_shipped_files_are_what_accelerate_and_deepspeed_read() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    from sinklora.training.sharding import CONFIGS

    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    for name, kind in kinds.items():
        config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert config.distributed_type == kind
    for stage in (2, 3):
        config = json.loads((CONFIGS / f"zero{stage}.json").read_text(encoding="utf-8"))
        assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def seen(root: Path, rank: int) -> dict[str, Any]:
    return dict(json.loads((root / f"seen-{rank}.json").read_text(encoding="utf-8")))
