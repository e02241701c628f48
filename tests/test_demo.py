"""The demo's parts: text, tokenizer, table, and a very small run of the whole."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import sinklora
from sinklora.demo import run as demo
from sinklora.demo.data import Blocks, encode, library_files, read_texts, split_by_file
from sinklora.demo.report import Results, cell_texts
from sinklora.demo.settings import QUICK, DemoSettings
from sinklora.evaluation.perplexity import file_losses, perplexity
from sinklora.tokenizer import byte_tokenizer

TINY = DemoSettings(
    seed=3,
    start_context=32,
    context=128,
    group_size=32,
    start_steps=3,
    extend_steps=2,
    hidden_size=64,
    num_layers=1,
    validation_files=2,
    validation_tokens=160,
    sample_tokens=5,
    continuation_tokens=16,
    num_streams=1,
    stream_contexts=3,
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return read_texts(library_files(), min_bytes=2048)


def test_library_files_are_sources_in_a_fixed_order(tmp_path: Path) -> None:
    files = library_files()
    assert files == library_files()
    assert all(path.suffix == ".py" for path in files)
    assert not any("site-packages" in path.parts for path in files)
    with pytest.raises(ValueError, match=r"\*\.py.*found none"):
        library_files(tmp_path)


def test_split_never_shares_a_file(texts: list[str], seed: int) -> None:
    train, validation = split_by_file(texts, 24, seed)
    assert len(validation) == 24
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert (train, validation) == split_by_file(texts, 24, seed)
    assert validation != split_by_file(texts, 24, seed + 1)[1]


def test_copies_of_a_file_are_one_text(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n" * 10)
    (tmp_path / "short.py").write_text("y\n")
    (tmp_path / "old.py").write_bytes(b"# \xe9t\xe9\n" * 20)
    assert read_texts(library_files(tmp_path), min_bytes=20) == ["x = 1\n" * 10]


@pytest.mark.parametrize("number", [0, 3, -1])
def test_split_wants_a_file_on_each_side(number: int) -> None:
    with pytest.raises(ValueError, match="validation_files"):
        split_by_file(["a", "b", "c"], number, 0)


def test_blocks_do_not_cross_files() -> None:
    tokenizer = byte_tokenizer(8)
    blocks = Blocks(["abcdefghij", "ABCDEFGH", "123"], tokenizer, 4)
    rows = [tokenizer.decode(blocks[i]["input_ids"]) for i in range(len(blocks))]
    assert rows == ["abcd", "efgh", "ABCD", "EFGH"]
    assert torch.equal(blocks[1]["labels"], blocks[1]["input_ids"])
    assert len(Blocks(["abcd" * 100] * 3, tokenizer, 4, max_tokens=500)) == 200
    with pytest.raises(ValueError, match="at least 16 tokens"):
        Blocks(["short"], tokenizer, 16)


def test_tokenizer_is_bytes_and_reopens(tmp_path: Path, seed: int) -> None:
    byte_tokenizer(64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(seed)
    text = "".join(
        chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(500)
    )
    for each in (text, "\x00 a  b\r\n\t ", "", " leading", "Ġ 'll don't"):
        tokens = tokenizer(each)["input_ids"]
        assert tokens == list(each.encode())
        assert tokenizer.decode(tokens) == each
    assert encode(text, tokenizer, 10).tolist() == list(text.encode())[:10]
    assert len(tokenizer) == 259
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)


def test_table_says_none_where_full_does_not_improve() -> None:
    settings = DemoSettings()
    results = Results(settings)
    results.sliding = [torch.full((100,), 2.0), torch.full((50,), 2.0)]
    for name, loss in (("untrained", 3.0), ("full", 2.1), ("S2-Attn", 2.2), ("SF-Attn", 2.15)):
        results.tokens_per_second[name] = 1000.0
        for length in settings.lengths():
            results.scores[name, length] = [torch.full_like(losses, loss) for losses in results.sliding]
    rows = results.rows()
    assert [row.share for row in rows] == [None] * 5
    assert [cell_texts(row)[4] for row in rows] == ["-", "-", "none", "none", "none"]
    assert rows[3].above_full == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)
    for length in settings.lengths():
        results.scores["full", length] = [torch.full_like(losses, 1.8) for losses in results.sliding]
    shares = [row.share for row in results.rows()]
    assert shares[2] == 1
    expected = (math.exp(2) - math.exp(2.2)) / (math.exp(2) - math.exp(1.8))
    assert shares[3] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"context": 256}, "context"),
        ({"validation_tokens": 100}, "validation_tokens"),
        ({"hidden_size": 100}, "hidden_size"),
        ({"start_steps": 0}, "start_steps"),
        ({"group_size": 0}, "group_size"),
        ({"shifted_fraction": 2.0}, "shifted_fraction"),
        ({"seed": -1}, "seed"),
        ({"continuation_tokens": 0}, "continuation_tokens"),
        ({"num_streams": 0}, "num_streams"),
    ],
)
def test_settings_refuse(change: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DemoSettings(**change)


def test_quick_names_settings() -> None:
    assert DemoSettings(**QUICK).lengths() == [256, 512, 1024]
    assert DemoSettings(start_context=200, context=1000).lengths() == [200, 400, 800, 1000]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    output = tmp_path_factory.mktemp("demo") / "out"
    return demo.run(TINY, output), output


def test_same_start_and_same_data_for_each_attention(tmp_path: Path) -> None:
    # One group of the whole context, unshifted: SF-Attn is full attention, so nothing else may differ.
    settings = dataclasses.replace(TINY, group_size=128, shifted_fraction=0.0)
    losses = demo.run(settings, tmp_path / "out").losses
    assert losses["SF-Attn"] == pytest.approx(losses["full"], abs=1e-4)
    assert losses["full"][0] != losses["full"][1]


def test_demo_writes_results(tiny_run: tuple[Results, Path]) -> None:
    _, output = tiny_run
    found = json.loads((output / "results.json").read_text())
    assert found["settings"]["seed"] == TINY.seed
    assert [row["name"] for row in found["rows"]][2:] == ["full", "S2-Attn", "SF-Attn"]
    assert all(set(row["perplexities"]) == {"32", "64", "128"} for row in found["rows"])
    assert {name: len(losses) for name, losses in found["training_losses"].items()} == {
        "start": 3,
        "full": 2,
        "S2-Attn": 2,
        "SF-Attn": 2,
    }
    card = (output / "adapter" / "README.md").read_text()
    assert str(output / "start") in card
    assert "partial" not in card
    with (output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity_128"]) for row in rows] == [
        row["perplexities"]["128"] for row in found["rows"]
    ]
    for name in ("pattern.png", "losses.png", "start-losses.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert (output / "sample.txt").read_text(encoding="utf-8").count("===== continued =====") == 1


def test_demo_model_opens_without_flags(tiny_run: tuple[Results, Path]) -> None:
    results, output = tiny_run
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert model.config.rope_parameters["factor"] == 4
    assert model.config.sinklora["group_size"] == 32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    _, held_out = split_by_file(read_texts(library_files(), 160), 2, TINY.seed)
    files = [encode(text, tokenizer, 160) for text in held_out]
    again = perplexity(file_losses(model, files, 128, 64))
    assert again == pytest.approx(results.rows()[-1].perplexities[128], rel=1e-4)


def test_demo_adapter_opens_on_its_base(tiny_run: tuple[Results, Path]) -> None:
    _, output = tiny_run
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(output / "start")
    assert settings["ensure_weight_tying"] is True
    base = AutoModelForCausalLM.from_pretrained(output / "start")
    adapted = PeftModel.from_pretrained(base, output / "adapter").eval()
    sinklora.patch(adapted, output / "adapter")
    assert sinklora.SFPattern.from_dict(
        {key: value for key, value in base.config.sinklora.items() if key != "eval_attention"}
    ) == sinklora.SFPattern(group_size=32)
    assert base.config.rope_parameters["factor"] == 4
    merged = AutoModelForCausalLM.from_pretrained(output)
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)


def test_demo_is_the_same_again_with_the_same_seed(tiny_run: tuple[Results, Path], tmp_path: Path) -> None:
    results, _ = tiny_run
    again = demo.run(TINY, tmp_path / "again")
    assert again.losses == results.losses
    assert again.rows()[-1].perplexities == results.rows()[-1].perplexities
    assert again.sample == results.sample


@pytest.mark.parametrize("terminal", [True, False])
def test_the_sample_says_where_the_model_begins(terminal: bool) -> None:
    from rich.console import Console

    from sinklora.commands.demo import show_sample

    file = io.StringIO()
    color = "standard" if terminal else None
    console = Console(file=file, force_terminal=terminal, color_system=color, width=110)
    show_sample("a prompt", " and more", console)
    shown = file.getvalue()
    assert ("its text dim" in shown) == ("\x1b[2ma prompt" in shown) == terminal
    assert ("a prompt\n===== continued =====\n and more" in shown) == (not terminal)
