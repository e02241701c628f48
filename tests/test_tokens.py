"""Tokenised once: the tokens of whole documents, found again while nothing changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from sinklora.data import tokens
from sinklora.data.sources import Document, read_documents
from sinklora.data.tokens import tokenize_documents
from sinklora.tokenizer import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    (place / "inner").mkdir(parents=True)
    (place / "b.txt").write_text("second é")
    (place / "inner" / "a.txt").write_text("third")
    (place / "a.txt").write_text("first")
    (place / ".hidden").write_text("never")
    return place


def test_a_folder_is_read_in_order(folder: Path) -> None:
    found = [(d.text, Path(d.source).name) for d in read_documents([str(folder)])]
    assert found == [("first", "a.txt"), ("second é", "b.txt"), ("third", "a.txt")]


def test_tokens_are_those_of_whole_documents(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(64)
    store = tokenize_documents([str(folder)], tokenizer, tmp_path / "cache")
    expected = [tokenizer(text)["input_ids"] + [258] for text in ("first", "second é", "third")]
    assert [store[index].tolist() for index in range(len(store))] == expected
    assert store.tokens.dtype == "uint16" and store.pad_token == 256


def test_an_unchanged_call_finds_the_store(folder: Path, tmp_path: Path) -> None:
    def make(**options) -> Path:
        return tokenize_documents([str(folder)], byte_tokenizer(64), tmp_path / "cache", **options).folder

    first = make()
    assert make() == first
    assert make(add_eos=False) != first
    (folder / "a.txt").write_text("changed")
    assert make() != first


def test_many_batches_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 50)
    tokenizer = byte_tokenizer(64)
    texts = [f"document {n} " * (n % 7 + 1) for n in range(100)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    advanced: list[int] = []
    store = tokenize_documents(
        [str(path)], tokenizer, tmp_path / "cache", begin=lambda what, total: advanced.append
    )
    assert [tokenizer.decode(store[index][:-1]) for index in range(len(store))] == texts
    assert sum(advanced) == path.stat().st_size // 1000


def test_little_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory does not grow with the data."""
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 50)
    begun: list[int] = []

    def documents() -> Iterator[Document]:
        for number in range(1000):
            begun.append(number)
            yield Document("x" * 50, "test")

    encoded = tokens.encode_documents(documents(), byte_tokenizer(64))
    for done, _ in enumerate(encoded, 1):
        assert len(begun) <= done + tokens.CALLS
    assert len(begun) == 1000


def test_begin_and_end_are_as_the_tokenizer_adds_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab")
    both = byte_tokenizer(64)
    both.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 257), ("<|end|>", 258)]
    )
    assert tokenize_documents([str(path)], both, tmp_path / "1")[0].tolist() == [257, 97, 98, 258]
    no_end = byte_tokenizer(64)
    no_end.eos_token = None
    assert tokenize_documents([str(path)], no_end, tmp_path / "2")[0].tolist() == [97, 98]


class Shouting(transformers.PreTrainedTokenizerFast):
    """Does more than its backend."""

    def __call__(self, text, **options):
        return super().__call__([each.upper() for each in text], **options)


@pytest.mark.parametrize("kind", ["more than its backend", "no backend"])
def test_tokenizers_that_are_no_mere_backend(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab")
    tokenizer = Shouting(tokenizer_object=byte_tokenizer(64).backend_tokenizer)
    if kind == "no backend":
        tokenizer.__class__ = type("Slow", (Shouting,), {"is_fast": False})
    assert tokenize_documents([str(path)], tokenizer, tmp_path / "cache")[0].tolist() == [65, 66]


def test_settings_of_the_shared_tokenizer_do_not_matter(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(64)
    expected = tokenize_documents([str(folder)], tokenizer, tmp_path / "1")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    found = tokenize_documents([str(folder)], tokenizer, tmp_path / "2")
    assert found.tokens.tolist() == expected.tokens.tolist()


def test_a_change_of_the_tokenizer_makes_it_anew(folder: Path, tmp_path: Path) -> None:
    first = byte_tokenizer(64)
    second = byte_tokenizer(64)
    second.add_tokens(["second"])
    stores = [tokenize_documents([str(folder)], each, tmp_path) for each in (first, second)]
    assert [len(store[1]) for store in stores] == [len("second é".encode()) + 1, 5]


def test_files_that_change_meanwhile_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab")
    read = tokens.read_documents

    def change(*sources, **options):
        yield from read(*sources, **options)
        path.write_text("abc")

    monkeypatch.setattr(tokens, "read_documents", change)
    with pytest.raises(ValueError, match="data: files changed while they were read"):
        tokenize_documents([str(path)], byte_tokenizer(64), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*tokens-*[0-9a-f]"))


def test_wrong_bytes_are_named(folder: Path) -> None:
    (folder / "c.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(ValueError, match=r"c\.txt:2: expected UTF-8, got the byte 0xff at offset 8"):
        list(read_documents([str(folder)]))
