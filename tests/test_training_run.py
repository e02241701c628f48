"""`sinklora finetune` from end to end: what it trains, writes, says and refuses."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from training_support import CONTEXT, logged, make_base, make_texts, options, settings, train, weights

from sinklora.cli import main
from sinklora.loading import open_model
from sinklora.training.continued import FinetuneRun

RESULTS = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "log.csv", "log.json"),
    *("loss.png", "run.yaml", "sinklora.json", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder / "base")
    make_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def output(root: Path) -> Path:
    """The results of a run through the command line."""
    folder = root / "run"
    assert main(options(settings(root, folder, eval_share=0.2, eval_every=5, steps=30))) == 0
    return folder


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int) -> str:
    assert main(arguments) == status
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1] if lines else ""


def test_a_run_learns_and_writes_everything(output: Path) -> None:
    assert {path.name for path in output.iterdir()} == RESULTS
    found = json.loads((output / "log.json").read_text(encoding="utf-8"))
    assert found["finished"] and found["steps"] == 30 and found["versions"]["torch"] == torch.__version__
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.3
    held_out = {entry["step"]: entry for entry in found["log"] if "eval_loss" in entry}
    assert list(held_out) == [0, 5, 10, 15, 20, 25, 30]
    assert held_out[30]["eval_perplexity"] == pytest.approx(math.exp(held_out[30]["eval_loss"]))
    with (output / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows if row["loss"]] == losses
    last = [row for row in rows if row["loss"]][-1]
    # The last batch of a pass over the text may be smaller than the others.
    assert 27 * 2 * CONTEXT <= int(last["tokens"]) <= 30 * 2 * CONTEXT
    assert float(last["tokens_per_second"]) > 0 and int(last["memory_bytes"]) > 2**20
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_evaluation_is_of_every_token_with_full_attention(root: Path, output: Path) -> None:
    """What the run logged last, from the saved adapter, without the run's own code."""
    run = FinetuneRun(settings(root, root / "unused", eval_share=0.2))
    opened = open_model(output)
    rows = run.read(opened.tokenizer).held_out
    assert rows is not None
    losses = []
    for row in (rows[index] for index in range(len(rows))):
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), CONTEXT]
        for begin, end in itertools.pairwise(starts):
            ids, labels = row["input_ids"][None, begin:end], row["labels"][begin + 1 : end]
            with torch.no_grad():
                logits = opened.model(input_ids=ids).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
            losses += each[labels != -100].tolist()
    assert logged(output)[-1]["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_written_options_repeat_the_run(root: Path, output: Path, tmp_path: Path) -> None:
    written = yaml.safe_load((output / "run.yaml").read_text(encoding="utf-8"))
    assert (written["group-size"], written["sinks"], written["dtype"]) == (16, 4, "float32")
    assert main(["finetune", "--config", str(output / "run.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert logged(tmp_path / "again") == logged(output)


def test_the_card_says_what_was_done(root: Path, output: Path) -> None:
    card = (output / "README.md").read_text(encoding="utf-8")
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["library_name"] == "peft" and "license" not in yaml.safe_load(front)
    for said in (
        "SF-Attn, groups of 16 tokens, 4 sink tokens, 0.25 of the heads shifted",
        "linear, factor 2, up to 64 tokens (linear scaling by 2 from 32 tokens; 32 tokens become 64)",
        "LoRA of rank 4, embeddings and norms; computed in float32",
        "| learning rate | 0.01 |",
        "in 5 documents",
        "in 1 document,",
        "sinklora merge run",
        "held-out loss: ",
        f"| torch | {torch.__version__} |",
        "licence",
    ):
        assert said in text, said


def test_a_line_for_each_setting_is_shown(root: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(options(settings(root, tmp_path / "so shown", steps=2))) == 0
    shown = capsys.readouterr().out
    for said in ("of which", "attention", "SF-Attn", "% padding", "steps      2 of 2 rows", "training loss"):
        assert said in shown, said
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("  sinklora ")]
    assert [command[1] for command in commands] == ["generate", "merge"]
    assert main([*commands[0][1:], "--max-new-tokens", "2"]) == 0  # as it is shown


def test_a_dry_run_writes_only_tokens(root: Path, tmp_path: Path, capsys: Any) -> None:
    chosen = settings(root, tmp_path / "dry", cache_dir=str(tmp_path / "cache"), steps=1000)
    assert main([*options(chosen), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for said in ("1,000 of 2 rows", "tokens/s", "for 1,000 steps", "nothing was written but the tokens"):
        assert said in shown, said
    assert {path.name for path in tmp_path.iterdir() if path.name != "cache"} == set()
    assert any(path.name.startswith("tokens-") for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "full", "group_size": None},
        {"attention": "s2"},
        {"attention": "s2-torch", "packing": "joined"},
        {"packing": "cut", "gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"rope": "none", "lora_targets": ("q_proj", "v_proj"), "train_embeddings_and_norms": False},
        {"full_finetuning": True, "lora_rank": 8},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_every_way_of_training_runs(root: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = train(root, tmp_path / "run", steps=3, eval_share=0.2, **changes)
    entries = logged(tmp_path / "run")
    assert all(math.isfinite(entry["loss"]) for entry in entries if "loss" in entry)
    assert "eval_loss" in entries[-1]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert frozen <= {torch.bfloat16 if changes.get("dtype") == "bfloat16" else torch.float32}
    names = set(weights(tmp_path / "run"))
    if "lora_targets" in changes:
        assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}


def test_s2_torch_trains_as_the_kernels_s2_but_for_the_last_tokens(root: Path) -> None:
    """Rows of one sequence: the two differ by what the rolled heads of the torch form let the first tokens
    see."""
    runs = {
        attention: train(root, root / f"of-{attention}", attention=attention, packing="joined", steps=1)
        for attention in ("s2", "s2-torch")
    }
    ids = torch.randint(0, 256, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    for mode in (False, True):
        logits = [
            run.model.train(mode)(input_ids=ids, use_cache=False).logits.detach() for run in runs.values()
        ]
        close = torch.allclose(logits[0], logits[1], atol=0.05)
        assert close or mode
    runs["s2-torch"].model.train()
    with pytest.raises(NotImplementedError, match="attention s2-torch: expected rows of one sequence"):
        positions = torch.cat((torch.arange(32), torch.arange(32)))[None]
        runs["s2-torch"].model(input_ids=ids, position_ids=positions, use_cache=False)


def test_joined_rows_see_across_documents_and_others_do_not(root: Path) -> None:
    for packing, apart in (("joined", False), ("cut", True), ("whole", True)):
        run = FinetuneRun(settings(root, root / "unused", packing=packing))
        from sinklora.tokenizer import byte_tokenizer

        data = run.read(byte_tokenizer(CONTEXT))
        trainer_collate = run.collator()
        batch = trainer_collate([data.training[index] for index in range(len(data.training))])
        assert ("position_ids" in batch) == apart


def test_training_is_the_models_own_loss(root: Path) -> None:
    """The first step's loss, by hand over the same rows."""
    changes: dict[str, Any] = {"steps": 1, "accumulate": 100, "attention": "full", "packing": "joined"}
    train(root, root / "by-hand", **changes)
    run = FinetuneRun(settings(root, root / "unused", **changes))
    opened = open_model(root / "base")
    data = run.read(opened.tokenizer)
    from sinklora.finetune import extend_positions

    extend_positions(opened.model, CONTEXT)
    rows = [data.training[index] for index in range(len(data.training))]
    total, count = 0.0, 0
    for row in rows:
        labels = row["labels"][1:]
        with torch.no_grad():
            logits = opened.model(input_ids=row["input_ids"][None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        count += int((labels != -100).sum())
    assert logged(root / "by-hand")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--context", "8", "--group-size", "16"], "'--group-size': expected at most the context of 8"),
        (["--attention", "flash"], "'--attention': expected one of"),
        (["--data", "nowhere"], "'--data': "),
        (["--eval-data", "nowhere"], "'--eval-data': "),
        (["--model", "nowhere"], "'--model': no such folder"),
        (["--report-to", "tensorboard"], "'--report-to': tensorboard is not installed; run: pip install"),
        (["--report-to", "paper"], "'--report-to': expected one of"),
        (["--dtype", "float16"], "'--dtype': float16 needs a GPU"),
        (["--lora-targets", "nose"], "'--lora-targets': expected some of"),
        (["--eval-share", "0.5"], "'--eval-share': "),
        (["--resume"], "'--resume': no run to go on with"),
        (["--steps", "3", "--epochs", "1"], "'--steps': expected either it or epochs"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line_and_write_nothing(
    root: Path, tmp_path: Path, changes: list[str], message: str, capsys: Any
) -> None:
    given = options(settings(root, tmp_path / "run", steps=None))
    if "--eval-share" in changes:  # of one document: none would be left to train on
        given[given.index("--data") + 1] = str(root / "texts" / "1.txt")
    line = error_of(capsys, [*given, *changes], 2)
    assert line.startswith("sinklora: error: ") and message in line, line
    assert not (tmp_path / "run").exists()


def test_required_options_and_bad_data_are_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    assert "'--model': missing" in error_of(capsys, ["finetune"], 2)
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for bad, word in ((empty, "found none"), (latin, "expected UTF-8")):
        line = error_of(capsys, options(settings(root, tmp_path / "run", data=(str(bad),))), 2)
        assert "'--data'" in line and word in line and bad.name in line
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    chosen = settings(root, tmp_path / "file" / "run", cache_dir=str(tmp_path / "cache"))
    line = error_of(capsys, options(chosen), 2)
    assert "'--output': cannot write into" in line
    assert not (tmp_path / "cache").exists()  # said before the text is read


def test_a_config_file_may_hold_one_name_for_a_list(root: Path, tmp_path: Path) -> None:
    values = settings(root, tmp_path / "run", steps=None, epochs=1.0).as_options()
    values |= {"data": str(root / "texts" / "0.txt"), "steps": 50}
    del values["epochs"]
    config = tmp_path / "options.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    # Of a pair that excludes each other the command line wins.
    assert main(["finetune", "--config", str(config), "--epochs", "1"]) == 0
    written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert written["data"] == [str(root / "texts" / "0.txt")]
    assert written["epochs"] == 1.0 and "steps" not in written


def test_tied_embeddings_stay_tied(root: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "base", tied=True)
    trainer = train(root, tmp_path / "run", model=str(tmp_path / "base"), steps=2, save_every=1)
    inner = trainer.model.get_base_model()
    assert inner.get_output_embeddings().weight.data_ptr() == inner.get_input_embeddings().weight.data_ptr()
    (tmp_path / "run" / "log.json").unlink()
    resumed = train(
        root, tmp_path / "run", model=str(tmp_path / "base"), steps=2, save_every=1, resume=True
    ).model.get_base_model()
    assert torch.equal(resumed.get_output_embeddings().weight, inner.get_output_embeddings().weight)
