"""Dialogues about one topic each, to be put one after another: made up here, or from the user's files."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ASPECTS = (
    "the history", "the cost", "the future", "the care", "the design", "the science", "the names",
    "the makers", "the collectors", "the dangers", "the safe storage", "the photography",
)  # fmt: skip
_SUBJECTS = (
    "lighthouses", "violins", "bicycles", "old maps", "bridges", "beehives", "tea gardens", "canal boats",
    "glaciers", "wooden toys", "sailing ships", "mushrooms", "clock towers", "comets", "night trains",
    "pottery", "windmills", "coral reefs", "chess sets", "balloons", "orchards", "printing presses",
    "volcanoes", "telescopes", "carpets", "puppets", "hedgehogs", "stained glass", "cheese", "fountain pens",
    "mountain huts", "umbrellas", "radio sets", "apple trees", "kites", "fossils", "ice cream", "mosaics",
    "tunnels", "pianos", "street lamps", "waterfalls", "coins", "owls", "submarines", "carnivals", "bonsai",
    "compasses",
)  # fmt: skip
_ASKED = (
    "What should somebody who is new to {} know first?",
    "Why do you think that so many people care about {}?",
    "Can you tell me something surprising about {}?",
    "Which book about {} would you give to a friend?",
    "How have people's views of {} changed?",
    "What do people most often get wrong about {}?",
    "Where can I find out more about {}?",
    "What would you ask an expert on {}?",
    "How would you explain {} to a child?",
    "What is hard about {}?",
)
_BEGUN = (
    "That is a good question.",
    "I am glad that you ask.",
    "There are several answers to that.",
    "People do not agree on this.",
    "Let me think about it.",
    "It depends on what you are after.",
    "I have read about that lately.",
    "Most would begin somewhere else.",
)
_ANSWERED = (
    "With {}, patience is worth more than money, and those who look twice see what others miss.",
    "Much of what is said about {} was written by people who had never been near them.",
    "The best that one can do about {} is to find somebody who has known them for years, and listen.",
    "A small museum will teach you more about {} in an hour than a long film would.",
    "Whoever spends a winter on {} will not regret it, though the beginning is slow.",
    "There is more to {} than the pictures show, above all in the details that are easily passed over.",
    "I would begin with {} as they are today, and go back from there step by step.",
    "What matters about {} is rarely what is noticed first, and that is half of the pleasure.",
)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """topic: its name. exchanges: what the user said and what the assistant answered, in turn."""

    topic: str
    exchanges: tuple[tuple[str, str], ...]


def made_up_topics() -> list[tuple[str, str]]:
    """Names of topics and the subject that each is about; no name is a part of another."""
    return [(f"{aspect} of {subject}", subject) for aspect in _ASPECTS for subject in _SUBJECTS]


def made_up(draw: random.Random, turns: int) -> Iterator[Dialogue]:
    """Dialogues of so many exchanges on all topics there are, in a random order."""
    topics = made_up_topics()
    for topic, subject in draw.sample(topics, len(topics)):
        exchanges = []
        questions = draw.sample(_ASKED, len(_ASKED))
        for turn in range(turns):
            answer = f"{draw.choice(_BEGUN)} {draw.choice(_ANSWERED).format(subject)}"
            exchanges.append((questions[turn % len(questions)].format(subject), answer))
        yield Dialogue(topic, tuple(exchanges))


def read_dialogues(paths: Sequence[str | os.PathLike[str]]) -> list[Dialogue]:
    """Dialogues of JSON lines, as LongChat's: {"topic": name, "messages": [{"role": "user" | "assistant",
    "content": text}, ...]}, the user first, the two in turn.

    Raises:
        ValueError: a line that is not such a dialogue, a topic that comes twice, or no dialogue at all; names
            the file and the line. OSError: a file cannot be read.
    """
    found: dict[str, Dialogue] = {}
    for path in paths:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"dialogues: {path}:{number}"
                dialogue = _dialogue(line, where)
                if dialogue.topic.casefold() in found:
                    raise ValueError(f"{where}: expected each topic once, got {dialogue.topic!r} again")
                found[dialogue.topic.casefold()] = dialogue
    if not found:
        raise ValueError(f"dialogues: expected one a line in {', '.join(map(str, paths))}, found none")
    return list(found.values())


def _dialogue(line: str, where: str) -> Dialogue:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, got {line.strip()[:40]!r} ({error})") from error
    topic = value.get("topic") if isinstance(value, dict) else None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(topic, str) or not topic.strip():
        raise ValueError(f'{where}: expected "topic", the name of the topic')
    if not isinstance(messages, list) or len(messages) < 2 or len(messages) % 2:
        raise ValueError(f'{where}: expected "messages", pairs of user and assistant')
    texts = []
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or message.get("role") != role:
            raise ValueError(f'{where}: expected message {i + 1} to have "role": "{role}" and "content"')
        texts.append(content.strip())
    return Dialogue(topic.strip(), tuple(zip(texts[::2], texts[1::2], strict=True)))
