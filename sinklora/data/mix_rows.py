"""The rows of a mixture's sources: as messages, each once, of allowed lengths."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from .instructions import to_messages
from .mix_settings import MixSettings, MixSource
from .sources import Document, Row, text_of
from .tokens import encode_documents

# A row with one of these is a conversation; one without is text.
_CONVERSATION_FIELDS = ("messages", "conversations", "prompt", "instruction")
_DIGEST_BYTES = 16


@dataclasses.dataclass
class Counts:
    """Rows of one source. eligible: what the filters left; taken: of these, those in the mixture."""

    read: int = 0
    duplicates: int = 0
    too_short: int = 0
    too_long: int = 0
    eligible: int = 0
    taken: int = 0


class Candidate(NamedTuple):
    digest: bytes
    messages: list[dict[str, str]]
    source: str


def new_rows(
    rows: Iterator[Row], source: MixSource, settings: MixSettings, seen: set[bytes], counts: Counts
) -> Iterator[Candidate]:
    """Rows as messages, each once; fills `seen`."""
    for row in rows:
        counts.read += 1
        messages = _messages(row, settings)
        digest = _digest(messages)
        if digest in seen:
            counts.duplicates += 1
        else:
            seen.add(digest)
            yield Candidate(digest, messages, row.source)
    if not counts.read:
        raise ValueError(f"source: {source.name}: expected rows in {source.path}, found none")


def _messages(row: Row, settings: MixSettings) -> list[dict[str, str]]:
    present = {name for name, value in row.values.items() if value is not None}
    if settings.text_field in present and not present.intersection(_CONVERSATION_FIELDS):
        return [
            {"role": "user", "content": settings.text_instruction},
            {"role": "assistant", "content": text_of(row, settings.text_field)},
        ]
    try:
        return to_messages(row.values, row.source)
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def _digest(messages: list[dict[str, str]]) -> bytes:
    """Equal for messages that differ in white space and Unicode composition only."""
    parts = [
        [message["role"], " ".join(unicodedata.normalize("NFC", message["content"]).split())]
        for message in messages
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=_DIGEST_BYTES).digest()


def fitting_rows(
    candidates: Iterator[Candidate], tokenizer: Any, settings: MixSettings, counts: Counts
) -> Iterator[Candidate]:
    """Those whose length is allowed."""
    low, high = settings.min_tokens or 0, settings.max_tokens
    if not low and high is None:
        for candidate in candidates:
            counts.eligible += 1
            yield candidate
        return
    pending: deque[Candidate] = deque()

    def texts() -> Iterator[Document]:
        for candidate in candidates:
            pending.append(candidate)
            for message in candidate.messages:
                yield Document(message["content"], candidate.source)

    encoded = encode_documents(texts(), tokenizer, special_tokens=False)
    lengths = itertools.chain.from_iterable(lengths for _, lengths in encoded)
    for first in lengths:
        candidate = pending.popleft()
        length = first + sum(itertools.islice(lengths, len(candidate.messages) - 1))
        if length < low:
            counts.too_short += 1
        elif high is not None and length > high:
            counts.too_long += 1
        else:
            counts.eligible += 1
            yield candidate
