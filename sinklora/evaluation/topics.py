"""Topic retrieval: a long conversation on one topic after another, then the question for one of them.

In the manner of LongChat's topic retrieval, in words of its own. The user opens each topic by its name; how
many topics there are follows from the length of the prompt. Nothing marks the asked name but its order, so
that a model which finds a number in a heap of nonsense (passkey.py) may still fail here.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import dialogues
from .dialogues import Dialogue
from .filler import digest
from .retrieval import Question, Retrieval
from .task import Cell, NotMeasurableError, Row

TASK = (
    "Below is the record of a conversation between USER and ASSISTANT about one topic after another. USER "
    'opens each topic with the words "Let us talk about" and its name. Remember the topics and their order: '
    "at the end you will be asked for one of them. The record begins here."
)
OPENING = "Let us talk about {topic}."
QUESTION = (
    "The record ends here. What was the {order} topic that USER opened? Answer with its name alone. The "
    "{order} topic was"
)
_ORDER = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NO_WORD = re.compile(r"[^\w]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topics(Retrieval):
    """A cell for each length.

    Args:
        topic: which one is asked for, 1 is the first.
        turns: exchanges on each topic, where dialogues are made up; fewer on the last one.
        dialogues: of `read_dialogues`, each on a topic of its own, taken in a random order, whole but for the
            last one; nothing: made up here.
    """

    max_new_tokens: int = 48
    topic: int = 1
    turns: int = 6
    dialogues: Sequence[Dialogue] = dataclasses.field(default=(), repr=False)

    name = "topics"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dialogues", tuple(self.dialogues))
        most = len(self.dialogues or dialogues.made_up_topics())
        if not 1 <= self.topic <= most:
            raise ValueError(f"topic: expected from 1 to {most}, the topics there are, got {self.topic}")
        if self.turns < 1:
            raise ValueError(f"turns: expected at least 1, got {self.turns}")
        names = [normalised(each.topic) for each in self.dialogues]
        if not all(names) or len(set(names)) < len(names):
            raise ValueError("dialogues: expected topics of different names with a word in each")

    def settings(self) -> dict[str, Any]:
        texts = [text for each in self.dialogues for text in (each.topic, *sum(each.exchanges, ()))]
        return {**super().settings(), "dialogues": digest(texts)}

    def supply(self) -> int | None:
        if self.dialogues:
            return sum(len(each.exchanges) for each in self.dialogues)
        return self.turns * len(dialogues.made_up_topics())

    def ask(self, cell: Cell, draw: random.Random) -> Callable[[int], Question]:
        if self.dialogues:
            chosen: Iterator[Dialogue] = iter(draw.sample(self.dialogues, len(self.dialogues)))
        else:
            chosen = dialogues.made_up(draw, self.turns)
        order = ordinal(self.topic)
        taken: list[tuple[str, str]] = []  # a topic's name and an exchange about it

        def question(pieces: int) -> Question:
            while len(taken) < pieces:
                taken.extend(_written(next(chosen)))
            names = list(dict.fromkeys(name for name, _ in taken[:pieces]))
            lines = [TASK, *(text for _, text in taken[:pieces]), QUESTION.format(order=order)]
            expected = names[self.topic - 1] if self.topic <= len(names) else ""
            others = tuple(name for name in names if name != expected)
            return Question("\n".join(lines), expected, others)

        return question

    def check(self, question: Question, cell: Cell) -> None:
        if not question.expected or not question.others:
            raise NotMeasurableError(
                f"lengths: expected room for {max(2, self.topic)} topics at least, got {cell.length} tokens, "
                f"which hold {len(question.others) + bool(question.expected)}"
            )

    def said(self, answer: str, question: Question) -> str | None:
        """The topic of the conversation that the answer names first; of two at one place the longer name."""
        text = f" {normalised(answer)} "
        places = [
            (text.find(f" {normalised(name)} "), name) for name in (question.expected, *question.others)
        ]
        found = [(place, -len(name), name) for place, name in places if place >= 0]
        return min(found)[2] if found else None

    def is_complete(self, answer: str) -> bool:
        return "\n" in answer.lstrip()

    def notes(self, rows: Sequence[Row]) -> list[str]:
        confused = sum(int(row.values["confused"]) for row in rows)
        return [
            f"topics: share of {self.repeats} conversations whose {ordinal(self.topic)} topic is the first "
            f"that the answer names; {confused} answers named another one"
        ]


def normalised(text: str) -> str:
    """Words in lower case with a space between."""
    return _NO_WORD.sub(" ", text.casefold()).strip()


def ordinal(number: int) -> str:
    """first, second, ..., tenth, 11th, ..."""
    if number <= len(_ORDER):
        return _ORDER[number - 1]
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _written(dialogue: Dialogue) -> list[tuple[str, str]]:
    """The dialogue's exchanges as they stand in the record, each with the topic's name."""
    found = []
    for i, (asked, answered) in enumerate(dialogue.exchanges):
        opening = f"{OPENING.format(topic=dialogue.topic)} " if i == 0 else ""
        found.append((dialogue.topic, f"USER: {opening}{asked}\nASSISTANT: {answered}"))
    return found
