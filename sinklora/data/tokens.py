"""From documents to a store of tokens, at the speed of the tokenizers library."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .shards import StoreWriter, TokenStore, stored
from .sources import Document, Origin, find_origins, read_documents

# What is encoded in one call: enough to keep every processor at work, little enough for memory (the
# tokenizers library holds about 25 bytes for a character meanwhile).
BATCH_CHARACTERS = max(4 * 2**20, 2**19 * (os.cpu_count() or 1))
BATCH_DOCUMENTS = 16384
# Calls at a time: a document is one thread's work, and a second call fills in at the end of the first.
CALLS = 2
KILOBYTE = 1000
_PROBE_CHARACTERS = 2000

Begin = Callable[[str, int], Callable[[int], None]]


def tokenize_documents(
    sources: Sequence[str],
    tokenizer: Any,
    cache: str | os.PathLike[str],
    *,
    text_field: str = "text",
    split: str = "train",
    add_eos: bool = True,
    begin: Begin | None = None,
) -> TokenStore:
    """The tokens of every document of the sources (see read_documents), made once under `cache`.

    Each document is encoded whole, exactly as tokenizer(text) does it: with a begin token where the tokenizer
    adds one, and text that spells a special token becomes that token. At its end comes the end token. While
    sources (by path, size and time of change; by revision on the Hub), tokenizer and options stay the same,
    another call opens what the first one made; of several processes one makes it and the others wait.

    Args:
        tokenizer: of transformers. Ones of the tokenizers library use all processors.
        cache: folder to hold the stores, each in a folder of its own.
        add_eos: end each document with the end token, where the tokenizer has one and did not add it itself.
        begin: shows progress, in kilobytes read; see sinklora.progress.

    Raises:
        ValueError: as read_documents; files that changed meanwhile. OSError: the cache cannot be written.
    """
    origins = find_origins(sources, split)
    key = {
        "sources": [list(origin.identity) for origin in origins],
        "text_field": text_field,
        "split": split,
        "add_eos": add_eos,
        "tokenizer": fingerprint(tokenizer),
    }

    def write(folder: Path) -> StoreWriter:
        writer = StoreWriter(folder, num_ids(tokenizer), pad_token(tokenizer))
        advance = in_kilobytes("tokenising", origins, begin)
        documents = read_documents(sources, text_field=text_field, split=split, advance=advance)
        end = tokenizer.eos_token_id if add_eos else None
        try:
            for tokens, lengths in encode_documents(documents, tokenizer, end):
                writer.append(tokens, lengths)
            here = [source for source in sources if os.path.exists(os.path.expanduser(source))]
            if here and _local(find_origins(here, split)) != _local(origins):
                raise ValueError("data: files changed while they were read; run it again")
        except BaseException:
            writer.close()
            raise
        return writer

    return stored(Path(cache), "tokens", key, write)


def encode_documents(
    documents: Iterable[Document], tokenizer: Any, end: int | None = None, special_tokens: bool = True
) -> Iterator[tuple[array[int], list[int]]]:
    """(tokens, length of each document in them) of batch after batch of documents, in order.

    end: the token that closes each document; None: none does. special_tokens: those that the tokenizer adds.
    """
    encode: Callable[[list[str]], list[list[int]]] | None = None
    waiting: deque[Future[list[list[int]]]] = deque()
    # Tokenizers in Python keep state in themselves: one thread.
    with ThreadPoolExecutor(CALLS if _is_fast(tokenizer) else 1) as pool:
        try:
            for texts in _batches(documents):
                probe = [text[:_PROBE_CHARACTERS] for text in texts[:4]]
                encode = encode or _encoder(tokenizer, probe, special_tokens)
                waiting.append(pool.submit(encode, texts))
                if len(waiting) > CALLS:
                    yield _joined(waiting.popleft().result(), end)
            while waiting:
                yield _joined(waiting.popleft().result(), end)
        finally:
            for call in waiting:
                call.cancel()


def fingerprint(tokenizer: Any) -> str:
    """Changes with whatever changes the tokens of a text."""
    parts: list[Any] = [type(tokenizer).__name__, bool(getattr(tokenizer, "split_special_tokens", False))]
    if _is_fast(tokenizer):
        parts.append(_without_state(tokenizer).to_str())
    else:
        parts += [sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs)]
    parts += [tokenizer.bos_token_id, tokenizer.eos_token_id, pad_token(tokenizer)]
    return hashlib.sha256(json.dumps(parts, default=repr).encode("utf-8", "surrogatepass")).hexdigest()


def pad_token(tokenizer: Any) -> int:
    """What fills rows: the padding token, else the end token, else 0. It is never learnt."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def num_ids(tokenizer: Any) -> int:
    """Every id is below it; more than len(tokenizer) where the vocabulary has holes."""
    return max(tokenizer.get_vocab().values(), default=0) + 1


def _encoder(tokenizer: Any, probe: list[str], special: bool) -> Callable[[list[str]], list[list[int]]]:
    """The function from texts to ids: of the tokenizers library directly where that gives the same."""

    def slow(texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        return list(tokenizer(texts, **options)["input_ids"])

    if not _is_fast(tokenizer):
        return slow
    backend = _without_state(tokenizer)
    # Without offsets, which cost a pass over the text; not in every version of the library.
    call = getattr(backend, "encode_batch_fast", backend.encode_batch)

    def fast(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in call(texts, add_special_tokens=special)]

    # A class of transformers may do more than its backend.
    return fast if fast(probe) == slow(probe) else slow


def _is_fast(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))


def _without_state(tokenizer: Any) -> Any:
    """A copy of the tokenizer's backend that neither cuts nor pads: others may set that on the shared one."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _joined(encoded: list[list[int]], end: int | None) -> tuple[array[int], list[int]]:
    flat = array("I")
    lengths = []
    for ids in encoded:
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        flat.fromlist(ids)
        lengths.append(len(ids))
    return flat, lengths


def _local(origins: Sequence[Origin]) -> list[list[Any]]:
    """Identities of what is on this machine."""
    return [list(origin.identity) for origin in origins if origin.kind != "hub"]


def in_kilobytes(what: str, origins: Sequence[Origin], begin: Begin | None) -> Callable[[int], None]:
    """The function to tell of bytes read, which `begin`'s bar shows as kilobytes of all origins."""
    total = sum(origin.size for origin in origins)
    if begin is None or not total:
        return lambda amount: None
    advance = begin(f"{what} (kB)", total // KILOBYTE)
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        before, done = done // KILOBYTE, done + amount
        if step := done // KILOBYTE - before:
            advance(step)

    return add
