"""Text to hide something in: sentences made up here, or those of the user's own texts."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence

# A piece of a user's text is a sentence, or so many characters of one that goes on.
LONGEST_PIECE = 240

_WORD = re.compile(r"\s*\S+\s*")
_QUOTES = "\"'”’)]"

_WHO = (
    "The baker", "A neighbour", "The old gardener", "Her cousin", "The night porter", "A young teacher",
    "The ferryman", "His aunt", "The librarian", "A passing cyclist", "The clockmaker", "Their landlord",
    "The postwoman", "A retired pilot", "The violinist", "Somebody from the village",
)  # fmt: skip
_DOES = (
    "repaired", "painted", "forgot about", "carried home", "looked for", "talked about", "sold",
    "borrowed", "admired", "complained about", "cleaned", "wrote a letter about", "photographed",
    "measured", "gave away", "hid",
)  # fmt: skip
_WHAT = (
    "the wooden boat", "a basket of pears", "the kitchen window", "two umbrellas", "the church bell",
    "a pair of boots", "the garden fence", "an old map", "the copper kettle", "a box of letters",
    "the bridge lamps", "a sleeping cat", "the broken piano", "some fresh bread", "the harbour wall",
    "a heavy curtain",
)  # fmt: skip
_WHEN = (
    "before breakfast", "in the rain", "on the way to the station", "while it was snowing",
    "after the concert", "with great care", "without a word", "during the long summer",
    "as the sun went down", "for the third time", "on a quiet Sunday", "because nobody else would",
    "near the market", "when the wind had dropped", "to everybody's surprise", "at the end of the week",
)  # fmt: skip


def made_up(draw: random.Random) -> Iterator[str]:
    """Sentences without numbers, each with the space behind it, for ever; 65536 different ones."""
    while True:
        words = (draw.choice(_WHO), draw.choice(_DOES), draw.choice(_WHAT), draw.choice(_WHEN))
        yield f"{' '.join(words)}. "


def split(texts: Sequence[str]) -> list[str]:
    """The sentences of texts with the white space behind them; a blank line ends one too. Joined they are the
    texts again, a line break between two where there was none.

    Raises:
        ValueError: nothing but white space in all of them.
    """
    pieces = [piece for text in texts for piece in _sentences(text if text.endswith("\n") else f"{text}\n")]
    if not pieces:
        raise ValueError("filler: expected some text, got none")
    return pieces


def _sentences(text: str) -> Iterator[str]:
    words: list[str] = []
    size = 0
    for found in _WORD.finditer(text):
        for word in _cut(found[0]):
            if size + len(word) > LONGEST_PIECE and words:
                yield "".join(words)
                words, size = [], 0
            words.append(word)
            size += len(word)
            bare = word.rstrip()
            ends = bare.rstrip(_QUOTES).endswith((".", "!", "?")) and bare != word
            if ends or word.count("\n", len(bare)) > 1:
                yield "".join(words)
                words, size = [], 0
    if words:
        yield "".join(words)


def _cut(word: str) -> Iterator[str]:
    """Words longer than a piece exist where no spaces are written."""
    for begin in range(0, len(word), LONGEST_PIECE):
        yield word[begin : begin + LONGEST_PIECE]


def from_texts(pieces: Sequence[str], draw: random.Random) -> Iterator[str]:
    """The pieces from a random one on, around and around, for ever."""
    begin = draw.randrange(len(pieces))
    while True:
        yield from pieces[begin:]
        begin = 0


def digest(texts: Sequence[str]) -> str | None:
    """What texts are, for a task's settings: None for none."""
    if not texts:
        return None
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)} ".encode())
        found.update(text.encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]
