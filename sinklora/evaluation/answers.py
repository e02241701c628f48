"""What models answer to prompts: several at once, greedily, read through the cache of a way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..generation.formats import Dialogue, choose_format
from ..generation.generate import end_tokens
from ..generation.settings import Sampling
from ..hf.settings import text_config
from ..loading import OpenedModel
from .task import Way


class Encoder:
    """Turns the text of a prompt into the tokens that the model reads.

    As the tokenizer does it, begin token and all; an end token that it puts behind is taken off, for nothing
    is to be said after it. With chat the text is a user's message: in the tokenizer's chat template, or, as
    in `sinklora chat`, in LLaMA-2's [INST] where there is none.

    Raises:
        ValueError: chat with a tokenizer that knows no dialogue.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> None:
        self.tokenizer: Any = tokenizer
        self.format = choose_format(tokenizer, "auto" if chat else "plain")
        if chat and self.format.name == "plain":
            raise ValueError("chat: expected a tokenizer with a chat template, got one of bytes without")

    def __call__(self, text: str) -> list[int]:
        if self.format.name != "plain":
            return self.format.prompt(Dialogue(), text).tokens
        # Long on purpose: no reminder that the text is longer than the model's context.
        tokens: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
        if tokens and tokens[-1] == self.tokenizer.eos_token_id:
            tokens.pop()
        return tokens


def answers(
    opened: OpenedModel,
    way: Way,
    length: int,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    complete: Callable[[str], bool] = lambda text: False,
    tokens_per_batch: int = 16384,
    prefill_chunk: int | None = None,
    on_read: Callable[[int], None] = lambda prompts: None,
) -> list[str]:
    """The likeliest continuation of each prompt, as text without special tokens.

    Prompts of unequal length are padded on the left and masked. Nothing of the model's own generation
    settings acts but its end tokens: a penalty on repeated tokens, as some models carry it, would punish the
    very answer that stands in the prompt.

    Args:
        length: of the cell; shares of a cache's budget count from it.
        prompts: tokens of each, at least one.
        complete: whether a text needs no more; a prompt's answer ends there, at an end token, or after
            max_new_tokens.
        tokens_per_batch: prompts are computed together up to so many tokens, one at least.
        prefill_chunk: tokens of the prompt read at a time, counted from its end, after each of which a
            bounded cache evicts; None: all in one forward, so that the first new token is computed before
            anything is evicted.
        on_read: gets the number of prompts answered after each batch.
    """
    rows = max(1, tokens_per_batch // max(map(len, prompts)))
    found: list[str] = []
    for begin in range(0, len(prompts), rows):
        batch = prompts[begin : begin + rows]
        found += _answer_batch(opened, way, length, batch, max_new_tokens, complete, prefill_chunk)
        on_read(len(batch))
    return found


def _answer_batch(
    opened: OpenedModel,
    way: Way,
    length: int,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    complete: Callable[[str], bool],
    prefill_chunk: int | None,
) -> list[str]:
    model: Any = opened.model
    tokenizer = opened.tokenizer
    ends = end_tokens(opened.model, tokenizer)
    config = Sampling(max_new_tokens=max_new_tokens, temperature=0.0).config(ends, tokenizer.pad_token_id)
    config.prefill_chunk_size = prefill_chunk
    ids, mask = left_padded(prompts, int(config.pad_token_id), prefill_chunk)
    width = ids.shape[1]

    def text(new: torch.Tensor) -> str:
        """new: int64 (n,) tokens of an answer, and of what stands after its end."""
        tokens = new.tolist()
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))

    cache = (
        DynamicCache(config=text_config(model.config))
        if way.make_cache is None
        else way.make_cache(opened.model, length)
    )
    with _plain_generation(model):
        result = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Complete(lambda row: complete(text(row[width:])))]),
        )
    return [text(row[width:]) for row in result]


def left_padded(
    rows: Sequence[Sequence[int]], pad_token: int, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, int64 (B, T) each: rows of unequal length end together.

    T is the longest row's length; if that is more than a chunk, a whole number of chunks. Each row is then
    read in pieces that are counted from its end, so that a cache evicts at the same moments whatever rows
    are beside it.
    """
    width = max(map(len, rows))
    if chunk is not None and width > chunk:
        width = -(-width // chunk) * chunk
    ids = torch.full((len(rows), width), pad_token)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(list(row))
        mask[b, width - len(row) :] = 1
    return ids, mask


class _Complete(StoppingCriteria):
    """Ends each row by itself once its text needs no more."""

    def __init__(self, complete: Callable[[torch.Tensor], bool]) -> None:
        self.complete = complete

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        on_host = input_ids.cpu()
        return torch.tensor([self.complete(row) for row in on_host], device=input_ids.device)


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """generate takes what it is not told from the model's own settings; inside there are none."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
