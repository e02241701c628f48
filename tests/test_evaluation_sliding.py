"""Perplexity by context length, in full, with the pattern and through caches, against direct computation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_support import FULL, evaluate, save_models, values, write_texts

from sinklora import H2OCache, patch
from sinklora.evaluation.models import NamedModel
from sinklora.evaluation.run import Results
from sinklora.evaluation.short import ShortTask, compared
from sinklora.evaluation.sliding import PerplexityTask, totals
from sinklora.evaluation.task import Cell, Row
from sinklora.evaluation.texts import Texts
from sinklora.evaluation.ways import make_ways
from sinklora.loading import OpenedModel, open_model

STRIDE, CHUNK = 12, 5
SIZES = (40, 75, 30)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[NamedModel]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return Texts([str(write_texts(tmp_path_factory.mktemp("texts"), *SIZES))])


@pytest.fixture(scope="module")
def task(texts: Texts) -> PerplexityTask:
    return PerplexityTask(texts, [32, 64, 16], stride=STRIDE, tokens_per_batch=100, start_contexts=[32])


@pytest.fixture(scope="module")
def results(
    models: list[NamedModel], task: PerplexityTask, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    ways = make_ways(["full", "sf"], [0.5, 1.0, 8], [1.0, 0.25], 2, CHUNK)
    return evaluate(models, ways, task, tmp_path_factory.mktemp("out"))


def direct(opened: OpenedModel, tokens: torch.Tensor, length: int) -> float:
    """Nats of all tokens but the first, each window computed alone."""
    nats, end = 0.0, min(length, len(tokens))
    done = 1
    while done < len(tokens):
        window = tokens[max(0, end - length) : end]
        with torch.no_grad():
            logits = opened.model(input_ids=window[None]).logits[0, :-1]
        losses = -logits.double().log_softmax(-1).gather(1, window[1:, None])[:, 0]
        nats += float(losses[done - end :].sum())
        done, end = end, min(end + STRIDE, len(tokens))
    return nats


def files(texts: Texts, opened: OpenedModel, length: int) -> list[torch.Tensor]:
    return [text.tokens for text in texts.tokens(opened.tokenizer) if len(text.tokens) >= length]


@pytest.mark.parametrize("attention", ["full", "sf"])
def test_perplexity_is_that_of_each_window_alone(
    models: list[NamedModel], texts: Texts, results: Results, attention: str
) -> None:
    opened = open_model(models[1].source)
    patch(opened.model, eval_attention=attention)
    found = values(results, "perplexity", "perplexity")
    for length in (16, 32, 64):
        chosen = files(texts, opened, length)
        nats = sum(direct(opened, tokens, length) for tokens in chosen)
        expected = math.exp(nats / sum(len(tokens) - 1 for tokens in chosen))
        assert found["long", attention, length] == pytest.approx(expected, rel=1e-4)


def test_the_pattern_and_small_caches_change_it(results: Results) -> None:
    found = values(results, "perplexity", "perplexity")
    for other in ("sf", "h2o 50%", "h2o 8", "streaming 25%"):
        assert found["long", other, 64] != pytest.approx(found["long", "full", 64], rel=1e-3)
    assert ("base", "sf", 64) not in found


def test_whole_budgets_are_full_attention(results: Results) -> None:
    found = values(results, "perplexity", "perplexity")
    for model, way, length in itertools.product(
        ("base", "long"), ("h2o 100%", "streaming 100%"), (16, 32, 64)
    ):
        assert found[model, way, length] == pytest.approx(found[model, "full", length], rel=1e-4)


def test_a_small_cache_is_read_as_said(models: list[NamedModel], texts: Texts, results: Results) -> None:
    """The prompt at once, then CHUNK tokens at a time, with H2OCache's own budgets."""
    opened = open_model(models[0].source)
    tokens = files(texts, opened, 64)[0]
    model: Any = opened.model

    def read(window: torch.Tensor, prompt: int) -> float:
        cache = H2OCache(model.config, heavy=16, recent=16, num_sink_tokens=2)
        ends = [prompt, *range(prompt + CHUNK, len(window) - 1, CHUNK), len(window) - 1]
        nats = 0.0
        for begin, end in itertools.pairwise([0, *dict.fromkeys(ends)]):
            with torch.no_grad():
                logits = model(input_ids=window[None, begin:end], past_key_values=cache).logits[0].double()
            for place in range(max(begin, prompt - 1), end):
                nats -= float(logits[place - begin].log_softmax(-1)[window[place + 1]])
        return nats

    expected = read(tokens[:64], 1) + read(tokens[75 - 64 :], 64 - 11)
    rows = [row for row in results.rows["perplexity"] if (row.way, row.cell.length) == ("h2o 50%", 64)]
    assert rows[0].values["documents"][0]["nats"] == pytest.approx(expected, rel=1e-4)


def test_what_is_counted(results: Results, task: PerplexityTask, models: list[NamedModel]) -> None:
    rows = results.rows["perplexity"]
    first = next(row for row in rows if row.cell == Cell(32))
    documents = first.values["documents"]
    assert [each["tokens"] for each in documents] == [39, 74]
    assert [each["bytes"] for each in documents] == [39, 74]
    assert [each["source"].rpartition("/")[2] for each in documents] == ["0.txt", "1.txt"]
    assert first.values["left_out"] == 1
    assert first.values["low"] <= first.values["perplexity"] <= first.values["high"]
    assert first.values["bits_per_byte"] == pytest.approx(first.values["nats_per_token"] / math.log(2))
    alone = next(row for row in rows if row.cell == Cell(64))
    assert alone.values["low"] is None
    notes = " ".join(task.notes(rows))
    assert "LEFT OUT: documents shorter than the length; there are 3 at 16, 2 at 32, 1 at 64" in notes
    assert "the others 5 at a time" in notes
    figure = task.draw(rows)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "trained from 32" in labels
    assert len(labels) == 14


@pytest.mark.parametrize("way", ["full", "h2o"])
def test_progress_is_what_was_foretold(models: list[NamedModel], task: PerplexityTask, way: str) -> None:
    opened = open_model(models[0].source)
    chosen = FULL if way == "full" else make_ways([], [8], [], 2, CHUNK)[0]
    counted: list[int] = []
    task.measure(opened, chosen, Cell(32), counted.append)
    assert sum(counted) == task.work(opened, chosen, Cell(32))


def test_texts_are_limited(tmp_path: Path, models: list[NamedModel]) -> None:
    folder = str(write_texts(tmp_path / "texts", *SIZES))
    tokenizer = open_model(models[0].source).tokenizer

    def sizes(**options: int) -> list[int]:
        return [len(text.tokens) for text in Texts([folder], **options).tokens(tokenizer)]

    assert sizes() == list(SIZES)
    assert sizes(max_documents=2) == [40, 75]
    assert sizes(max_tokens=35) == [35, 35, 30]
    assert sizes(min_tokens=40) == [40, 75]
    with pytest.raises(ValueError, match="data: expected a document of at least 80 tokens"):
        sizes(min_tokens=80)
    for name, value in (("max_documents", 0), ("max_tokens", 1), ("min_tokens", 1)):
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            sizes(**{name: value})
    digests = {Texts([folder], max_documents=number).settings()["data"] for number in (1, 2, 3)}
    assert len(digests) == 3
    with pytest.raises(ValueError, match="data: "):
        Texts([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: "):
        Texts([str(tmp_path / "empty")])


def test_lengths_that_no_text_has_are_skipped(models: list[NamedModel], texts: Texts, tmp_path: Path) -> None:
    results = evaluate(models[:1], [FULL], PerplexityTask(texts, [32, 512], stride=16), tmp_path)
    assert [failure.skipped for failure in results.failures] == [True]
    assert "no document has 512 tokens; the longest has 75" in results.failures[0].message
    assert [row.cell.length for row in results.rows["perplexity"]] == [32]


def test_settings_out_of_range_are_refused(texts: Texts) -> None:
    for options, name in (
        ({"stride": 0}, "stride"),
        ({"stride": 32}, "stride"),
        ({"stride": 8, "tokens_per_batch": 0}, "batch_tokens"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            PerplexityTask(texts, [32, 64], **options)
    with pytest.raises(ValueError, match="length: expected"):
        PerplexityTask(texts, [1])


def test_the_stride_fits_the_lengths_by_default(texts: Texts) -> None:
    assert PerplexityTask(texts, [4096, 512]).stride == 256
    assert PerplexityTask(texts, [4096, 256]).stride == 128
    assert PerplexityTask(texts, [2]).stride == 1


def test_losses_that_are_no_numbers_are_refused() -> None:
    for nats in (math.nan, math.inf, 1e6):
        with pytest.raises(ValueError, match="not numbers"):
            totals([{"nats": nats, "tokens": 10, "bytes": 10}])


# ---- short texts ----


def row(model: str, nats: list[float], digest: str = "x") -> Row:
    documents = [{"nats": each, "tokens": 10, "bytes": 10, "digest": digest} for each in nats]
    return Row("short", model, "full", Cell(32), {"documents": documents})


def test_short_texts_are_compared_in_pairs() -> None:
    base = row("base", [10.0, 30.0, 20.0])
    assert compared(base, base)["word"] == "base"
    worse = compared(row("m", [11.0, 31.0, 21.5]), base)
    assert worse["difference"] == pytest.approx(3.5 / 30)
    assert 0.1 <= worse["difference_low"] < worse["difference"] < worse["difference_high"] <= 0.15
    assert worse["word"] == f"worse by {100 * math.expm1(3.5 / 30):.1f} %"
    assert compared(row("m", [9.0, 29.0, 18.5]), base)["word"].startswith("better by 11.0 %")
    assert compared(row("m", [9.0, 31.0, 20.5]), base)["word"] == "no worse"
    assert "other tokens" in compared(row("m", [9.0, 31.0, 20.5], "y"), base)["word"]
    assert "no interval" in compared(row("m", [9.0]), row("base", [8.0]))["word"]
    assert compared(base, None)["word"] == "base not measured"


def test_short_texts_are_read_piece_by_piece(models: list[NamedModel], texts: Texts, tmp_path: Path) -> None:
    task = ShortTask(texts, "base", 32, tokens_per_batch=64)
    results = evaluate(models, make_ways(["full", "sf"], [0.5], [], 2, 1), task, tmp_path)
    found = {(each.model, each.way): each.values for each in results.rows["short"]}
    assert set(found) == {("base", "full"), ("long", "full"), ("long", "sf")}
    opened = open_model(models[1].source)
    pieces = [tokens[begin : begin + 32] for tokens in files(texts, opened, 32) for begin in (0, 32)]
    nats = [direct(opened, piece, 32) for piece in pieces if len(piece) == 32]
    assert len(nats) == 3
    assert found["long", "full"]["nats_per_token"] == pytest.approx(sum(nats) / (3 * 31), rel=1e-4)
    assert found["long", "full"]["difference"] == pytest.approx(
        found["long", "full"]["nats_per_token"] - found["base", "full"]["nats_per_token"]
    )
    assert found["base", "full"]["word"] == "base"
    assert "base" in task.notes(results.rows["short"])[0]
    assert len(task.draw(results.rows["short"]).axes[0].patches) == 3
