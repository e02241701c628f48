"""`sinklora evaluate` from options to files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_support import save_models, write_texts

from sinklora import cli
from sinklora.evaluation.sliding import PerplexityTask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("evaluate")
    save_models(found)
    write_texts(found / "texts", 70, 90)
    return found


@pytest.fixture(autouse=True)
def own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["evaluate", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_side_by_side_and_again(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["base", "extended=long", "--data=texts", "--length=32", "--length=64", "--stride=16"]
    command += ["--h2o=0.5", "--streaming=8", "--attention=sf", "--attention=full", "--output=out"]
    status, out, err = run(capsys, *command, "--tasks=perplexity,short", "--short-length=16")
    assert status == 0, err
    assert "extended   streaming 8" in out
    assert "perplexity 64" in out
    assert "worse by" in out or "better by" in out or "no worse" in out
    assert "SKIPPED: attention: the model carries no settings of SF-Attn" in err
    assert "17 cells measured, 0 taken from earlier calls" in err
    names = {"cells.jsonl", "results.json", "run.yaml"}
    names |= {f"{task}.{kind}" for task in ("perplexity", "short") for kind in ("csv", "png")}
    assert {path.name for path in (folder / "out").iterdir()} == names
    found = json.loads((folder / "out" / "results.json").read_text())
    assert found["configuration"]["h2o"] == [0.5]
    assert len(found["tasks"]["perplexity"]["rows"]) == 14
    with (folder / "out" / "perplexity.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["model"], first["way"], first["length"], first["depth"]) == ("base", "full", "32", "")

    def never(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(PerplexityTask, "measure", never)
    status, again, err = run(capsys, "--config=out/run.yaml", "--task=perplexity", "--output=out")
    assert (status, "0 cells measured, 14 taken" in err) == (0, True), err
    lines = [line for line in again.splitlines() if line.startswith(("  base ", "  extended "))]
    assert len(lines) == 7
    assert set(lines) < set(out.splitlines())


def test_retrieval_by_name(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    command = ["base", "--length=2048", "--repeats=1", "--depth=0.5", "--output=retrieval"]
    command += [f"--task={name}" for name in ("passkey", "needle", "topics")]
    status, out, err = run(capsys, *command, "--distractors=1")
    assert status == 0, err
    assert out.count("accuracy 2048") == 3
    assert json.loads((folder / "retrieval" / "results.json").read_text())["tasks"].keys() == {
        "passkey",
        "needle",
        "topics",
    }


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = PerplexityTask.measure

    def interrupted(self: Any, opened: Any, way: Any, cell: Any, advance: Any) -> Any:
        if cell.length == 64:
            raise KeyboardInterrupt
        return measure(self, opened, way, cell, advance)

    monkeypatch.setattr(PerplexityTask, "measure", interrupted)
    command = ["base", "--data=texts", "--length=32", "--length=64", "--stride=16", "--output=stopped"]
    status, _, err = run(capsys, *command)
    assert status == 130
    assert "1 newly measured cells are kept in stopped; the same command goes on from there" in err
    monkeypatch.setattr(PerplexityTask, "measure", measure)
    status, _, err = run(capsys, *command)
    assert (status, "1 cells measured, 1 taken" in err) == (0, True), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "'--data': expected files or folders of text, got none"),
        (["base", "--data=none"], "'--data'"),
        (["base", "base", "--data=texts"], "'MODEL': two models are named base"),
        (["base", "--data=texts", "--length=1"], "'--length': expected at least 2 tokens, got 1"),
        (["base", "--data=texts", "--length=64", "--stride=64"], "'--stride': expected from 1 to"),
        (["base", "--data=texts", "--attention=s2"], "'--attention': expected one of full, sf, got s2"),
        (["base", "--data=texts", "--h2o=2.0"], "'--h2o': expected a fraction"),
        (["base", "--data=texts", "--h2o=x"], "expected entries or a share"),
        (["base", "--data=texts", "--chunk=0"], "'--chunk': expected at least 1"),
        (["base", "--data=texts", "--batch-tokens=0"], "'--batch-tokens': expected at least 1"),
        (["base", "--data=texts", "--task=short", "--base=x"], "'--base': expected one of the models"),
        (["base", "--data=texts", "--dtype=float64"], "'--dtype': expected one of"),
        (["base", "--data=texts", "--device=tpu"], "'--device': expected auto or one that is here"),
        (["base", "--task=passkey", "--repeats=0"], "'--repeats': expected at least 1"),
        (["base", "--task=passkey", "--attention=sf"], "'--task': passkey cannot be measured with sf"),
        (["base", "--task=perplexty", "--data=texts"], "expected one of perplexity, "),
        (["base", "--task=passkey", "--data=texts"], "'--data': acts only on perplexity, short, needle"),
        (
            ["base", "--data=texts", "--limit=3"],
            "'--limit': acts only on tasks of lm-evaluation-harness",
        ),
        (["base", "--data=texts", "--sinks=2"], "'--sinks': acts only on caches"),
        (["base", "--data=texts", "--length=512"], "nothing could be measured: at 512: data: no document"),
        (["nowhere", "--data=texts"], "nothing could be measured: model: no such folder"),
        (
            ["base", "nowhere", "--data=texts", "--length=32", "--stride=8"],
            "not everything could be measured of",
        ),
        (["base", "--data=texts", "--output=texts"], "'--output': expected a new or empty folder"),
    ],
)
def test_errors_name_the_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    if not any(argument.startswith("--output") for argument in arguments):
        arguments = [*arguments, f"--output={tmp_path / 'out'}"]
    status, _, err = run(capsys, *arguments)
    assert status != 0
    last = err.strip().splitlines()[-1]
    assert last.startswith("sinklora: error: ")
    assert message in last


def test_the_configuration_beside_the_result_is_complete(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "own.yaml").write_text(
        "model: [base]\ndata: [texts]\nlength: [32]\nstride: 8\nmax-tokens: 50\n"
    )
    status, _, err = run(capsys, "--config=own.yaml", "--output=own")
    assert status == 0, err
    written = yaml.safe_load((folder / "own" / "run.yaml").read_text())
    assert (written["model"], written["length"], written["max_tokens"]) == (["base"], [32], 50)
    assert written["attention"] == ["full"]
