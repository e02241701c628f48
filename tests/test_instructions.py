"""Rows of instruction data: every form becomes the same messages, and what has none says its line."""

from __future__ import annotations

from typing import Any

import pytest

from sinklora.data.instructions import to_messages

QUESTION = {"role": "user", "content": "Add 1 and 2."}
ANSWER = {"role": "assistant", "content": "3"}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add 1 and 2.", "output": "3"},
        {
            "instruction": "Add 1 and 2.",
            "input": "",
            "output": "3",
            "system": None,
            "text": "of another column",
        },
        {"messages": [QUESTION, ANSWER]},
        {"messages": [{**QUESTION, "tool_calls": None}, {**ANSWER, "weight": 1}], "conversations": None},
        {"conversations": [{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "3"}]},
        {"conversations": [QUESTION, ANSWER], "id": "a-1"},
        {"prompt": "Add 1 and 2.", "completion": "3"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Add 1 and 2."}]}, ANSWER]},
    ],
    ids=[
        "alpaca",
        "alpaca+",
        "messages",
        "messages+",
        "sharegpt",
        "conversations",
        "pair",
        "chat-pair",
        "parts",
    ],
)
def test_forms(row: dict[str, Any]) -> None:
    assert to_messages(row, "rows.jsonl:7") == [QUESTION, ANSWER]


def test_alpaca_puts_the_input_below_and_history_and_system_before() -> None:
    row = {
        "instruction": "Sum up.",
        "input": "A long text.",
        "output": "Long.",
        "system": "Be short.",
        "history": [["Hello", "Hi"]],
    }
    assert to_messages(row, "rows.jsonl:1") == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Sum up.\n\nA long text."},
        {"role": "assistant", "content": "Long."},
    ]


def test_reasoning_and_names_stay_for_templates_that_read_them() -> None:
    message = {"role": "assistant", "content": "3", "reasoning_content": "1+2", "name": "adder", "id": "x"}
    assert to_messages({"messages": [QUESTION, message]}, "f:1")[1] == {
        "role": "assistant",
        "content": "3",
        "reasoning_content": "1+2",
        "name": "adder",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "only"}, r"rows.jsonl:7: expected instruction and output .* the row has text$"),
        ({}, "rows.jsonl:7: .* the row has no fields"),
        (["a", "b"], r"rows.jsonl:7: expected an object with .* got \['a', 'b'\]"),
        ({"instruction": "a", "output": None}, "the row has instruction$"),
        ({"instruction": "a", "output": 3}, "rows.jsonl:7: output: expected text, got 3"),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            r"history\[0\]: expected a question and an answer",
        ),
        ({"instruction": "a", "output": "b", "history": "c"}, "history: expected a list of pairs, got 'c'"),
        ({"messages": "hello"}, "rows.jsonl:7: messages: expected a list of messages, got 'hello'"),
        ({"messages": []}, "messages: expected a list of messages"),
        ({"messages": [QUESTION]}, r"expected at least one answer \(role assistant\), got user"),
        (
            {"messages": [QUESTION, {"role": "robot", "content": "b"}]},
            r"messages\[1\]: role: expected one of",
        ),
        ({"messages": [QUESTION, {"content": "b"}]}, r"messages\[1\]: role: expected one of .* got None"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, r"messages\[1\]: content: expected text, got None"),
        ({"messages": [QUESTION, "b"]}, r"messages\[1\]: expected a message with role and content, got 'b'"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
            r"messages\[1\]: tool_calls: expected messages of text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            r"messages\[0\]: content: expected text, got \[",
        ),
        (
            {"conversations": [{"from": "human", "value": 1}]},
            r"conversations\[0\]: value: expected text, got 1",
        ),
        ({"prompt": "a", "completion": 4}, "completion: expected a list of messages, got 4"),
    ],
)
def test_what_is_no_conversation_says_where_and_what(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_messages(row, "rows.jsonl:7")
