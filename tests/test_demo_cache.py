"""The demo's section on caches: what it computes and writes, on a very small model."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sinklora
from sinklora.demo import caches as demo_cache
from sinklora.demo.cache_report import METHODS, CacheResults, write_cache_results
from sinklora.demo.settings import DemoSettings
from sinklora.evaluation.continuation import continuation_losses

SETTINGS = DemoSettings(
    start_context=32,
    context=64,
    validation_tokens=64,
    continuation_tokens=16,
    num_streams=2,
    stream_contexts=3,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return sinklora.patch(LlamaForCausalLM(config).eval(), sinklora.SFPattern(group_size=16))


@pytest.fixture(scope="module")
def results(model: LlamaForCausalLM) -> CacheResults:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(32, (3, 64), generator=generator)
    streams = torch.randint(32, (2, 192), generator=generator)
    counted: list[int] = []
    found = demo_cache.compare_caches(model, texts, streams, SETTINGS, counted.append)
    assert sum(counted) == demo_cache.forward_tokens(texts, streams)
    return found


def test_the_whole_budget_is_full_attention(model: LlamaForCausalLM, results: CacheResults) -> None:
    texts = torch.randint(32, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=texts).logits[:, 47:-1]
    losses = -logits.log_softmax(-1).gather(2, texts[:, 48:, None])
    whole = [row.perplexity for row in results.rows if row.budget == 1.0]
    assert whole == pytest.approx([math.exp(losses.double().mean())] * 3, rel=1e-4)
    small = [row.perplexity for row in results.rows if row.budget == 0.05]
    assert len({f"{value:.6f}" for value in [*small, whole[0]]}) == 4


def test_budgets_are_what_the_caches_hold(model: LlamaForCausalLM, results: CacheResults) -> None:
    assert [row.entries for row in results.rows if row.method == "H2O"] == [64, 32, 12, 6, 6]
    texts = torch.randint(32, (1, 40))
    for method in METHODS:
        cache = demo_cache.make_cache(method, model.config, 12)
        continuation_losses(model, texts, 30, cache)
        kept = cache.kept_positions(1)[0, 0].tolist()
        assert len(kept) == 12
        newest = {"H2O": 6, "recent only": 12, "StreamingLLM": 8}[method]
        assert kept[-newest:] == list(range(39 - newest, 39))
        assert method != "StreamingLLM" or kept[:4] == [0, 1, 2, 3]
    memory = [row.cache_bytes for row in results.rows if row.method == "H2O"]
    assert memory[0] > memory[1] > memory[2] > memory[3]


def test_streams_go_far_beyond_the_context(results: CacheResults) -> None:
    assert list(results.streams) == list(demo_cache.STREAMS)
    assert all(list(points) == [64, 128, 192] for points in results.streams.values())


def test_stretches_end_at_multiples() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0, 5.0, 9.0]])
    found = demo_cache.stretches(losses, 1, 3)
    assert found == {3: pytest.approx(math.exp(1.5)), 6: pytest.approx(math.exp(17 / 3))}
    assert list(demo_cache.stretches(losses, 2, 3)) == [3, 6]


def test_the_picture_shows_recent_and_heavy(model: LlamaForCausalLM) -> None:
    figure = demo_cache.draw_kept(model, torch.arange(64)[None] % 32)
    axes = figure.axes[0]
    assert axes.get_xlim() == (0, 64) and axes.get_ylim() == (64, 32)
    (mesh,) = axes.collections
    last = np.asarray(mesh.get_array())[-1]
    # 12 entries of each head, the newest 6 of all heads.
    assert (last[-6:] == 1).all() and last.sum() == pytest.approx(12)


def test_files(results: CacheResults, tmp_path: Path) -> None:
    write_cache_results(results, tmp_path)
    for name in ("caches.png", "stream.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "caches.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in rows] == [row.perplexity for row in results.rows]
    json.dumps(dataclasses.asdict(results))


def test_table(results: CacheResults) -> None:
    lines = results.lines()
    assert [line[0] for line in lines] == ["100%", "50%", "20%", "10%", "5%"]
    assert all(len(line) == len(results.headers()) for line in lines)
    notes = results.notes()
    assert all(any(name in note for note in notes) for name in demo_cache.STREAMS)
    for smallest, said in ((1.0, True), (9.0, False)):
        rows = [
            dataclasses.replace(row, perplexity=8.0 if row.budget == 1.0 else smallest)
            for row in results.rows
        ]
        assert any("far away" in n for n in dataclasses.replace(results, rows=rows).notes()) is said
