"""The texts that models are measured on, tokenised by each model's own tokenizer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..data.sources import read_documents


class Text(NamedTuple):
    """Tokens int64 (T,) of a document, where it came from, and the bytes that the tokens but the first are.

    The first token is never predicted, so its bytes are not among those that a loss is of.
    """

    tokens: torch.Tensor
    source: str
    scored_bytes: int


class Texts:
    """Documents, read once; their tokens are kept for the last tokenizer that asked.

    Args:
        sources: as read_documents takes them.
        max_documents: the first so many, and no more are read; None: all.
        max_tokens: of each document, its first so many; None: all.
        min_tokens: of those, shorter documents are left out.
        text_field, split: as read_documents takes them.

    Raises:
        ValueError: no document, or numbers out of range. What read_documents raises.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        max_documents: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 2,
        text_field: str = "text",
        split: str = "train",
    ) -> None:
        for name, value, least in (("max_documents", max_documents, 1), ("max_tokens", max_tokens, 2)):
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if min_tokens < 2:
            raise ValueError(f"min_tokens: expected at least 2, got {min_tokens}")
        if max_tokens is not None and max_tokens < min_tokens:
            raise ValueError(f"max_tokens: expected at least min_tokens = {min_tokens}, got {max_tokens}")
        if not sources:
            raise ValueError("data: expected files or folders of text, got none")
        self.max_tokens, self.min_tokens = max_tokens, min_tokens
        found = read_documents(sources, text_field=text_field, split=split)
        self.documents = list(itertools.islice((each for each in found if each.text), max_documents))
        if not self.documents:
            raise ValueError(f"data: expected text, found none in {', '.join(sources)}")
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest())
        self.digest = digest.hexdigest()
        self._tokenizer: Any = None
        self._texts: list[Text] = []

    def settings(self) -> dict[str, Any]:
        """What the tokens depend on besides the tokenizer, as plain JSON."""
        return {
            "data": self.digest,
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
        }

    def tokens(self, tokenizer: Any) -> list[Text]:
        """The chosen documents' tokens, without special ones."""
        if tokenizer is not self._tokenizer:
            self._texts = self._tokenize(tokenizer)
            self._tokenizer = tokenizer
        return self._texts

    def _tokenize(self, tokenizer: Any) -> list[Text]:
        found: list[Text] = []
        for document in self.documents:
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ids[: self.max_tokens]
            if len(ids) >= self.min_tokens:
                tokens = torch.tensor(ids, dtype=torch.int64)
                found.append(Text(tokens, document.source, _num_bytes(tokenizer, ids[1:])))
        if not found:
            raise ValueError(f"data: expected a document of at least {self.min_tokens} tokens, found none")
        return found


def _num_bytes(tokenizer: Any, ids: Sequence[int]) -> int:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", "surrogatepass"))
