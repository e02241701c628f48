"""Tasks of lm-evaluation-harness, with a stand-in for the package that does what it is asked for."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_support import FULL, evaluate, save_models, values
from transformers import AutoTokenizer

from sinklora.evaluation import harness
from sinklora.evaluation.models import NamedModel
from sinklora.evaluation.ways import make_ways
from sinklora.extras import MissingExtraError

PROMPT = torch.arange(40)[None]


class StandInLM:
    """Generates and scores as lm_eval's HFLM does it, and keeps what it was made with."""

    def __init__(self, pretrained: Any, tokenizer: Any, max_length: int, batch_size: int) -> None:
        self.model, self.tokenizer = pretrained, tokenizer
        self.max_length, self.batch_size = max_length, batch_size

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        return self.model.generate(
            input_ids=context, max_length=max_length, do_sample=False, eos_token_id=None, **options
        )

    def _model_call(self, inputs: Any) -> Any:
        return self.model(inputs).logits


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The calls of simple_evaluate."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        given = dict(options["task_manager"].metadata)
        tokenizer = AutoTokenizer.from_pretrained(given["tokenizer"])
        calls.append({"model": model, "tasks": tasks, "vocabulary": len(tokenizer), **options, **given})
        if tasks == ["gone"]:
            raise ConnectionError("Couldn't reach 'owner/data' on the Hub\nand more")
        if tasks == ["scored"]:
            model._model_call(PROMPT)
            return {"results": {"scored": {"alias": "scored", "acc,none": 0.25, "acc_stderr,none": 0.5}}}
        out = model._model_generate(PROMPT, max_length=44, stop=[])
        numbers = {"4096,none": -1, f"{model.max_length},none": float(out[0, -1])}
        return {
            "results": {"ruler": {"9,none": 3}, "one": {"alias": "one", **numbers}, "two": {**numbers}},
            "group_subtasks": {"ruler": ["one", "two"], "one": []},
        }

    names = ["ruler", "gone", "scored"]
    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {
            "TaskManager": lambda metadata: types.SimpleNamespace(all_tasks=names, metadata=metadata)
        },
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": StandInLM},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(metadata, "version", lambda name: "0.0")
    harness.task_manager.cache_clear()
    yield calls
    harness.task_manager.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NamedModel:
    return save_models(tmp_path_factory.mktemp("models"))[0]


def test_groups_are_the_mean_of_their_tasks(
    model: NamedModel, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    task = harness.HarnessTask("ruler", [128, 64], limit=3, seed=5, tokens_per_batch=130)
    ways = make_ways(["full"], [0.25, 1.0], [], 2, 1)
    results = evaluate([model], ways, task, tmp_path)
    assert results.failures == []
    assert [call["model"].max_length for call in asked] == [64, 128] * 3
    assert [call["model"].batch_size for call in asked[:2]] == [2, 1]
    assert [call["max_seq_lengths"] for call in asked[:2]] == [[64], [128]]
    assert (asked[0]["limit"], asked[0]["random_seed"], asked[0]["vocabulary"]) == (3, 5, 259)
    assert values(results, "ruler", "num_tasks")["base", "full", 64] == 2
    scores = values(results, "ruler", "score")
    assert scores["base", "full", 64] == scores["base", "h2o 100%", 64]
    assert results.rows["ruler"][0].values["metrics"]["one"] == {"64": scores["base", "full", 64]}
    assert "3 questions of each" in task.notes(results.rows["ruler"])[0]
    assert task.draw(results.rows["ruler"]).axes


def test_generation_goes_through_the_cache(model: NamedModel, asked: list[dict[str, Any]]) -> None:
    from sinklora.loading import open_model

    opened = open_model(model.source)
    made: list[Any] = []
    way = make_ways([], [8], [], 2, 1)[0]

    def make_cache(config: Any, length: int) -> Any:
        assert way.make_cache is not None
        made.append(way.make_cache(config, length))
        return made[-1]

    lm = harness.make_lm(opened, type(way)("h2o", make_cache=make_cache), 64, 1)
    lm._model_generate(PROMPT, max_length=44, stop=[])
    assert made[0].kept_positions(0).shape[-1] == 10


def test_scored_answers_are_refused_through_a_cache(
    model: NamedModel, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    task = harness.HarnessTask("scored", [64])
    results = evaluate([model], make_ways(["full"], [0.5], [], 2, 1), task, tmp_path)
    assert values(results, "scored", "score") == {("base", "full", 64): 0.25}
    assert values(results, "scored", "metric") == {("base", "full", 64): "acc"}
    assert [(failure.way, failure.skipped) for failure in results.failures] == [("h2o 50%", True)]


def test_missing_data_is_told(model: NamedModel, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    results = evaluate([model], [FULL], harness.HarnessTask("gone", [64]), tmp_path)
    assert len(results.failures) == 1
    assert "gone: its data cannot be loaded: Couldn't reach 'owner/data' on the Hub (" in (
        results.failures[0].message
    )


def test_scores_that_are_no_numbers_are_left_out() -> None:
    found = {"a": {"f1,none": float("nan"), "em,none": 0.5}, "b": {"em,none": float("nan")}}
    assert harness.scores({"results": found}, 64)["metrics"] == {"a": {"em": 0.5}}
    with pytest.raises(ValueError, match="gave no number"):
        harness.scores({"results": {"b": found["b"]}}, 64)


def test_unknown_tasks_and_a_missing_package(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"task: expected one of a, b or of lm-evaluation-harness .*, got rular"
    ):
        harness.HarnessTask("rular", [64], known=["a", "b"])
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        harness.HarnessTask("ruler", [64], limit=0)
    monkeypatch.setattr(harness, "MODULE", "no_such_module")
    with pytest.raises(
        MissingExtraError, match=r"task: expected one of a, b, got ruler; .* pip install lm-eval"
    ):
        harness.HarnessTask("ruler", [64], known=["a", "b"])
