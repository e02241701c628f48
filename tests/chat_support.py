"""A tiny LLaMA over bytes, saved as a user's model would be, and templates for dialogues with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_support import tiny

from sinklora.generation.settings import CacheSettings, Sampling
from sinklora.loading import OpenedModel, open_model
from sinklora.tokenizer import byte_tokenizer

CONTEXT = 512
FULL = CacheSettings(heavy=4096, recent=4096)
EVERYTHING = CacheSettings(full=True)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates of models that think aloud do: earlier answers lose a part.
REWRITING = CHATML.replace(
    "message.content | trim", "message.content[:3] if message.role == 'assistant' else 'x'"
)
NO_SYSTEM = "{{ raise_exception('no such role here') if messages[0].role == 'system' }}" + CHATML


def save_model(folder: Path, **changes: Any) -> Path:
    """Writes the model, with random weights that are always the same, and its tokenizer."""
    sizes = {"vocab_size": 259, "max_position_embeddings": CONTEXT, "initializer_range": 0.3}
    special = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    tiny("Llama", **{**sizes, **special, **changes}).save_pretrained(folder)
    byte_tokenizer(CONTEXT).save_pretrained(folder)
    return folder


def opened(folder: Path, chat_template: str | None = None) -> OpenedModel:
    """The saved model, with another chat template."""
    found = open_model(folder)
    found.tokenizer.chat_template = chat_template
    return found


def greedy(count: int, **changes: Any) -> Sampling:
    return Sampling(max_new_tokens=count, temperature=0.0, **changes)


# White space around the answers, as LLaMA-2's own template has it.
SPACED = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content | trim }} </s>{% endif %}{% endfor %}"
)
