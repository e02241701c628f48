"""Models that find what they are asked for, or fail in a known way, to test the retrieval tasks with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig

from sinklora.evaluation.task import Way
from sinklora.loading import OpenedModel
from sinklora.tokenizer import byte_tokenizer

CACHE = Way("reader", make_cache=lambda model, length: DynamicCache())


class Reader:
    """Answers what `find` makes of a prompt's text, a token after another, as model.generate would."""

    def __init__(self, find: Callable[[str], str], tokenizer: Any) -> None:
        self.find, self.tokenizer = find, tokenizer
        self.device, self.config = torch.device("cpu"), LlamaConfig()
        self.generation_config = GenerationConfig(eos_token_id=258)
        self.batches: list[int] = []
        self.written: list[int] = []

    def generate(
        self, input_ids: Any, attention_mask: Any, generation_config: Any, stopping_criteria: Any, **_: Any
    ) -> torch.Tensor:
        self.batches.append(len(input_ids))
        rows = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
        said = [self.tokenizer(self.find(self.tokenizer.decode(row)))["input_ids"] + [258] for row in rows]
        pad, count = generation_config.pad_token_id, [0] * len(said)
        done = torch.zeros(len(said), dtype=torch.bool)
        for step in range(generation_config.max_new_tokens):
            new = [pad if over else row[step] for row, over in zip(said, done.tolist(), strict=True)]
            count = [n + (not over) for n, over in zip(count, done.tolist(), strict=True)]
            input_ids = torch.cat([input_ids, torch.tensor(new)[:, None]], 1)
            done = done | stopping_criteria(input_ids, None) | (input_ids[:, -1] == 258)
            if done.all():
                break
        self.written += count
        return input_ids


def reader(find: Callable[[str], str]) -> OpenedModel:
    tokenizer: Any = byte_tokenizer(4096)
    model: Any = Reader(find, tokenizer)
    return OpenedModel(model, tokenizer, "reader")


def read_passkey(text: str) -> str:
    found = re.search(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", text)
    assert found
    return f" {found[1]}. And so on."


def read_needle(text: str) -> str:
    name = re.findall(r"What is the pass key of the ([a-z ]+)\?", text)[-1]
    values = re.findall(rf"The pass key of the {name} is (\d+)\.", text)
    assert len(values) == 1
    return f" {values[0]}."


def read_topics(text: str) -> list[str]:
    """All topics, in order."""
    return re.findall(r"^USER: Let us talk about ([^.]+)\.", text, re.MULTILINE)
