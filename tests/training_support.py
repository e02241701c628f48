"""A tiny model and texts for the tests of training runs, and what they compare of a run's log."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinklora.tokenizer import byte_tokenizer
from sinklora.training.continued import FinetuneRun
from sinklora.training.settings import FinetuneSettings

CONTEXT = 64
WORDS = ("stew", "fire", "seven", "geese", "yard", "winter", "before", "a", "pan", "of", "on", "the")


def make_base(folder: Path, *, tied: bool = False) -> Path:
    """A LLaMA of two layers at half the tests' context, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(CONTEXT // 2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT // 2,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_texts(folder: Path, count: int = 6, words: int = 80) -> Path:
    """A folder of text files of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    for number in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(words + 10 * number))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def settings(root: Path, output: Path, **changes: Any) -> FinetuneSettings:
    """Settings of a short run on root/base and root/texts."""
    values: dict[str, Any] = {
        "model": str(root / "base"),
        "data": (str(root / "texts"),),
        "context": CONTEXT,
        "output": str(output),
        "cache_dir": str(root / "cache"),
        "steps": 12,
        "accumulate": 2,
        "save_every": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "threads": 1,
    }
    if not changes.get("full_finetuning"):
        values["lora_rank"] = 4
    return FinetuneSettings(**{**values, **changes})


def train(root: Path, output: Path, **changes: Any) -> Any:
    """The trainer of a whole run."""
    return FinetuneRun(settings(root, output, **changes)).run()


def options(chosen: FinetuneSettings) -> list[str]:
    """The settings as arguments of the command line."""
    found = ["finetune"]
    for name, value in chosen.as_options().items():
        if isinstance(value, bool):
            if name == "train-embeddings-and-norms":
                found.append(f"--{'' if value else 'no-'}{name}")
            elif value:
                found.append(f"--{name}")
        else:
            for each in value if isinstance(value, list) else [value]:
                found += [f"--{name}", str(each)]
    return found


def logged(output: Path) -> list[dict[str, float]]:
    """What must repeat exactly of a finished run's log."""
    names = ("step", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss", "eval_perplexity")
    entries = json.loads((output / "log.json").read_text(encoding="utf-8"))["log"]
    return [{name: entry[name] for name in names if name in entry} for entry in entries]


def weights(output: Path) -> dict[str, Any]:
    """The saved weights by name, NumPy arrays."""
    from safetensors.numpy import load_file

    name = "adapter_model.safetensors" if (output / "adapter_config.json").is_file() else "model.safetensors"
    return dict(load_file(output / name))
