"""Messages as one text, and where in it the answers are: chat templates, and Alpaca's wording without one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .instructions import Message

# Alpaca's wording, with which LongLoRA's models and many others were tuned.
PLAIN_HEADER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
PLAIN_QUESTION = "### Instruction:\n{content}\n\n### Response:"
# The same as a chat template; what stands for the begin token comes before it.
_PLAIN_TEMPLATE = (
    "{% set so_far = namespace(asked=[], apart='') %}"
    "{% if messages[0]['role'] != 'system' %}"
    f"{{{{ '{PLAIN_HEADER}' }}}}{{% set so_far.apart = '\\n\\n' %}}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ so_far.apart ~ message['content'] }}{% set so_far.apart = '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{% set so_far.asked = so_far.asked + [message['content']] %}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if so_far.asked %}"
    "{{ so_far.apart ~ '### Instruction:\\n' ~ so_far.asked | join('\\n\\n') ~ '\\n\\n### Response:' }}"
    "{% endif %}"
    "{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}"
    "{% set so_far.asked = [] %}{% set so_far.apart = '\\n\\n' %}"
    "{% else %}{{ raise_exception('expected system, user or assistant, got ' ~ message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if so_far.asked %}"
    "{{ so_far.apart ~ '### Instruction:\\n' ~ so_far.asked | join('\\n\\n') }}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:' }}{% endif %}"
    "{% endif %}"
)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# A dialogue of two answers: enough to see whether a template rewrites what is earlier.
_PROBE: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


class Rendered(NamedTuple):
    """The text of a conversation, special tokens included, and the (begin, end) of its answers in
    characters."""

    text: str
    answers: list[tuple[int, int]]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat_template: str | None = None
) -> Rendered:
    """A conversation up to its last answer, as tokenize_conversation documents it.

    Raises:
        ValueError: no answer, or a template or a tokenizer that it cannot be written with.
    """
    last = max((i for i, each in enumerate(messages) if each["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError("messages: expected at least one answer (role assistant), got none")
    messages = list(messages[: last + 1])
    template = chat_template or own_template(tokenizer)
    if template is None:
        return _plain(tokenizer, messages)
    return (_by_tags if has_generation_tags(template) else _by_prefixes)(tokenizer, messages, template)


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template, of several the one named default; None where it has none."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or None


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a model that was tuned without one: what is written then, for this tokenizer."""
    return ("{{ bos_token }}" if _begin_text(tokenizer) else "") + _PLAIN_TEMPLATE


def has_generation_tags(template: str) -> bool:
    """Does a chat template mark its answers with {% generation %}?"""
    return _GENERATION.search(template) is not None


def rewrites_history(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Does a template without generation tags write earlier messages differently once more is said?

    Templates that strip the reasoning from all but the last answer do.
    """
    try:
        _by_prefixes(tokenizer, _PROBE, template)
    except _RewritesError:
        return True
    except ValueError:
        return False  # it takes no such dialogue; each row will say what is wrong with it
    return False


class _RewritesError(ValueError):
    """The template is not stable under prefixes."""

    def __init__(self) -> None:
        super().__init__(
            "chat template: it writes earlier messages differently once more is said (some leave out the "
            "reasoning of earlier answers), so the tokens of answers cannot be told; put tags "
            "{% generation %} around its answers, or give rows with one answer each"
        )


def _by_tags(tokenizer: Any, messages: list[Message], template: str) -> Rendered:
    text, answers = _apply(tokenizer, messages, template, tags=True)
    if not any(begin < end for begin, end in answers):
        raise ValueError("chat template: its {% generation %} tags mark nothing of these messages")
    for message in messages:
        if message["role"] == "assistant":
            _require_words(message, text)
    return Rendered(text, [(begin, end) for begin, end in answers if begin < end])


def _by_prefixes(tokenizer: Any, messages: list[Message], template: str) -> Rendered:
    """An answer begins where the prompt for it ends, and ends where the text of the messages so far does.

    Where a template writes an end of its own behind the last message, it is the answer's words that end it.
    """
    full, _ = _apply(tokenizer, messages, template)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # A chat may begin with an answer; templates are not asked to write nothing.
        prompt = _apply(tokenizer, messages[:i], template, prompt=True)[0] if i else ""
        said = full if i == len(messages) - 1 else _apply(tokenizer, messages[: i + 1], template)[0]
        if not full.startswith(prompt):
            raise _RewritesError
        begin, end = len(prompt), len(said)
        if not full.startswith(said):
            words = _words(message)
            end = said.rfind(words, begin) + len(words)
            if not full.startswith(said[:end]):
                raise _RewritesError
        _require_words(message, full[begin:end])
        answers.append((begin, end))
    return Rendered(full, answers)


def _words(message: Message) -> str:
    """What an answer says at the end: what it reasoned before may be written elsewhere, or left out."""
    return message["content"].rpartition("</think>")[2].strip()


def _require_words(message: Message, text: str) -> None:
    if _words(message) not in text:
        raise ValueError(
            "chat template: it does not write the answers as they are (perhaps it expects their content in "
            f"another form), got {text[-60:]!r} for {message['content'][:60]!r}"
        )


def _apply(
    tokenizer: Any, messages: list[Message], template: str, *, prompt: bool = False, tags: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """What a template writes, as apply_chat_template calls it, and what stands between its tags."""
    try:
        done: Any = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=tags,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"chat template: {str(error).strip() or type(error).__name__}") from error
    texts, marked = done
    return texts[0], [(int(begin), int(end)) for begin, end in marked[0]] if tags else []


def _plain(tokenizer: Any, messages: list[Message]) -> Rendered:
    if tokenizer.eos_token is None:
        raise ValueError("tokenizer: expected an end token (eos_token) or a chat template, found neither")
    text = _begin_text(tokenizer)
    answers = []
    waiting: list[str] = [] if messages[0]["role"] == "system" else [PLAIN_HEADER]
    questions: list[str] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            waiting.append(content)
        elif role == "user":
            questions.append(content)
        elif role == "assistant":
            if questions:
                waiting.append(PLAIN_QUESTION.format(content="\n\n".join(questions)))
            text += "\n\n".join(waiting)
            answer = content + tokenizer.eos_token
            answers.append((len(text), len(text) + len(answer)))
            text += answer
            waiting, questions = [""], []
        else:
            raise ValueError(
                f"messages: expected a tokenizer with a chat template for the role {role}, got one without"
            )
    return Rendered(text, answers)


def _begin_text(tokenizer: Any) -> str:
    """The begin token as text, where this tokenizer puts it before any text."""
    begin = tokenizer.bos_token_id
    return tokenizer.bos_token if begin is not None and tokenizer("a")["input_ids"][0] == begin else ""
