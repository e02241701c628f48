"""Passkey retrieval: a number in a long text of no meaning, asked for at its end.

Wording and settings are LongLoRA's (arXiv 2309.12307), which are Landmark Attention's (arXiv 2305.16300): the
same sentences, keys from 1 to 50000, ten prompts a length. What differs: lengths are exact in tokens, not
estimated from characters; the text is cut between sentences; a grid of depths can be measured where LongLoRA
draws the place of the key for each prompt (depths=None does that); and the answer is right if the first
number in it is the key, where LongLoRA compares as many tokens as the key has, so that a key with a digit
added passed.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Sequence

from .retrieval import DEPTHS, Question, Retrieval, checked_depths, grid
from .task import Cell, Row

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will "
    "quiz you about the important information there."
)
GARBAGE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 50000

_NUMBER = re.compile(r"\d+")
_WHOLE_NUMBER = re.compile(r"\d+(?=\D)")


def first_number(text: str) -> str | None:
    found = _NUMBER.search(text)
    return found[0] if found else None


def has_whole_number(text: str) -> bool:
    """Whether a number ends in the text, so that no digit can come to it any more."""
    return _WHOLE_NUMBER.search(text) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Retrieval):
    """Depth x length. depths: shares of the filler before the key; None: one cell a length, a depth drawn
    evenly for each prompt, as LongLoRA does.
    """

    depths: Sequence[float] | None = DEPTHS

    name = "passkey"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depths", checked_depths(self.depths))

    def cells(self) -> list[Cell]:
        return grid(self.lengths, self.depths)

    def ask(self, cell: Cell, draw: random.Random) -> Callable[[int], Question]:
        key = str(draw.randint(1, LARGEST_KEY))
        depth = draw.random() if cell.depth is None else cell.depth

        def question(pieces: int) -> Question:
            before = int(depth * pieces + 0.5)
            lines = [TASK, _garbage(before), KEY.format(key=key), _garbage(pieces - before), QUESTION]
            return Question("\n".join(lines), key)

        return question

    def said(self, answer: str, question: Question) -> str | None:
        return first_number(answer)

    def is_complete(self, answer: str) -> bool:
        return has_whole_number(answer)

    def notes(self, rows: Sequence[Row]) -> list[str]:
        return [f"passkey: share of {self.repeats} prompts whose answer's first number is the key"]


def _garbage(sentences: int) -> str:
    """Begins anew on each side of the key."""
    return " ".join(itertools.islice(itertools.cycle(GARBAGE), sentences))
