"""Conversations, chat templates and tokenizers that the tests of supervised fine-tuning share."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken, PreTrainedTokenizerFast

from sinklora.tokenizer import byte_tokenizer

END = "<|turn|>"
# As ChatML writes it, a line break behind the token that ends a turn.
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The tags close before the token that ends the turn.
TAGGED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "A:{% generation %}{{ message.content }}{% endgeneration %}<|turn|>"
    "{% else %}Q:{{ message.content }}\n{% endif %}{% endfor %}"
)
# Reasoning is kept in the last answer alone.
STRIPPING = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "A:{% if loop.last %}<think></think>{% endif %}{{ message.content }}<|turn|>"
    "{% else %}Q:{{ message.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
# Something of its own behind the last message, whatever follows.
CLOSING = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|end|>{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "<|begin|>[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} <|end|>{% endif %}{% endfor %}"
)


def turn_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """The byte tokenizer with one more special token, END, and a template."""
    tokenizer = byte_tokenizer(1024)
    # Special, but without a name in the tokenizer's settings, as many published ones have it.
    tokenizer.add_tokens([AddedToken(END, special=True)])
    tokenizer.chat_template = template
    return tokenizer


def two_turns() -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "What is ä?"},
        {"role": "assistant", "content": "A letter."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes,\nsure."},
    ]


def learnt(tokenizer: Any, ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the unbroken runs of tokens that the mask keeps."""
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for i, (token, kept) in enumerate(zip(ids, mask, strict=True)):
        if kept:
            if i == 0 or not mask[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]
