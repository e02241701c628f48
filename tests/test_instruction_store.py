"""Instruction data to stores of conversations: what is kept, what is cut, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from instruction_support import CHATML, END, learnt, turn_tokenizer

from sinklora.data.instruction_store import REPORT, tokenize_instructions
from sinklora.data.overlong import GAP, KEPT_AT_EACH_END, TruncationReport
from sinklora.data.shards import TokenStore

CONTEXT = 400
Make = Callable[..., tuple[TokenStore, TruncationReport]]


def row(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "output": answer}


LONG = "Begin " + "é word " * 200 + "What is asked?"
ROWS = [row("Short?", "Yes."), row(LONG, "The answer, whole."), row("Second?", "No.")]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(rows: list[Any], **options: Any) -> tuple[TokenStore, TruncationReport]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        options = {"context": CONTEXT, **options}
        return tokenize_instructions([str(path)], turn_tokenizer(CHATML), tmp_path / "cache", **options)

    return make


def texts(store: TokenStore) -> list[str]:
    tokenizer = turn_tokenizer()
    return [tokenizer.decode(store[i]) for i in range(len(store))]


def answers(store: TokenStore, document: int) -> list[str]:
    assert store.mask is not None
    mask = store.mask[store.offsets[document] : store.offsets[document + 1]]
    return learnt(turn_tokenizer(), store[document].tolist(), mask.tolist())


def test_conversations_are_stored_with_the_mask_of_their_answers(make: Make) -> None:
    store, report = make([ROWS[0], ROWS[2]])
    assert texts(store) == [
        f"<|user|>\nShort?{END}\n<|assistant|>\nYes.{END}\n",
        f"<|user|>\nSecond?{END}\n<|assistant|>\nNo.{END}\n",
    ]
    assert [answers(store, i) for i in range(2)] == [[f"Yes.{END}"], [f"No.{END}"]]
    assert (report.rows, report.conversations, report.tokens) == (2, 2, store.num_tokens)
    assert report.answer_tokens == len("Yes.") + len("No.") + 2
    assert report.lines()[0] == f"nothing was truncated: no row is longer than {CONTEXT} tokens"


def test_shorten_cuts_the_middle_of_the_longest_question_alone(make: Make, tmp_path: Path) -> None:
    store, report = make(ROWS)
    text = texts(store)[1]
    assert text.startswith("<|user|>\nBegin é word")
    assert GAP in text
    assert text.endswith(f"é word What is asked?{END}\n<|assistant|>\nThe answer, whole.{END}\n")
    before, after = text.split(GAP)
    question = before.removeprefix("<|user|>\n"), after.partition(END)[0]
    assert all(len(part.encode()) >= KEPT_AT_EACH_END for part in question)
    assert LONG.startswith(question[0]) and LONG.endswith(question[1])
    assert answers(store, 1) == [f"The answer, whole.{END}"]
    # Not more than needed is cut: a character has two tokens at most.
    assert CONTEXT - 2 <= len(store[1]) <= CONTEXT
    length = len(turn_tokenizer().encode(LONG)) + len("<|user|>\n~\n<|assistant|>\nThe answer, whole.~\n")
    source = f"{tmp_path / 'rows.jsonl'}:2"
    assert report.shortened.rows == 1
    assert report.shortened.tokens == length
    assert report.shortened.tokens_removed == length - len(store[1])
    assert report.shortened.longest == report.longest == {"source": source, "tokens": length}
    assert "shortened: 1 of 3 rows, those longer than 400 tokens," in report.lines()[0]
    assert f"the longest has {length:,} ({source}); answers are whole" in report.lines()[0]
    assert json.loads((store.folder / REPORT).read_text())["shortened"]["sources"] == [source]


def test_of_several_questions_the_longest_is_cut(make: Make) -> None:
    messages = [
        {"role": "user", "content": "a" * 150},
        {"role": "assistant", "content": "b" * 40},
        {"role": "user", "content": "c" * 200},
        {"role": "assistant", "content": "d"},
    ]
    store, _ = make([{"messages": messages}])
    text = texts(store)[0]
    assert "a" * 150 in text and "b" * 40 in text and "c" * 64 + GAP + "c" * 64 in text
    assert answers(store, 0) == ["b" * 40 + END, "d" + END]


@pytest.mark.parametrize(
    "long",
    [
        row("Short?", "x" * 500),
        row("q" * 200, "x" * 300),
        {"messages": [{"role": "assistant", "content": "x" * 500}]},
    ],
    ids=["long answer", "ends would be cut", "no question"],
)
def test_what_cannot_be_shortened_is_left_out(make: Make, long: dict[str, Any]) -> None:
    store, report = make([ROWS[0], long])
    assert len(store) == 1
    assert (report.shortened.rows, report.dropped.rows) == (0, 1)
    assert report.dropped.tokens == report.dropped.tokens_removed > CONTEXT
    assert "left out: 1 of 2 rows, not to be shortened to 400 tokens" in report.lines()[0]


def test_drop_and_error(make: Make, tmp_path: Path) -> None:
    store, report = make(ROWS, overlong="drop")
    assert len(store) == 2
    assert (report.rows, report.conversations, report.dropped.rows, report.shortened.rows) == (3, 2, 1, 0)
    assert "left out: 1 of 3 rows, longer than 400 tokens" in report.lines()[0]
    with pytest.raises(
        ValueError, match=rf"overlong: {tmp_path}/rows.jsonl:2: expected at most 400 tokens, got \d+"
    ):
        make(ROWS, overlong="error")
    with pytest.raises(ValueError, match="overlong: expected one of shorten, drop, error, got cut"):
        make(ROWS, overlong="cut")


def test_rows_without_an_answer_are_left_out_and_counted(make: Make) -> None:
    store, report = make([ROWS[0], row("Empty?", " "), ROWS[2]])
    assert len(store) == 2
    assert report.without_answer == 1
    assert "left out: 1 of 3 rows, without text in any answer; the first is" in report.lines()[1]
    with pytest.raises(ValueError, match=r"data: no conversation is left: .* without text in any answer"):
        make([row("Empty?", "")])


def test_answers_without_an_end_are_said(make: Make) -> None:
    endless = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    _, report = make([ROWS[0]], chat_template=endless)
    assert report.unended == 1
    assert "no end: 1 of 1 conversations end without a special token" in report.lines()[-1]


def test_the_same_is_made_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first, report = make(ROWS)
    monkeypatch.setattr("sinklora.data.instruction_store.encode", None)
    again, same = tokenize_instructions(
        [str(first.folder.parent.parent / "rows.jsonl")],
        turn_tokenizer(CHATML),
        first.folder.parent,
        context=CONTEXT,
    )
    assert again.folder == first.folder
    assert same == report
    monkeypatch.undo()
    others = [
        {"context": 401},
        {"overlong": "drop"},
        {"system": "Be kind."},
        {"chat_template": CHATML + "{# other #}"},
    ]
    assert len({make(ROWS, **options)[0].folder for options in [{}, *others]}) == 5


def test_a_system_message_comes_before_those_that_have_none(make: Make) -> None:
    own = {
        "messages": [
            {"role": "system", "content": "Mine."},
            *({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
        ]
    }
    store, _ = make([ROWS[0], own], system="Be kind.")
    assert texts(store)[0].startswith(f"<|system|>\nBe kind.{END}\n<|user|>\nShort?")
    assert texts(store)[1].startswith(f"<|system|>\nMine.{END}\n<|user|>\na")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "x"}, r"data: .*rows.jsonl:2: expected instruction and output"),
        ([1], r"data: .*rows.jsonl:2: "),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            r"data: .*rows.jsonl:2: expected at least one answer",
        ),
    ],
)
def test_a_bad_row_is_named_by_its_line(make: Make, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([ROWS[0], bad])


def test_a_template_that_refuses_a_row_names_its_line(make: Make) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match=r"data: .*rows.jsonl:1: chat template: no system"):
        make(ROWS, chat_template=template, system="Be kind.")
