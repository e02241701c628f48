"""What all retrieval tasks share: prompts of given lengths, answers, and their score.

A cell is `repeats` prompts, each made from a seed of its own (task, seed, length, depth, repeat), so that it
is the same whichever cells are measured, in whichever order. A prompt and the room for its answer
(`max_new_tokens`) have at most the cell's length in tokens of the model's tokenizer, and one more piece of
filler would be too long. Answers are greedy.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .lengths import FIRST_GUESS, most_pieces
from .task import Advance, Cell, NotMeasurableError, Row, Task, Way

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..loading import OpenedModel

# 95 %: the quantile of the normal distribution that Wilson's interval takes.
QUANTILE = 1.959964
SHOWN_CHARACTERS = 80
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Question(NamedTuple):
    """A prompt's text, the right answer, and those that stand in the text as well and are wrong."""

    text: str
    expected: str
    others: tuple[str, ...] = ()


class Asked(NamedTuple):
    """A question with the tokens that the model reads, and the pieces of filler in it."""

    question: Question
    tokens: list[int]
    pieces: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """Settings of every retrieval task.

    Args:
        lengths: tokens of prompt and answer together; each one a cell, or one for each depth.
        repeats: prompts of a cell.
        seed: of all prompts.
        chat: put the prompt as a user's message into the tokenizer's chat template, as models that were
            tuned for dialogues need it; else the model goes on with the text.
        max_new_tokens: room for the answer.
        prefill_chunk: tokens of a prompt read at a time, after each of which a bounded cache evicts. None:
            the whole prompt, question included, is one forward, as in H2O's own evaluation; the first token
            of the answer then still comes from all of the prompt.
        tokens_per_batch: prompts are computed together up to so many tokens; changes nothing but speed and
            memory.

    Raises:
        ValueError: a number out of range; names the setting.
    """

    lengths: Sequence[int]
    repeats: int = 10
    seed: int = 0
    chat: bool = False
    max_new_tokens: int = 32
    prefill_chunk: int | None = None
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: expected one at least, each of 1 token or more, got {self.lengths}")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths: expected each once, got {self.lengths}")
        for name, least in (("repeats", 1), ("seed", 0), ("max_new_tokens", 1), ("tokens_per_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.prefill_chunk is not None and self.prefill_chunk < 2:
            raise ValueError(f"prefill_chunk: expected at least 2 tokens, got {self.prefill_chunk}")

    # ---- what a task of its own says ----

    def ask(self, cell: Cell, draw: random.Random) -> Callable[[int], Question]:
        """The question with so many pieces of filler, everything else drawn once."""
        raise NotImplementedError

    def said(self, answer: str, question: Question) -> str | None:
        """What an answer names, as Question.expected and .others are written; None where it names nothing."""
        raise NotImplementedError

    def is_complete(self, answer: str) -> bool:
        """Whether an answer is decided, whatever may follow."""
        raise NotImplementedError

    def supply(self) -> int | None:
        """Pieces of filler that there are; None where they never run out."""
        return None

    def check(self, question: Question, cell: Cell) -> None:
        """Raises NotMeasurableError for a question that means nothing in so short a text."""

    # ---- Task ----

    def settings(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Which cells there are, and how many at once, changes none of them.
        for name in ("lengths", "depths", "tokens_per_batch"):
            values.pop(name, None)
        return values

    def cells(self) -> list[Cell]:
        return [Cell(length) for length in self.lengths]

    def takes(self, way: Way) -> bool:
        return way.attention == "full"

    def work(self, opened: OpenedModel, way: Way, cell: Cell) -> int:
        return cell.length * self.repeats

    def questions(self, opened: OpenedModel, cell: Cell) -> list[Asked]:
        """The cell's prompts for a model's tokenizer.

        Raises:
            NotMeasurableError: a length that no prompt fits into, or that all the filler there is does not
                reach. ValueError: chat with a tokenizer that knows no dialogue.
        """
        from .answers import Encoder

        encode = Encoder(opened.tokenizer, self.chat)
        found: list[Asked] = []
        for repeat in range(self.repeats):
            found.append(self._question(encode, cell, repeat, found[-1].pieces if found else FIRST_GUESS))
        return found

    def _question(self, encode: Callable[[str], list[int]], cell: Cell, repeat: int, guess: int) -> Asked:
        depth = None if cell.depth is None else float(cell.depth)
        make = self.ask(cell, random.Random(f"{self.name} {self.seed} {cell.length} {depth} {repeat}"))
        room, supply = cell.length - self.max_new_tokens, self.supply()
        fitting: list[int] = []

        def count(pieces: int) -> int:
            nonlocal fitting
            tokens = encode(make(pieces).text)
            if len(tokens) <= room:
                fitting = tokens
            return len(tokens)

        pieces = most_pieces(count, room, supply=supply, guess=max(1, guess))
        if pieces is None:
            # Rounded up beyond what names and numbers differ by, so that prompts of all cells say the same.
            least = -(-(count(0) + self.max_new_tokens + 32) // 64) * 64
            raise NotMeasurableError(
                f"lengths: expected about {least} tokens or more, for the question alone and "
                f"{self.max_new_tokens} of the answer, got {cell.length}"
            )
        if pieces == supply:
            raise NotMeasurableError(
                f"lengths: expected fewer tokens than all there is to fill a prompt has, got {cell.length}"
            )
        question = make(pieces)
        self.check(question, cell)
        return Asked(question, fitting, pieces)

    def measure(self, opened: OpenedModel, way: Way, cell: Cell, advance: Advance) -> dict[str, Any]:
        from .answers import answers

        if not self.takes(way):
            raise ValueError(f'way: expected attention "full" to generate with, got {way.attention}')
        asked = self.questions(opened, cell)
        begun = time.perf_counter()
        given = answers(
            opened,
            way,
            cell.length,
            [each.tokens for each in asked],
            max_new_tokens=self.max_new_tokens,
            complete=self.is_complete,
            tokens_per_batch=self.tokens_per_batch,
            prefill_chunk=self.prefill_chunk,
            on_read=lambda prompts: advance(prompts * cell.length),
        )
        seconds = time.perf_counter() - begun
        said = [self.said(text, each.question) for text, each in zip(given, asked, strict=True)]
        right = [what == each.question.expected for what, each in zip(said, asked, strict=True)]
        others = [what in each.question.others for what, each in zip(said, asked, strict=True)]
        wrong = next((i for i, fine in enumerate(right) if not fine), None)
        low, high = wilson(sum(right), len(right))
        return {
            "accuracy": sum(right) / len(right),
            "correct": sum(right),
            "repeats": len(right),
            "confused": sum(others),
            "interval_low": low,
            "interval_high": high,
            "tokens": sum(len(each.tokens) for each in asked) / len(asked),
            "seconds": seconds,
            "wrong": None
            if wrong is None
            else {"expected": asked[wrong].question.expected, "got": _shortened(given[wrong])},
        }

    def columns(self) -> Sequence[str]:
        return (
            "accuracy",
            "correct",
            "repeats",
            "confused",
            "interval_low",
            "interval_high",
            "tokens",
            "seconds",
        )

    def draw(self, rows: Sequence[Row]) -> Figure:
        """A heat map for each model and way; of cells without depth, lines over the length."""
        from ..plots_curves import plot_lines
        from ..plots_heatmap import plot_heat_maps

        maps: dict[str, dict[tuple[float, float], float]] = {}
        lines: dict[str, dict[float, float]] = {}
        for row in sorted(rows, key=lambda row: row.cell.length):
            name, value = f"{row.model}, {row.way}", float(row.values["accuracy"])
            lines.setdefault(name, {})[row.cell.length] = value
            if row.cell.depth is not None:
                maps.setdefault(name, {})[row.cell.length, row.cell.depth] = value
        if maps:
            title = f"{self.name}: right answers of {self.repeats} in %"
            return plot_heat_maps(maps, x_label="tokens", y_label="depth", title=title)
        title = f"{self.name}: {self.repeats} prompts each"
        figure = plot_lines(lines, x_label="tokens", y_label="accuracy", title=title)
        figure.axes[0].set_ylim(-0.04, 1.04)
        return figure


def checked_depths(depths: Sequence[float] | None) -> tuple[float, ...] | None:
    """Depths as floats. Raises ValueError for none at all, one twice, or one outside 0 to 1."""
    if depths is None:
        return None
    found = tuple(float(depth) for depth in depths)
    if not found or not all(0 <= depth <= 1 for depth in found) or len(set(found)) < len(found):
        raise ValueError(f"depths: expected different numbers from 0 to 1, got {tuple(depths)}")
    return found


def grid(lengths: Sequence[int], depths: Sequence[float] | None) -> list[Cell]:
    """A cell for each length and depth, short ones first; without depths one for each length."""
    if depths is None:
        return [Cell(length) for length in lengths]
    return [Cell(length, depth) for length in lengths for depth in depths]


def wilson(correct: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: sensible for few repeats, and never outside 0 to 1."""
    share, squared = correct / number, QUANTILE**2
    middle = (share + squared / (2 * number)) / (1 + squared / number)
    half = math.sqrt(share * (1 - share) / number + squared / (4 * number**2))
    half *= QUANTILE / (1 + squared / number)
    # The ends are exact where all or none are right; computed they miss by a rounding.
    return (middle - half if correct else 0.0), (middle + half if correct < number else 1.0)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
