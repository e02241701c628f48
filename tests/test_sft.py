"""`sinklora sft`: packed conversations train as they do alone; a run goes from rows to its results."""

from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from instruction_support import CHATML, STRIPPING, learnt, turn_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from sinklora import SFPattern, patch
from sinklora.cli import main
from sinklora.data.instruction_store import tokenize_instructions
from sinklora.data.overlong import POLICIES
from sinklora.data.templates import PLAIN_HEADER
from sinklora.training.instruct import SftRun, training_template
from sinklora.training.instruct_rows import ConversationRows
from sinklora.training.instruct_settings import OVERLONG, SftSettings

CONTEXT = 256
PATTERN = SFPattern(group_size=32, num_sink_tokens=2, shifted_fraction=0.5)


def write_rows(path: Path, count: int = 12) -> Path:
    rows = [
        {"instruction": f"Say {i}." + " more" * (i * 5 % 37), "output": f"It is {i}." + " Yes." * (i % 3)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model: a tiny LLaMA and its tokenizer. rows.jsonl: rows; one is longer than CONTEXT."""
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    tokenizer = turn_tokenizer(CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with write_rows(folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "long " * 80, "output": "Long."}) + "\n")
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> ConversationRows:
    store, _ = tokenize_instructions(
        [str(folder / "rows.jsonl")], turn_tokenizer(CHATML), folder / "cache", context=CONTEXT
    )
    return ConversationRows(store, CONTEXT)


def settings(folder: Path, output: str, **options: Any) -> SftSettings:
    common = {
        "model": str(folder / "model"),
        "data": (str(folder / "rows.jsonl"),),
        "output": str(folder / output),
        "cache_dir": str(folder / "cache"),
        "context": CONTEXT,
        "group_size": 32,
        "accumulate": 1,
        "steps": 4,
        "save_every": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lora_dropout": 0.1,
    }
    return SftSettings(**{**common, **options})


# ---- rows ----


def test_rows_have_every_conversation_once_and_whole(rows: ConversationRows) -> None:
    assert len(rows) < rows.num_pieces == len(rows.store)
    found = []
    for i in range(len(rows)):
        item = rows[i]
        assert sum(item["seq_lengths"]) == len(item["input_ids"]) == len(item["labels"]) <= CONTEXT
        found += [part.tolist() for part in np.split(item["input_ids"], np.cumsum(item["seq_lengths"])[:-1])]
        kept = item["labels"] != -100
        assert (item["labels"][kept] == item["input_ids"][kept]).all()
    assert sorted(found) == sorted(rows.store[i].tolist() for i in range(len(rows.store)))
    alone = ConversationRows(rows.store, CONTEXT, packed=False)
    assert len(alone) == len(rows.store)
    assert all(len(alone[i]["seq_lengths"]) == 1 for i in range(len(alone)))
    assert rows.as_dataset()[0].keys() == {"input_ids", "labels", "seq_lengths"}


def test_rows_refuse_what_would_be_cut(rows: ConversationRows) -> None:
    with pytest.raises(ValueError, match="expected conversations of at most 100 tokens, got 25"):
        ConversationRows(rows.store, 100)
    with pytest.raises(IndexError):
        rows[len(rows)]


# ---- packing ----


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return patch(model, PATTERN).train()


def trainer_of(model: Any, rows: ConversationRows, output: Path, **options: Any) -> Any:
    from trl.trainer.sft_config import SFTConfig

    from sinklora.training.instruct_trainer import SftTrainer

    arguments = SFTConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    return SftTrainer(
        model=model, args=arguments, train_dataset=rows.as_dataset(), processing_class=turn_tokenizer(CHATML)
    )


def token_losses(trainer: Any, items: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token of a collated batch, and which of them are labels."""
    batch = trainer.data_collator(items)
    output = trainer.model(**batch, use_cache=False, fused_lm_head=True)
    return -output.log_probs.detach(), output.label_mask


def test_packed_losses_are_those_of_the_conversations_alone(
    model: Any, rows: ConversationRows, tmp_path: Path
) -> None:
    packed = trainer_of(model, rows, tmp_path, padding_free=True)
    alone = ConversationRows(rows.store, CONTEXT, packed=False)
    padded = trainer_of(model, alone, tmp_path, padding_free=False)
    sums = []
    for trainer, data, size in ((packed, rows, 2), (padded, alone, 3)):
        losses = [
            token_losses(trainer, [data[i] for i in range(b, min(b + size, len(data)))])
            for b in range(0, len(data), size)
        ]
        sums.append(
            (sum(float(loss.sum()) for loss, _ in losses), sum(int(mask.sum()) for _, mask in losses))
        )
    assert sums[0][1] == sums[1][1] == rows.num_labels
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-5)
    # The trainer's own loss is their mean, token by token.
    batch = packed.data_collator([rows[0], rows[1]])
    losses, mask = token_losses(packed, [rows[0], rows[1]])
    assert packed.compute_loss(model, batch).item() == pytest.approx(
        float(losses.sum() / mask.sum()), rel=1e-6
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_conversation_sees_another(model: Any, rows: ConversationRows, tmp_path: Path, mode: str) -> None:
    trainer = trainer_of(model, rows, tmp_path, padding_free=True)
    item = next(rows[i] for i in range(len(rows)) if len(rows[i]["seq_lengths"]) >= 3)
    model.train(mode == "train")
    try:
        everywhere = {**item, "labels": item["input_ids"]}
        before, mask = token_losses(trainer, [everywhere])
        begin, end = np.cumsum([0, *item["seq_lengths"]])[1:3]
        changed = item["input_ids"].copy()
        changed[begin:end] = changed[begin:end][::-1]
        after, _ = token_losses(trainer, [{**everywhere, "input_ids": changed, "labels": changed}])
    finally:
        model.train()
    same = (before == after)[0]
    # A label's loss stands where it is predicted from; a conversation's last token predicts nothing.
    assert bool(same[: begin - 1].all()) and bool(same[end:].all())
    assert not bool(same[begin : end - 1].any())
    assert not bool(mask[0, [begin - 1, end - 1]].any())


def test_trl_does_not_warn_of_what_is_taken_care_of(
    model: Any, rows: ConversationRows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer_of(model, rows, tmp_path, padding_free=True, per_device_train_batch_size=1)
    assert not [record for record in caplog.records if record.name.startswith("trl")]


# ---- runs ----


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_from_rows_to_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sinklora.loading import open_model

    (folder / "template.jinja").write_text(CHATML + "{# mine #}", encoding="utf-8")
    given = [
        *("--model", folder / "model", "--data", folder / "rows.jsonl", "--output", folder / "command"),
        *("--cache-dir", folder / "cache", "--context", CONTEXT, "--group-size", 32, "--epochs", 4),
        *(
            "--accumulate",
            2,
            "--learning-rate",
            0.03,
            "--warmup-steps",
            0,
            "--eval-share",
            0.2,
            "--eval-every",
            3,
        ),
        *("--chat-template", folder / "template.jinja", "--system", "Be kind."),
    ]
    assert main(["sft", *map(str, given)]) == 0
    output = folder / "command"
    names = {path.name for path in output.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "sinklora.json"}
    assert names >= {"run.yaml", "log.csv", "log.json", "loss.png", "truncation.json", "checkpoints"}
    shown = capsys.readouterr().out
    assert re.search(r"text +[\d,]+ tokens in \d+ conversations; the loss is on \d+ tokens of answers", shown)
    assert "truncated  shortened: 1 of 13 rows, those longer than 256 tokens" in shown
    assert "shortened: 1 of 13 rows" in (output / "README.md").read_text()
    report = json.loads((output / "truncation.json").read_text())["data"]
    assert (report["rows"], report["conversations"], report["shortened"]["rows"]) == (13, 13, 1)
    assert AutoTokenizer.from_pretrained(output).chat_template == CHATML + "{# mine #}"
    evaluated = [float(line["eval_loss"]) for line in log_of(output) if line["eval_loss"]]
    assert evaluated[-1] < evaluated[0] - 0.5
    opened = open_model(output)
    question = [{"role": "user", "content": "Say 1."}]
    asked = opened.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    assert opened.model.generate(**asked, max_new_tokens=4).shape[1] > asked["input_ids"].shape[1]
    # The options are written so that --config takes them.
    options = yaml.safe_load((output / "run.yaml").read_text())
    assert options["system"] == "Be kind." and "text-field" not in options
    assert main(["sft", "--config", str(output / "run.yaml")]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--output", folder / "dry"]
    given += ["--cache-dir", folder / "cache", "--context", CONTEXT, "--epochs", 2, "--dry-run"]
    assert main(["sft", *map(str, given)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"speed +[\d,]+ tokens/s", shown) and "A dry run" in shown
    assert not (folder / "dry").exists()


class Kill(TrainerCallback):
    """Ends the process, as far as the run can tell, in the middle of a step's work."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError("killed")


class KilledRun(SftRun):
    def trainer(self, *args: Any, **kwargs: Any) -> Any:
        trainer = super().trainer(*args, **kwargs)
        trainer.add_callback(Kill(3))
        return trainer


def test_a_resumed_run_has_the_losses_of_an_unbroken_one(folder: Path) -> None:
    SftRun(settings(folder, "whole", batch_size=2)).run()
    with pytest.raises(InterruptedError):
        KilledRun(settings(folder, "killed", batch_size=2)).run()
    SftRun(settings(folder, "killed", batch_size=2, resume=True)).run()
    whole, resumed = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in log_of(folder / kind)]
        for kind in ("whole", "killed")
    )
    assert len(whole) == 4
    assert whole == resumed


def test_full_fine_tuning_of_a_model_without_a_template(folder: Path) -> None:
    tokenizer = turn_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    options = {
        "model": str(folder / "plain"),
        "full_finetuning": True,
        "lora_dropout": 0.0,
        "attention": "full",
        "group_size": None,
        "no_packing": True,
        "batch_size": 3,
        "steps": 1,
    }
    run = SftRun(settings(folder, "full", **options))
    trainer = run.run()
    item = trainer.train_dataset[0]
    assert len(item["seq_lengths"]) == 1
    texts = learnt(tokenizer, item["input_ids"].tolist(), (item["labels"] != -100).tolist())
    assert texts and all(text.endswith("<|end|>") and "Instruction" not in text for text in texts)
    assert (folder / "full" / "model.safetensors").is_file()
    # The model is asked as it was taught, by what knows nothing of Alpaca's wording.
    asked: Any = AutoTokenizer.from_pretrained(folder / "full").apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == f"{PLAIN_HEADER}\n\n### Instruction:\nWhy?\n\n### Response:"


def test_trained_weights_stay_float32_beside_quantised_ones(
    model: Any, rows: ConversationRows, tmp_path: Path
) -> None:
    model.is_loaded_in_4bit = True
    try:
        trainer = trainer_of(model, rows, tmp_path)
    finally:
        del model.is_loaded_in_4bit
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# ---- templates, and what is refused ----


def test_the_policies_of_the_option_are_those_of_the_data() -> None:
    assert OVERLONG == POLICIES


def test_a_template_that_rewrites_history_gives_way_to_trls(caplog: pytest.LogCaptureFixture) -> None:
    from trl import chat_template_utils

    tokenizer = turn_tokenizer(chat_template_utils.qwen3_chat_template)
    assert training_template(tokenizer, None) == chat_template_utils.qwen3_training_chat_template
    assert "TRL's form of it for training" in caplog.text
    assert training_template(tokenizer, CHATML) == CHATML
    assert training_template(turn_tokenizer(CHATML), None) == CHATML
    assert training_template(turn_tokenizer(), None) is None
    caplog.clear()
    assert training_template(turn_tokenizer(STRIPPING), None) == STRIPPING
    assert "rows of several answers will be refused" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overlong", "cut"], "'--overlong': expected one of shorten, drop, error, got cut"),
        (["--overlong", "error"], r"'--overlong': .*rows.jsonl:13: expected at most 256 tokens, got 4"),
        (["--attention", "s2-torch"], "'--attention': expected one of sf, s2, full, got s2-torch"),
        (["--chat-template", "nowhere.jinja"], "'--chat-template': cannot read nowhere.jinja: No such file"),
        (["--data", "BAD"], "'--data': .*bad.jsonl:2: expected instruction and output"),
        (["--data", "NONE"], "'--data': .*none.jsonl"),
        (["--text-field", "x"], "No such option"),
        (["--group-size", "512"], "'--group-size': expected at most the context of 256 tokens, got 512"),
    ],
)
def test_bad_options_are_named(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.jsonl").write_text(
        '{"instruction": "a", "output": "b"}\n{"text": "c"}\n', encoding="utf-8"
    )
    (folder / "none.jsonl").write_text("", encoding="utf-8")
    files = {"BAD": str(folder / "bad.jsonl"), "NONE": str(folder / "none.jsonl")}
    given = ["--model", str(folder / "model"), "--output", str(folder / "never"), "--context", str(CONTEXT)]
    given += ["--cache-dir", str(folder / "cache"), *(files.get(option, option) for option in options)]
    if "--data" not in options:
        given += ["--data", str(folder / "rows.jsonl")]
    assert main(["sft", *given]) in (1, 2)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (folder / "never").exists()
