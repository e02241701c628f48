"""Rows of instruction data, in the forms that the field writes them in, as messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
# What ShareGPT's files and their descendants write in "from" (and some in "role").
_ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Texts of a message beside its content that templates read.
_KEPT = ("name", "reasoning_content", "thinking")
# Content that is not text: dropping it would change what the answers answer to.
_REFUSED = ("tool_calls", "function_call")
_EXPECTED = "instruction and output (Alpaca), messages or conversations (chats), or prompt and completion"


def to_messages(row: Mapping[str, Any], source: str) -> list[Message]:
    """The messages of one row of instruction data: {"role": one of ROLES, "content": text}.

    Forms, told by the row's fields (fields of None, as Parquet fills them in, count as absent):

    - `messages` or `conversations`: a list of {"role", "content"} or of ShareGPT's {"from", "value"}.
    - `prompt` and `completion`: two texts, or two lists of messages.
    - `instruction` and `output`, Alpaca's: the question is the instruction, and below it `input` where there
      is one; `history` (a list of pairs of earlier questions and answers) comes before. LongAlpaca and LongQA
      have their long context inside the instruction.

    `system` is read beside every form. Of a message, name, reasoning_content and thinking are kept too, for
    templates that read them; other fields are labels, and are left out.

    Args:
        source: where the row is from, as "file:line"; errors begin with it.

    Raises:
        ValueError: another form, an unknown role, no question or no answer, content that is not text.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{source}: expected an object with {_EXPECTED}, got {_shown(row)}")
    present = {name: value for name, value in row.items() if value is not None}
    chat = next((name for name in ("messages", "conversations") if name in present), None)
    if chat is not None:
        messages = _chat(present[chat], f"{source}: {chat}")
    elif "prompt" in present and "completion" in present:
        messages = [
            *_side(present["prompt"], "user", f"{source}: prompt"),
            *_side(present["completion"], "assistant", f"{source}: completion"),
        ]
    elif "instruction" in present and "output" in present:
        messages = _alpaca(present, source)
    else:
        raise ValueError(f"{source}: expected {_EXPECTED}; the row has {', '.join(present) or 'no fields'}")
    if present.get("system") not in (None, "") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(present["system"], f"{source}: system")})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{source}: expected at least one answer (role assistant), got {_roles(messages)}")
    return messages


def _alpaca(row: Mapping[str, Any], source: str) -> list[Message]:
    messages = []
    history = row.get("history", [])
    if not _is_list(history):
        raise ValueError(f"{source}: history: expected a list of pairs, got {_shown(history)}")
    for number, pair in enumerate(history):
        where = f"{source}: history[{number}]"
        if not _is_list(pair) or len(pair) != 2:
            raise ValueError(f"{where}: expected a question and an answer, got {_shown(pair)}")
        messages.append({"role": "user", "content": _text(pair[0], where)})
        messages.append({"role": "assistant", "content": _text(pair[1], where)})
    question = _text(row["instruction"], f"{source}: instruction")
    below = _text(row.get("input", ""), f"{source}: input")
    if below.strip():
        question = f"{question}\n\n{below}"
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row["output"], f"{source}: output")})
    return messages


def _side(value: Any, role: str, where: str) -> list[Message]:
    """A prompt or completion: a text, or messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _chat(value, where)


def _chat(value: Any, where: str) -> list[Message]:
    if not _is_list(value) or not value:
        raise ValueError(f"{where}: expected a list of messages, got {_shown(value)}")
    return [_message(each, f"{where}[{number}]") for number, each in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a message with role and content, got {_shown(value)}")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    name = value.get(role_key)
    role = _ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{where}: {role_key}: expected one of {', '.join(_ROLE_NAMES)}, got {_shown(name)}")
    for key in _REFUSED:
        if value.get(key):
            raise ValueError(
                f"{where}: {key}: expected messages of text; calls of tools cannot be trained on"
            )
    message = {"role": role, "content": _text(value.get(content_key), f"{where}: {content_key}")}
    message.update({key: value[key] for key in _KEPT if isinstance(value.get(key), str)})
    return message


def _text(value: Any, where: str) -> str:
    """A text, or the joined texts of a list of {"type": "text", "text": ...}."""
    if isinstance(value, str):
        return value
    if _is_list(value) and value and all(isinstance(part, Mapping) for part in value):
        texts = [part.get("text") for part in value if part.get("type") == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise ValueError(f"{where}: expected text, got {_shown(value)}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages)


def _shown(value: Any) -> str:
    """A value in an error: short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
