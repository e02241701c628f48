"""Conversations longer than the context: shortened in the middle of their longest question, or left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .conversations import Tokens
from .instructions import Message

POLICIES = ("shorten", "drop", "error")
# What stands where text was cut out.
GAP = "\n[...]\n"
# Tokens that stay at least before and behind the gap: what is asked stands at one of the two ends.
KEPT_AT_EACH_END = 64
_TRIES = 8
_LISTED = 20


def shorten(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    context: int,
    tokenize: Callable[[list[Message]], Tokens],
    num_tokens: int,
) -> Tokens | None:
    """The conversation in at most `context` tokens: GAP in place of the middle of the longest user message.

    Answers, other messages and both ends of that message stay whole.

    Args:
        tokenize: of a conversation. num_tokens: what it gives for these messages.

    Returns:
        None where even that is too long.
    """
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not questions:
        return None
    longest = max(questions, key=lambda i: len(messages[i]["content"]))
    content = messages[longest]["content"]
    starts = _token_starts(tokenizer, content)
    remove = num_tokens - context + len(_token_starts(tokenizer, GAP))
    for _ in range(_TRIES):
        if remove > len(starts) - 2 * KEPT_AT_EACH_END:
            return None
        begin = (len(starts) - remove) // 2
        # Inside the text: at least KEPT_AT_EACH_END tokens follow.
        cut = content[: starts[begin]] + GAP + content[starts[begin + remove] :]
        shorter = [*messages]
        shorter[longest] = {**messages[longest], "content": cut}
        tokens = tokenize(shorter)
        if len(tokens.input_ids) <= context:
            return tokens
        # Around the gap a text's tokens may be others.
        remove += len(tokens.input_ids) - context
    return None


def _token_starts(tokenizer: Any, text: str) -> list[int]:
    """Where in the text its tokens begin, in characters."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [begin for begin, _ in encoded["offset_mapping"]]
    count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return [len(text) * i // count for i in range(count)]


@dataclasses.dataclass
class Overlong:
    """Some rows that were longer than the context: how many, their tokens, and the longest of them."""

    rows: int = 0
    tokens: int = 0
    tokens_removed: int = 0
    longest: dict[str, Any] | None = None
    sources: list[str] = dataclasses.field(default_factory=list)

    def add(self, source: str, tokens: int, removed: int) -> None:
        self.rows += 1
        self.tokens += tokens
        self.tokens_removed += removed
        if self.longest is None or tokens > self.longest["tokens"]:
            self.longest = {"source": source, "tokens": tokens}
        if len(self.sources) < _LISTED:
            self.sources.append(source)


@dataclasses.dataclass
class TruncationReport:
    """What became of the rows of instruction data: truncation.json, and a line on the terminal.

    rows: read. conversations, tokens, answer_tokens: kept, after shortening. shortened, dropped: rows longer
    than the context; without_answer: rows whose answers are all empty, left out. unended: conversations whose
    last answer has no token that ends it. Sources are the first few of each.
    """

    context: int
    policy: str
    rows: int = 0
    conversations: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    longest: dict[str, Any] | None = None
    shortened: Overlong = dataclasses.field(default_factory=Overlong)
    dropped: Overlong = dataclasses.field(default_factory=Overlong)
    without_answer: int = 0
    without_answer_sources: list[str] = dataclasses.field(default_factory=list)
    unended: int = 0

    def keep(self, tokens: Tokens, special: set[int]) -> None:
        self.conversations += 1
        self.tokens += len(tokens.input_ids)
        self.answer_tokens += sum(tokens.loss_mask)
        last = len(tokens.loss_mask) - 1 - tokens.loss_mask[::-1].index(1)
        self.unended += tokens.input_ids[last] not in special

    def saw(self, source: str, tokens: int) -> None:
        """Notes the length of a row before anything was done about it."""
        if self.longest is None or tokens > self.longest["tokens"]:
            self.longest = {"source": source, "tokens": tokens}

    def leave_out(self, source: str) -> None:
        self.without_answer += 1
        if len(self.without_answer_sources) < _LISTED:
            self.without_answer_sources.append(source)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TruncationReport:
        parts = {name: Overlong(**values[name]) for name in ("shortened", "dropped")}
        return cls(**{**values, **parts})

    def lines(self) -> list[str]:
        """What happened, in words."""
        lines = []
        of_rows = f"of {self.rows:,} rows"
        if self.shortened.rows:
            lines.append(
                f"shortened: {self.shortened.rows:,} {of_rows}, those longer than {self.context:,} tokens, "
                f"in the middle of their longest question, by {self.shortened.tokens_removed:,} in all; "
                f"{_longest(self.shortened)}; answers are whole"
            )
        if self.dropped.rows:
            why = "longer than" if self.policy == "drop" else "not to be shortened to"
            lines.append(
                f"left out: {self.dropped.rows:,} {of_rows}, {why} {self.context:,} tokens, with "
                f"{self.dropped.tokens:,} tokens; {_longest(self.dropped)}"
            )
        if not (self.shortened.rows or self.dropped.rows):
            lines.append(f"nothing was truncated: no row is longer than {self.context:,} tokens")
        if self.without_answer:
            lines.append(
                f"left out: {self.without_answer:,} {of_rows}, without text in any answer; the first is "
                f"{self.without_answer_sources[0]}"
            )
        if self.unended:
            lines.append(
                f"no end: {self.unended:,} of {self.conversations:,} conversations end without a special "
                "token; from those the model does not learn where an answer ends"
            )
        return lines


def _longest(rows: Overlong) -> str:
    assert rows.longest is not None
    return f"the longest has {rows.longest['tokens']:,} ({rows.longest['source']})"
