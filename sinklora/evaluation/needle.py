"""A needle among others like it: many pass keys stand in a text, one of them is asked for by its name.

A model that finds whatever number stands out in a text of another kind, which passkey.py asks for, fails
here. Each prompt says what is to come, then the text with the sentences in it, then the question, whose last
words begin the answer. The sentences are all alike but for name and value; half of the names or so share a
word with the asked one (the red door, the red gate).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import filler
from .passkey import first_number, has_whole_number
from .retrieval import DEPTHS, Question, Retrieval, checked_depths, grid
from .task import Cell, Row

TASK = (
    "Pass keys of several things are hidden in the text below. Read it and remember all of them: at the end "
    "you will be asked for one."
)
NEEDLE = "The pass key of the {name} is {key}. "
QUESTION = "What is the pass key of the {name}? The pass key of the {name} is"

COLOURS = (
    "red", "blue", "green", "yellow", "white", "black", "brown", "grey", "orange", "purple", "silver",
    "golden",
)  # fmt: skip
THINGS = (
    "door", "gate", "box", "chest", "safe", "cabinet", "drawer", "locker", "suitcase", "garage", "cellar",
    "tower", "boat", "garden", "desk", "vault",
)  # fmt: skip
MOST_DISTRACTORS = len(COLOURS) * len(THINGS) - 1
# All of as many digits, so that none stands out.
SMALLEST_KEY, LARGEST_KEY = 10000, 99999


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Retrieval):
    """Depth x length.

    Args:
        depths: shares of the filler before the asked sentence; None: drawn evenly for each prompt.
        distractors: sentences with another name and another value, at places drawn evenly.
        filler: texts to hide them in, from a random sentence on and around again where they are too short;
            nothing: sentences that are made up here. No value is a number of these texts.
    """

    depths: Sequence[float] | None = DEPTHS
    distractors: int = 4
    filler: Sequence[str] = dataclasses.field(default=(), repr=False)

    name = "needle"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depths", checked_depths(self.depths))
        if not 0 <= self.distractors <= MOST_DISTRACTORS:
            raise ValueError(f"distractors: expected from 0 to {MOST_DISTRACTORS}, got {self.distractors}")
        if isinstance(self.filler, str):
            raise TypeError("filler: expected a sequence of texts, got one str")
        object.__setattr__(self, "filler", tuple(self.filler))
        if self.filler and not any(text.strip() for text in self.filler):
            raise ValueError("filler: expected some text, got none")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "filler": filler.digest(self.filler)}

    def cells(self) -> list[Cell]:
        return grid(self.lengths, self.depths)

    def ask(self, cell: Cell, draw: random.Random) -> Callable[[int], Question]:
        depth = draw.random() if cell.depth is None else cell.depth
        names = drawn_names(draw, 1 + self.distractors)
        keys = draw.sample(self._keys, len(names))
        places = [depth, *(draw.random() for _ in names[1:])]
        needles = [NEEDLE.format(name=name, key=key) for name, key in zip(names, keys, strict=True)]
        pieces = self._pieces(draw)
        taken: list[str] = []

        def question(number: int) -> Question:
            taken.extend(itertools.islice(pieces, max(0, number - len(taken))))
            text = _hidden(taken[:number], needles, places)
            lines = [TASK, text.strip(), QUESTION.format(name=names[0])]
            return Question("\n".join(lines), keys[0], tuple(keys[1:]))

        return question

    def said(self, answer: str, question: Question) -> str | None:
        return first_number(answer)

    def is_complete(self, answer: str) -> bool:
        return has_whole_number(answer)

    def notes(self, rows: Sequence[Row]) -> list[str]:
        confused = sum(int(row.values["confused"]) for row in rows)
        return [
            f"needle: share of {self.repeats} prompts whose answer's first number is the one asked for, "
            f"among {self.distractors} others; {confused} answers gave one of the others"
        ]

    @functools.cached_property
    def _sentences(self) -> list[str]:
        return filler.split(self.filler)

    @functools.cached_property
    def _keys(self) -> list[str]:
        """Values that are no numbers of the texts."""
        numbers = {number for text in self.filler for number in re.findall(r"\d+", text)}
        found = [key for key in map(str, range(SMALLEST_KEY, LARGEST_KEY + 1)) if key not in numbers]
        if len(found) <= self.distractors:
            raise ValueError("filler: expected text that leaves some numbers of five digits, got all of them")
        return found

    def _pieces(self, draw: random.Random) -> Iterator[str]:
        return filler.from_texts(self._sentences, draw) if self.filler else filler.made_up(draw)


def drawn_names(draw: random.Random, number: int) -> list[str]:
    """The asked name and others; of these the first half, while there are such, share a word with it."""
    asked = (draw.choice(COLOURS), draw.choice(THINGS))
    others = [pair for pair in itertools.product(COLOURS, THINGS) if pair != asked]
    near = [pair for pair in others if pair[0] == asked[0] or pair[1] == asked[1]]
    near = draw.sample(near, min(len(near), number // 2))
    far = [pair for pair in others if pair not in near]
    chosen = [asked, *near, *draw.sample(far, number - 1 - len(near))]
    return [" ".join(pair) for pair in chosen]


def _hidden(pieces: Sequence[str], needles: Sequence[str], places: Sequence[float]) -> str:
    """Each needle behind that share of the pieces that its place says."""
    behind: dict[int, str] = {}
    for needle, place in zip(needles, places, strict=True):
        index = int(place * len(pieces) + 0.5)
        behind[index] = behind.get(index, "") + needle
    parts = [behind.get(0, "")]
    for index, piece in enumerate(pieces, 1):
        parts.append(piece)
        if index in behind:
            # Pieces of a text without spaces end in none.
            parts.append(behind[index] if piece[-1].isspace() else f" {behind[index]}")
    return "".join(parts)
