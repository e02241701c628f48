"""Conversations as tokens: the mask is on the answers and on what ends them, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from instruction_support import (
    CHATML,
    CLOSING,
    END,
    LLAMA2,
    STRIPPING,
    TAGGED,
    learnt,
    turn_tokenizer,
    two_turns,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sinklora.data.conversations import tokenize_conversation
from sinklora.data.templates import (
    PLAIN_HEADER,
    has_generation_tags,
    plain_template,
    render,
    rewrites_history,
)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, [f"A letter.{END}", f"Yes,\nsure.{END}"]),
        (TAGGED, [f"A letter.{END}", f"Yes,\nsure.{END}"]),
        (CLOSING, [f"A letter.{END}", f"Yes,\nsure.{END}"]),
        (LLAMA2, [" A letter. <|end|>", " Yes,\nsure. <|end|>"]),
        (None, ["A letter.<|end|>", "Yes,\nsure.<|end|>"]),
    ],
    ids=["chatml", "tagged", "closing", "llama2", "plain"],
)
def test_the_mask_is_on_the_answers(template: str | None, answers: list[str]) -> None:
    tokenizer = turn_tokenizer(template)
    ids, mask = tokenize_conversation(tokenizer, two_turns())
    assert learnt(tokenizer, ids, mask) == answers
    if template:
        # Not a token is other than the template's own.
        rendered = tokenizer.apply_chat_template(two_turns(), return_dict=False)
        assert ids == rendered


def test_a_prompt_is_what_the_model_is_asked_with() -> None:
    tokenizer = turn_tokenizer(CHATML)
    ids, mask = tokenize_conversation(tokenizer, two_turns())
    asked = tokenizer.apply_chat_template(two_turns()[:3], add_generation_prompt=True, return_dict=False)
    assert ids[: len(asked)] == asked
    assert mask[: len(asked)].count(1) == len("A letter.") + 1
    assert mask[len(asked) :] == [1] * (len("Yes,\nsure.") + 1) + [0]


def test_without_a_template_the_wording_is_alpacas() -> None:
    tokenizer = turn_tokenizer()
    messages = [
        {"role": "system", "content": "Be kind."},
        *two_turns(),
        {"role": "user", "content": "unanswered"},
    ]
    text = tokenizer.decode(tokenize_conversation(tokenizer, messages).input_ids)
    assert text == (
        "Be kind.\n\n### Instruction:\nWhat is ä?\n\n### Response:A letter.<|end|>"
        "\n\n### Instruction:\nSure?\n\n### Response:Yes,\nsure.<|end|>"
    )
    assert tokenizer.decode(tokenize_conversation(tokenizer, two_turns()).input_ids).startswith(
        f"{PLAIN_HEADER}\n\n### Instruction:\nWhat is ä?\n\n### Response:"
    )


@pytest.mark.parametrize(
    "roles",
    [
        "user assistant",
        "system user assistant",
        "user user assistant user assistant",
        "assistant user assistant",
        "user assistant system user assistant assistant",
        "user system user assistant",
        "system system assistant",
    ],
)
@pytest.mark.parametrize("begins", [False, True])
def test_alpacas_wording_as_a_template_says_the_same(roles: str, begins: bool) -> None:
    tokenizer = turn_tokenizer()
    if begins:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    dialogue = [{"role": role, "content": f"'{i}' {{}}\n"} for i, role in enumerate(roles.split())]
    expected = render(tokenizer, dialogue)
    template = plain_template(tokenizer)
    assert render(tokenizer, dialogue, template) == expected
    assert expected.text.startswith("<|begin|>") == begins
    asked: Any = tokenizer.apply_chat_template(
        dialogue[:-1] or dialogue, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert asked == expected.text[: expected.answers[-1][0]]


def test_a_template_given_wins_over_the_tokenizers() -> None:
    tokenizer = turn_tokenizer(CHATML)
    ids, mask = tokenize_conversation(tokenizer, two_turns(), TAGGED)
    assert tokenizer.decode(ids).startswith("Q:What")
    assert learnt(tokenizer, ids, mask) == [f"A letter.{END}", f"Yes,\nsure.{END}"]


def test_a_template_that_rewrites_history_is_refused_where_it_matters() -> None:
    tokenizer = turn_tokenizer(STRIPPING)
    assert rewrites_history(tokenizer, STRIPPING)
    assert not any(rewrites_history(tokenizer, other) for other in (CHATML, CLOSING, LLAMA2))
    with pytest.raises(ValueError, match=r"writes earlier messages differently .* \{% generation %\}"):
        tokenize_conversation(tokenizer, two_turns())
    ids, mask = tokenize_conversation(tokenizer, two_turns()[:2])
    assert learnt(tokenizer, ids, mask) == [f"<think></think>A letter.{END}"]


def test_a_prompt_that_the_answer_does_not_continue_is_refused() -> None:
    prompting = STRIPPING.replace("%}A:{% endif %}", "%}A:<think>{% endif %}")
    assert prompting != STRIPPING
    tokenizer = turn_tokenizer(prompting.replace("<think></think>", ""))
    with pytest.raises(ValueError, match="writes earlier messages differently"):
        tokenize_conversation(tokenizer, two_turns()[:2])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system here') }}", "chat template: no system here"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", "chat template: "),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write the answers as they are"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            "mark nothing",
        ),
        ("{% for m in messages", "chat template: "),
    ],
)
def test_templates_that_do_not_fit_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_conversation(turn_tokenizer(template), two_turns())


def test_a_tool_needs_a_template_and_an_end_is_needed_without() -> None:
    tokenizer = turn_tokenizer()
    with pytest.raises(ValueError, match="template for the role tool"):
        tokenize_conversation(tokenizer, [{"role": "tool", "content": "3"}, *two_turns()])
    with pytest.raises(ValueError, match="expected at least one answer"):
        tokenize_conversation(tokenizer, two_turns()[:1])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected an end token"):
        tokenize_conversation(tokenizer, two_turns())


def test_tags_are_found_however_they_trim() -> None:
    assert has_generation_tags("{%- generation -%}x{%- endgeneration -%}")
    assert not has_generation_tags("{% if add_generation_prompt %}x{% endif %}")


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with a token ":A" across the border between prompt and answer, and a begin token."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"],
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Q:A Q:A :A :A :A"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_a_token_never_crosses_into_an_answer(merging: PreTrainedTokenizerFast) -> None:
    assert len(merging(":A")["input_ids"]) == 1
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}:"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A B"}]
    ids, mask = tokenize_conversation(merging, messages, template)
    assert learnt(merging, ids, mask) == ["A B</s>"]
    # The prompt's tokens are those of the prompt alone, as when the model is asked.
    assert [token for token, kept in zip(ids, mask, strict=True) if not kept] == merging("Q x:")["input_ids"]


def test_templates_that_trl_knows() -> None:
    """Real ones, in both forms: the answers are in the loss, the questions are not."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    names = (
        "llama3",
        "gemma",
        "qwen2_5",
        "phi3",
        "qwen3_instruct_2507",
        "cohere",
        "lfm2",
        "gptoss",
        "muse_glimmer",
    )
    seen: list[Any] = []
    for name in names:
        for path in (folder / f"{name}.jinja", folder / f"{name}_training.jinja"):
            if not path.is_file():
                continue
            tokenizer = turn_tokenizer(path.read_text(encoding="utf-8"))
            ids, mask = tokenize_conversation(tokenizer, two_turns())
            text = "".join(learnt(tokenizer, ids, mask))
            assert "A letter." in text and "Yes,\nsure." in text, name
            assert "What is" not in text and "Sure?" not in text, name
            seen.append(name)
    assert len(seen) >= len(names)
