"""Checkpoints are whole or absent, and a run goes on from them as if it had never been interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_support import logged, make_base, make_texts, settings, train, weights
from transformers import TrainerCallback

from sinklora.training import checkpoints
from sinklora.training.checkpoints import DamagedCheckpointError
from sinklora.training.continued import FinetuneRun
from sinklora.training.stopping import StoppedError

MANY = {"steps": 22, "save_every": 5, "lora_dropout": 0.1, "eval_share": 0.2, "eval_every": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder / "base")
    make_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A run that nobody interrupted."""
    train(root, root / "whole", schedule="cosine", **MANY)
    return root / "whole"


class SignalAt(TrainerCallback):
    """Sends a signal to this process in one step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Watched(FinetuneRun):
    """A run with one more callback."""

    watcher: TrainerCallback

    def trainer(self, *args: Any) -> Any:
        made = super().trainer(*args)
        made.add_callback(self.watcher)
        return made


def stopped(
    root: Path, output: Path, step: int, number: int = signal.SIGTERM, **changes: Any
) -> StoppedError:
    """Runs until a signal in a step ends it."""
    run = Watched(settings(root, output, **changes))
    run.watcher = SignalAt(step, number)
    with pytest.raises(StoppedError) as caught:
        run.run()
    return caught.value


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir() if path.is_dir())


def test_a_stopped_run_goes_on_with_the_same_losses(root: Path, whole: Path) -> None:
    """Stopped beside and on an evaluation, in the first and a later pass over the text, by both signals."""
    output = root / "stopped"
    first = stopped(root, output, 2, schedule="cosine", **MANY)
    assert (first.exit_code, "after step 3 of 22" in str(first)) == (143, True)
    assert names(output) == ["checkpoint-3"]
    second = stopped(root, output, 15, signal.SIGINT, schedule="cosine", resume=True, **MANY)
    assert (second.exit_code, names(output)) == (130, ["checkpoint-15", "checkpoint-16"])
    train(root, output, resume=True, schedule="cosine", **MANY)
    assert logged(output) == logged(whole)
    before, after = weights(whole), weights(output)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_run_killed_behind_its_last_checkpoint_only_writes_its_results(root: Path, whole: Path) -> None:
    output = root / "unwritten"
    shutil.copytree(whole, output)
    for name in ("log.json", "adapter_model.safetensors", "README.md"):
        (output / name).unlink()
    train(root, output, resume=True, schedule="cosine", **MANY)
    assert logged(output) == logged(whole)
    assert all(np.array_equal(value, weights(output)[name]) for name, value in weights(whole).items())


def test_full_fine_tuning_goes_on_too(root: Path) -> None:
    changes = {"full_finetuning": True, "lora_rank": 8, "steps": 8, "save_every": 3}
    train(root, root / "full", **changes)
    stopped(root, root / "full-stopped", 4, **changes)
    train(root, root / "full-stopped", resume=True, **changes)
    assert logged(root / "full-stopped") == logged(root / "full")
    config = json.loads((root / "full" / "config.json").read_text(encoding="utf-8"))
    assert config["use_cache"] and config["max_position_embeddings"] == 64
    assert config["sinklora"]["group_size"] == 16


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("victim", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(
    root: Path, whole: Path, victim: str, same_length: bool, caplog: pytest.LogCaptureFixture
) -> None:
    output = root / f"damaged-{victim}-{same_length}"
    shutil.copytree(whole, output)
    (output / "log.json").unlink()
    newest = output / "checkpoints" / "checkpoint-22" / victim
    content = newest.read_bytes()
    newest.write_bytes(b"\xff" * 200 + content[200:] if same_length else content[:-7])
    train(root, output, resume=True, schedule="cosine", **MANY)
    assert "passing over a damaged checkpoint" in caplog.text and victim in caplog.text
    assert logged(output) == logged(whole)
    checkpoints.check_whole(output / "checkpoints" / "checkpoint-22")


def test_without_a_whole_checkpoint_an_error_says_so(root: Path, whole: Path) -> None:
    output = root / "all-damaged"
    shutil.copytree(whole, output)
    (output / "log.json").unlink()
    for checkpoint in checkpoints.find_checkpoints(output / "checkpoints"):
        (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"resume: no whole checkpoint .*scheduler.pt: missing"):
        train(root, output, resume=True, schedule="cosine", **MANY)


def test_checks_see_lengths_headers_and_the_listing(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    made = tmp_path / ".partial" / "checkpoint-7"
    made.mkdir(parents=True)
    save_file({"x": np.ones(4, np.float32)}, made / "model.safetensors")
    with zipfile.ZipFile(made / "optimizer.pt", "w") as archive:
        archive.writestr("data", b"12345")
    place = checkpoints.commit(made, tmp_path)
    assert place == tmp_path / "checkpoint-7" and not made.exists()
    checkpoints.check_whole(place)
    good = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(b"\xff" * len(good))
    with pytest.raises(DamagedCheckpointError, match=r"model.safetensors"):
        checkpoints.check_whole(place)
    (place / "model.safetensors").write_bytes(good)
    good = (place / "optimizer.pt").read_bytes()
    (place / "optimizer.pt").write_bytes(good.replace(b"12345", b"12344"))
    with pytest.raises(DamagedCheckpointError, match=r"optimizer.pt: Bad CRC-32"):
        checkpoints.check_whole(place)
    (place / "optimizer.pt").write_bytes(good[:-1])
    with pytest.raises(DamagedCheckpointError, match=rf"optimizer.pt: expected {len(good)} bytes, got"):
        checkpoints.check_whole(place)
    for listing in ("", "[]", '{"sizes": 3}', '{"sizes": {"a": "x"}}'):
        (place / checkpoints.LISTING).write_text(listing, encoding="utf-8")
        with pytest.raises(DamagedCheckpointError):
            checkpoints.check_whole(place)
    (place / checkpoints.LISTING).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"no checkpoint.json"):
        checkpoints.check_whole(place)


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / ".partial" / "checkpoint-101").mkdir(parents=True)
    (tmp_path / ".removed-checkpoint-1").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    checkpoints.keep_newest(tmp_path, 2)
    checkpoints.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-x",
    ]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = root / "disk-full"
    commit = checkpoints.commit

    def full(written: Path, folder: Path) -> Path:
        if written.name == "checkpoint-8":
            raise OSError(28, "No space left on device")
        return commit(written, folder)

    monkeypatch.setattr(checkpoints, "commit", full)
    with pytest.raises(OSError, match=r"checkpoints: the checkpoint of step 8 .*: No space left .*--resume"):
        train(root, output)
    assert names(output) == ["checkpoint-4"]
    monkeypatch.undo()
    train(root, output, resume=True)
    assert [entry["step"] for entry in logged(output)] == list(range(1, 13))


def test_a_folder_with_a_run_is_not_written_over(root: Path, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"output: .* holds a finished run"):
        train(root, whole)
    output = root / "unfinished"
    shutil.copytree(whole, output)
    (output / "log.json").unlink()
    with pytest.raises(ValueError, match=r"output: .* holds an unfinished run; go on with it by --resume"):
        train(root, output, schedule="cosine", **MANY)
    with pytest.raises(ValueError, match="resume: no run to go on with"):
        train(root, root / "nothing", resume=True)
    other = root / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="output: expected a new or empty folder"):
        train(root, other)
    with pytest.raises(ValueError, match="output: expected a folder, got the file"):
        train(root, other / "thesis.tex")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed was 0, got 3"),
        ({"learning_rate": 0.5}, "learning-rate was 0.01, got 0.5"),
        ({"attention": "full"}, "attention was sf, got full; group-size was 16, got not given"),
        ({"accumulate": 1}, "rows of a step was 2, got 1"),
        ({"steps": 23}, "steps was 22, got 23"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    root: Path, whole: Path, changes: dict[str, Any], message: str
) -> None:
    output = root / "unfinished-too"
    if not output.exists():
        shutil.copytree(whole, output)
        (output / "log.json").unlink()
    with pytest.raises(ValueError, match=f"resume: .* begun with other settings: .*{message}"):
        train(root, output, resume=True, **{"schedule": "cosine", **MANY, **changes})


def test_batches_may_be_split_otherwise_and_texts_must_be_the_same(root: Path, whole: Path) -> None:
    output = root / "split"
    stopped(root, output, 9, schedule="cosine", **MANY)
    train(
        root, output, resume=True, schedule="cosine", batch_size=2, **{**MANY, "save_every": 7}, accumulate=1
    )
    assert [entry["step"] for entry in logged(output)] == [entry["step"] for entry in logged(whole)]
    for got, expected in zip(logged(output), logged(whole), strict=True):
        # Dropout draws other masks for two rows at once.
        assert got.get("loss", 0.0) == pytest.approx(expected.get("loss", 0.0), rel=0.05)
    changed = root / "changed"
    make_texts(changed / "texts")
    stopped(root, changed / "run", 3, data=(str(changed / "texts"),))
    make_texts(changed / "texts", words=90)
    with pytest.raises(ValueError, match=r"resume: .*tokens was"):
        train(root, changed / "run", resume=True, data=(str(changed / "texts"),))
