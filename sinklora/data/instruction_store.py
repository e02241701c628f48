"""From rows of instruction data to a store of conversations: their tokens, and a mask of the answers."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .conversations import Tokens, encode, special_ids, tokenize_conversation
from .instructions import Message, to_messages
from .overlong import POLICIES, TruncationReport, shorten
from .shards import StoreWriter, TokenStore, stored
from .sources import find_origins, read_rows
from .templates import Rendered, own_template, render
from .tokens import fingerprint, num_ids, pad_token

REPORT = "truncation.json"
# Of one call of the tokenizer: enough for all processors, little enough for memory.
BATCH_CHARACTERS = 4 * 2**20
BATCH_CONVERSATIONS = 1024
_KILOBYTE = 1000

Begin = Callable[[str, int], Callable[[int], None]]


class _Conversation(NamedTuple):
    messages: list[Message]
    rendered: Rendered
    source: str


def tokenize_instructions(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    cache: str | os.PathLike[str],
    *,
    context: int,
    overlong: str = "shorten",
    chat_template: str | None = None,
    system: str | None = None,
    split: str = "train",
    begin: Begin | None = None,
) -> tuple[TokenStore, TruncationReport]:
    """The conversations of the sources' rows (see to_messages) as tokens with a mask of the answers, made
    once under `cache`; and what became of rows longer than the context.

    Args:
        sources: as read_rows takes them.
        context: tokens that a conversation may have at most.
        overlong: what becomes of longer ones. "shorten": the middle of their longest user message is cut out,
            and they are left out where that does not do; "drop": left out; "error": a ValueError.
        chat_template: in place of the tokenizer's.
        system: the system message of conversations that have none.
        begin: shows progress, in kilobytes read; see sinklora.progress.

    Raises:
        ValueError: rows that cannot be read as conversations (with their line), a template that refuses them,
        no conversation at all. OSError: the cache cannot be written.
    """
    if overlong not in POLICIES:
        raise ValueError(f"overlong: expected one of {', '.join(POLICIES)}, got {overlong}")
    origins = find_origins(sources, split)
    key = {
        "sources": [list(origin.identity) for origin in origins],
        "split": split,
        "context": context,
        "overlong": overlong,
        "template": chat_template or own_template(tokenizer),
        "system": system,
        "tokenizer": fingerprint(tokenizer),
    }

    def write(folder: Path) -> StoreWriter:
        writer = StoreWriter(folder, num_ids(tokenizer), pad_token(tokenizer), masked=True)
        try:
            maker = _Maker(tokenizer, context, overlong, chat_template, writer)
            advance = _kilobytes(sum(origin.size for origin in origins), begin)
            for row in read_rows(sources, split=split, advance=advance):
                maker.add(row.values, row.source, system)
            report = maker.finish()
            (folder / REPORT).write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        except BaseException:
            writer.close()
            raise
        return writer

    store = stored(Path(cache), "conversations", key, write)
    values = json.loads((store.folder / REPORT).read_text(encoding="utf-8"))
    return store, TruncationReport.from_json(values)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages, with this system message before them where they have none."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


class _Maker:
    """Takes conversations one by one, encodes them many at a time, and writes what fits."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        policy: str,
        chat_template: str | None,
        writer: StoreWriter,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.chat_template = chat_template
        self.writer = writer
        self.report = TruncationReport(context, policy)
        self._special = special_ids(tokenizer)
        self._waiting: list[_Conversation] = []
        self._characters = 0

    def add(self, row: Mapping[str, Any], source: str, system: str | None) -> None:
        self.report.rows += 1
        try:
            messages = with_system(to_messages(row, source), system)
        except ValueError as error:
            raise ValueError(f"data: {error}") from error
        if not any(message["content"].strip() for message in messages if message["role"] == "assistant"):
            self.report.leave_out(source)
            return
        try:
            rendered = render(self.tokenizer, messages, self.chat_template)
        except ValueError as error:
            raise ValueError(f"data: {source}: {error}") from error
        self._waiting.append(_Conversation(messages, rendered, source))
        self._characters += len(rendered.text)
        if self._characters >= BATCH_CHARACTERS or len(self._waiting) >= BATCH_CONVERSATIONS:
            self._flush()

    def finish(self) -> TruncationReport:
        """Writes the rest."""
        self._flush()
        if not self.report.conversations:
            raise ValueError("data: no conversation is left: " + "; ".join(self.report.lines()))
        return self.report

    def _flush(self) -> None:
        encoded = encode(self.tokenizer, [each.rendered for each in self._waiting])
        fitting = []
        for conversation, all_tokens in zip(self._waiting, encoded, strict=True):
            if 1 not in all_tokens.loss_mask:
                raise ValueError(f"data: {conversation.source}: expected an answer of at least one token")
            tokens = self._fit(conversation, all_tokens)
            if tokens is not None:
                fitting.append(tokens)
        for tokens in fitting:
            self.report.keep(tokens, self._special)
        if fitting:
            ids = list(itertools.chain.from_iterable(tokens.input_ids for tokens in fitting))
            mask = list(itertools.chain.from_iterable(tokens.loss_mask for tokens in fitting))
            self.writer.append(ids, [len(tokens.input_ids) for tokens in fitting], mask)
        self._waiting, self._characters = [], 0

    def _fit(self, conversation: _Conversation, tokens: Tokens) -> Tokens | None:
        """The tokens of a conversation in at most `context`; None where it is left out."""
        report, source, count = self.report, conversation.source, len(tokens.input_ids)
        report.saw(source, count)
        if count <= self.context:
            return tokens
        if report.policy == "error":
            raise ValueError(
                f"overlong: {source}: expected at most {self.context} tokens, got {count}; with shorten or "
                "drop the run goes on"
            )
        shorter = None
        if report.policy == "shorten":
            shorter = shorten(self.tokenizer, conversation.messages, self.context, self._tokenize, count)
        if shorter is None:
            report.dropped.add(source, count, count)
        else:
            report.shortened.add(source, count, count - len(shorter.input_ids))
        return shorter

    def _tokenize(self, messages: list[Message]) -> Tokens:
        return tokenize_conversation(self.tokenizer, messages, self.chat_template)


def _kilobytes(size: int, begin: Begin | None) -> Callable[[int], None]:
    """Turns bytes read into whole kilobytes of a progress bar."""
    if begin is None:
        return lambda amount: None
    shown = begin("read conversations (kB)", size // _KILOBYTE)
    read = [0, 0]

    def advance(amount: int) -> None:
        read[0] += amount
        whole = read[0] // _KILOBYTE
        if whole > read[1]:
            shown(whole - read[1])
            read[1] = whole

    return advance
