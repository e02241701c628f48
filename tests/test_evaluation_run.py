"""Evaluations: what is measured, stored, measured again and reported; interruptions and failures."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation_support import FULL, Counting, evaluate, save_models, values

from sinklora.evaluation import store as store_module
from sinklora.evaluation.models import NamedModel, carried_pattern, name_models, start_context
from sinklora.evaluation.report import table, write_results
from sinklora.evaluation.run import Interrupted
from sinklora.evaluation.store import Store
from sinklora.evaluation.task import NotMeasurableError, Way
from sinklora.evaluation.ways import make_ways

WAYS = [FULL, Way("again")]
EVERYTHING = [
    (model, way, length) for model in ("base", "long") for way in ("full", "again") for length in (8, 16)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[NamedModel]:
    return save_models(tmp_path_factory.mktemp("models"))


def test_an_interrupted_evaluation_goes_on(models: list[NamedModel], tmp_path: Path) -> None:
    def stop(number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    first = Counting(on_cell=stop)
    with pytest.raises(Interrupted, match="5 newly measured cells are kept"):
        evaluate(models, WAYS, first, tmp_path / "out")
    second = Counting()
    results = evaluate(models, WAYS, second, tmp_path / "out")
    assert first.measured + second.measured == EVERYTHING
    assert (results.measured, results.stored) == (3, 5)
    assert values(results, "counting", "number") == {where: where[2] / 3 for where in EVERYTHING}


def test_a_stored_model_is_not_opened_and_more_lengths_are_added(
    models: list[NamedModel], tmp_path: Path
) -> None:
    evaluate(models, WAYS, Counting(), tmp_path)

    def never(name: str, dtype: str) -> Any:
        raise AssertionError(f"opened {name}")

    again = evaluate(models, WAYS, Counting(), tmp_path, open_=never)
    assert (again.measured, again.stored, again.failures) == (0, 8, [])
    more = Counting(lengths=(8, 32))
    assert evaluate(models[:1], [FULL], more, tmp_path).stored == 1
    assert more.measured == [("base", "full", 32)]


@pytest.mark.parametrize("change", ["task", "way", "dtype", "weights", "config"])
def test_a_change_measures_anew(models: list[NamedModel], tmp_path: Path, change: str) -> None:
    model = NamedModel("m", str(shutil.copytree(models[0].source, tmp_path / "m")))
    evaluate([model], [FULL], Counting(), tmp_path / "out")
    task, way, options = Counting(), FULL, {}
    if change == "task":
        task = Counting(text="b")
    elif change == "way":
        way = dataclasses.replace(FULL, settings={"sinks": 1})
    elif change == "dtype":
        options = {"dtype": "bfloat16"}
    elif change == "weights":
        path = Path(model.source, "model.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path = Path(model.source, "config.json")
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    evaluate([model], [way], task, tmp_path / "out", **options)
    assert len(task.measured) == 2


def test_large_files_are_told_by_time_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinklora.evaluation import fingerprint

    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 10)
    monkeypatch.setattr(fingerprint, "END_BYTES", 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"0123456789ab")
    os.utime(path, ns=(1, 1))
    first = fingerprint.fingerprint(str(tmp_path))
    (tmp_path / "notes.md").write_text("of no matter")
    assert fingerprint.fingerprint(str(tmp_path)) == first
    os.utime(path, ns=(1, 2))
    assert fingerprint.fingerprint(str(tmp_path)) != first
    path.write_bytes(b"x123456789ab")
    os.utime(path, ns=(1, 1))
    assert fingerprint.fingerprint(str(tmp_path)) != first
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    hub = [fingerprint.fingerprint(str(tmp_path)), fingerprint.fingerprint(str(tmp_path), "abc")]
    assert hub[0] != hub[1]


def test_what_a_kill_left_half_written_is_measured_again(models: list[NamedModel], tmp_path: Path) -> None:
    evaluate(models[:1], [FULL], Counting(), tmp_path)
    path = tmp_path / store_module.FILE_NAME
    path.write_bytes(b'{"key": "x", "values": 3}\n[1]\n' + path.read_bytes()[:-20])
    task = Counting()
    assert evaluate(models[:1], [FULL], task, tmp_path).stored == 1
    assert task.measured == [("base", "full", 16)]
    assert evaluate(models[:1], [FULL], Counting(), tmp_path).stored == 2
    assert store_module.Store(tmp_path).get("x") is None


def test_a_full_disk_keeps_what_is_stored(
    models: list[NamedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(number: int) -> None:
        if number == 1:
            monkeypatch.setattr(store_module.os, "fsync", full)

    with pytest.raises(OSError, match="cannot store a measured cell: No space left"):
        evaluate(models, WAYS, Counting(on_cell=fill), tmp_path)
    monkeypatch.undo()
    lines = (tmp_path / store_module.FILE_NAME).read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["length"] for line in lines] == [8]
    assert evaluate(models, WAYS, Counting(), tmp_path).stored == 1


def test_a_model_that_fails_leaves_the_others(models: list[NamedModel], tmp_path: Path) -> None:
    broken = NamedModel("broken", str(shutil.copytree(models[0].source, tmp_path / "broken")))
    weights = Path(broken.source, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])

    remaining = [RuntimeError("out of memory\nand more")]

    def fail(number: int) -> None:
        if number == 1 and remaining:
            raise remaining.pop()

    task = Counting(on_cell=fail)
    results = evaluate([broken, *models], WAYS, task, tmp_path / "out")
    assert task.measured == [where for where in EVERYTHING if where != ("base", "full", 16)]
    told = [(failure.model, failure.way, failure.message) for failure in results.failures]
    assert told[0][:2] == ("broken", None)
    assert "header" in told[0][2]
    assert told[1:] == [("base", "full", "at 16: out of memory")]
    assert len(results.rows["counting"]) == 7


def test_what_does_not_fit_is_skipped(models: list[NamedModel], tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        raise NotMeasurableError("data: too short")

    results = evaluate(models[:1], [FULL], Counting(on_cell=refuse), tmp_path)
    assert [(failure.skipped, failure.message) for failure in results.failures] == [
        (True, "at 8: data: too short"),
        (True, "at 16: data: too short"),
    ]


def test_the_pattern_is_kept_only_where_a_model_carries_one(models: list[NamedModel], tmp_path: Path) -> None:
    class Looking(Counting):
        def measure(self, opened: Any, *arguments: Any) -> dict[str, Any]:
            return {**super().measure(opened, *arguments), "settings": dict(opened.model.config.sinklora)}

    results = evaluate(models, make_ways(["sf", "full"], [], [], 4, 1), Looking(lengths=(8,)), tmp_path)
    assert [(failure.model, failure.way, failure.skipped) for failure in results.failures] == [
        ("base", "sf", True)
    ]
    found = values(results, "counting", "settings")
    assert found["long", "sf", 8]["eval_attention"] == "sf"
    assert found["long", "sf", 8]["group_size"] == 16
    assert found["long", "full", 8]["eval_attention"] == "full"
    assert results.models["long"]["pattern"]["group_size"] == 16
    assert results.models["base"]["pattern"] is carried_pattern(models[0]) is None


def test_reports(models: list[NamedModel], tmp_path: Path) -> None:
    task = Counting()
    results = evaluate(models, WAYS, task, tmp_path)
    files = write_results(results, [task], {"seed": 7}, tmp_path)
    assert [path.name for path in files] == ["results.json", "counting.csv", "counting.png"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["configuration"] == {"seed": 7}
    assert found["models"]["base"]["start_context"] == 512
    assert found["machine"]["cpu"]
    assert [row["values"]["number"] for row in found["tasks"]["counting"]["rows"]][:2] == [8 / 3, 16 / 3]
    with (tmp_path / "counting.csv").open(newline="") as file:
        assert [float(row["number"]) for row in csv.DictReader(file)] == [8 / 3, 16 / 3] * 4
    assert (tmp_path / "counting.png").read_bytes().startswith(b"\x89PNG")
    headers, lines = table(task, results.rows["counting"])
    assert headers == ["model", "way", "number 8", "number 16"]
    assert lines[-1] == ["long", "again", "2.667", "5.333"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_outputs_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    with pytest.raises(ValueError, match=r"output: .* holds other files"):
        Store(tmp_path)
    with pytest.raises(ValueError, match="output: expected a folder, got the file"):
        Store(tmp_path / "other")


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    found = name_models([f"{tmp_path}/x/y", "short=some/where", "owner/name", f"{tmp_path}/a=b"])
    assert [model.name for model in found] == ["y", "short", "owner/name", "a=b"]
    assert found[1].source == "some/where"
    with pytest.raises(ValueError, match="two models are named y; name them"):
        name_models(["x/y/y", "z/y/y"])
    with pytest.raises(ValueError, match="at least one model"):
        name_models([])
    with pytest.raises(ValueError, match="PATH or NAME=PATH"):
        name_models(["=path"])


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "linear", "factor": 8.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 1024),
    ],
)
def test_the_context_that_a_model_began_with(tmp_path: Path, rope: dict[str, Any], expected: int) -> None:
    config = {"model_type": "llama", "max_position_embeddings": 4096, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert start_context(NamedModel("m", str(tmp_path))) == expected
    assert start_context(NamedModel("m", str(tmp_path / "none"))) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["half"], [], [], 4, 1), "attention: expected one of full, sf, got half"),
        (([], [0.0], [], 4, 1), "h2o: "),
        (([], [], [2.0], 4, 1), "streaming: .* 2.0"),
        (([], [0], [], 4, 1), "h2o: expected at least 1 entry, got 0$"),
        (([], [0.5], [], -1, 1), "sinks: "),
        (([], [0.5], [], 4, 0), "chunk: "),
    ],
)
def test_ways_refuse(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_ways(*arguments)


def test_ways_are_named_by_their_budgets() -> None:
    found = make_ways(["full", "full"], [0.2, 64], [0.125], 4, 8)
    assert [way.name for way in found] == ["full", "h2o 20%", "h2o 64", "streaming 12.5%"]
    assert [way.chunk for way in found] == [1, 8, 8, 8]
