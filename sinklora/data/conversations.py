"""Conversations as tokens, and which of them are answers: what supervised fine-tuning has its loss on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .instructions import Message
from .templates import Rendered, render


class Tokens(NamedTuple):
    """One conversation. input_ids: its tokens. loss_mask: as long, 1 on the tokens of answers."""

    input_ids: list[int]
    loss_mask: list[int]


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    chat_template: str | None = None,
) -> Tokens:
    """A conversation's tokens up to its last answer, with the loss mask: 1 on every answer, the token that
    ends its turn included, 0 elsewhere.

    With a chat template (`chat_template`, else the tokenizer's) the answers are what stands between its
    `{% generation %}` tags, and the special token right behind them; without such tags what the template
    writes beyond the prompt that it makes for each answer. Without a template the format is Alpaca's: the
    header (or the system message), "### Instruction:" and "### Response:" for each pair, the tokenizer's end
    token after each answer.

    Raises:
        ValueError: a template that refuses the messages, or that writes an earlier part of a conversation
        differently once more is said, so that no token can be said to be an answer's; no end token.
    """
    return encode(tokenizer, [render(tokenizer, messages, chat_template)])[0]


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Rendered]) -> list[Tokens]:
    """The tokens of rendered conversations, all encoded in one call."""
    if not conversations:
        return []
    special = special_ids(tokenizer)
    encoded = tokenizer([each.text for each in conversations], add_special_tokens=False, verbose=False)
    done = []
    for i, conversation in enumerate(conversations):
        ids: list[int] = encoded["input_ids"][i]
        cuts = [cut for answer in conversation.answers for cut in answer]
        at = [_token_at(encoded, i, cut, conversation.text) for cut in cuts] if tokenizer.is_fast else [None]
        if None in at:
            # A token crosses a border, which it never does when the model answers: its prompt is tokenised
            # alone. Or the tokenizer does not know where in the text its tokens are.
            pieces = _encode_pieces(tokenizer, conversation.text, cuts)
        else:
            borders = [0, *(token for token in at if token is not None), len(ids)]
            pieces = [ids[begin:end] for begin, end in itertools.pairwise(borders)]
        done.append(_masked(tokenizer, pieces, special))
    return done


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of tokens that are no text. Those that end a turn often have no name in the tokenizer's
    settings, and only their entry in the vocabulary says what they are."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _token_at(encoded: Any, index: int, char: int, text: str) -> int | None:
    """The first token from `char` on; None where one began before it and goes on."""
    for here in range(char, len(text)):
        token = encoded.char_to_token(index, here)
        if token is not None:
            return int(token) if encoded.token_to_chars(index, token).start >= char else None
    return len(encoded["input_ids"][index])


def _encode_pieces(tokenizer: Any, text: str, cuts: list[int]) -> list[list[int]]:
    borders = [0, *cuts, len(text)]
    texts = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _masked(tokenizer: Any, pieces: list[list[int]], special: set[int]) -> Tokens:
    """Prompts and answers in turn, joined. The loss of an answer ends with what ends its turn."""
    ids: list[int] = []
    mask: list[int] = []
    for number, piece in enumerate(pieces):
        is_answer = number % 2 == 1
        loss = _through_end_of_turn(tokenizer, piece, special) if is_answer else 0
        if not is_answer and mask and mask[-1] and piece and ids[-1] not in special:
            # Many templates close their tags before the token that ends the turn; without it in the loss, a
            # model would not learn to stop.
            loss = int(piece[0] in special and piece[0] != tokenizer.bos_token_id)
        ids += piece
        mask += [1] * loss + [0] * (len(piece) - loss)
    return Tokens(ids, mask)


def _through_end_of_turn(tokenizer: Any, answer: list[int], special: set[int]) -> int:
    """How many tokens of an answer's piece are the answer and what ends its turn: what templates write behind
    that (a line break, often) the model never generates."""
    tail = len(answer)
    while tail and (answer[tail - 1] in special or not tokenizer.decode([answer[tail - 1]]).strip()):
        tail -= 1
    end = next((i for i in range(tail, len(answer)) if answer[i] in special), None)
    if end is None:
        return len(answer)
    while end < len(answer) and answer[end] in special:
        end += 1
    return end
