"""How a dialogue becomes tokens: the tokenizer's chat template, LLaMA-2's [INST], or plain text.

Each format adds a message to tokens that are there already, so that a cache of them goes on.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from ..tokenizer import SPECIAL_TOKENS

STYLES = ("auto", "template", "llama2", "plain")


@dataclasses.dataclass
class Dialogue:
    """What was said, and its tokens as the model reads them; an end token that the model wrote is left out.

    messages: {"role": "system" | "user" | "assistant", "content": text}. rendered: the text of the tokens up
    to where the last answer began (chat templates only).
    """

    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    rendered: str = ""


class Prompt(NamedTuple):
    """All tokens up to where the answer begins. rewritten: they do not begin with the dialogue's tokens.

    rendered: their text, where a chat template made them.
    """

    tokens: list[int]
    rewritten: bool = False
    rendered: str = ""


class ChatFormat(Protocol):
    """name: as in STYLES. note: what a user should know before the first message, or nothing."""

    name: str
    note: str

    def prompt(self, dialogue: Dialogue, message: str) -> Prompt:
        """The tokens that ask for an answer to message. Changes nothing. ValueError: it cannot be asked."""


class TemplateFormat:
    """The tokenizer's own chat template."""

    name = "template"
    note = ""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    def prompt(self, dialogue: Dialogue, message: str) -> Prompt:
        text = self._render([*dialogue.messages, {"role": "user", "content": message}])
        rest = self._after_last_answer(dialogue, text)
        if rest is None:
            return Prompt(_encode(self.tokenizer, text), bool(dialogue.tokens), text)
        return Prompt([*dialogue.tokens, *_encode(self.tokenizer, rest)], False, text)

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise whatever they like
            raise ValueError(
                f"chat template: {str(error).strip() or type(error).__name__}; --style chooses another format"
            ) from error
        return text

    @staticmethod
    def _after_last_answer(dialogue: Dialogue, text: str) -> str | None:
        """What the template puts after the last answer; None where it no longer writes what came before so.

        White space around the answer may differ: templates trim, and the cache has what the model wrote.
        """
        if not dialogue.tokens or not text.startswith(dialogue.rendered):
            return None
        answer = dialogue.messages[-1]["content"].strip()
        rest = text[len(dialogue.rendered) :]
        if not answer:
            return rest
        rest = rest.lstrip()
        return rest[len(answer) :] if rest.startswith(answer) else None


class Llama2Format:
    """[INST] message [/INST] answer, each pair between the tokens of begin and end."""

    name = "llama2"
    note = "the tokenizer has no chat template; LLaMA-2's [INST] format is used"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    def prompt(self, dialogue: Dialogue, message: str) -> Prompt:
        system = ""
        if not dialogue.tokens and dialogue.messages:
            system = f"<<SYS>>\n{dialogue.messages[0]['content']}\n<</SYS>>\n\n"
        end = [self.tokenizer.eos_token_id] if dialogue.tokens else []
        begin = [self.tokenizer.bos_token_id]
        special = [token for token in (*end, *begin) if token is not None]
        text = f"[INST] {system}{message.strip()} [/INST]"
        return Prompt([*dialogue.tokens, *special, *_encode(self.tokenizer, text)])


class PlainFormat:
    """The text itself: the model goes on where the message ends."""

    name = "plain"
    note = "this model was not trained on dialogues: it goes on with the text so far, which you and it write"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    def prompt(self, dialogue: Dialogue, message: str) -> Prompt:
        if dialogue.tokens:
            return Prompt([*dialogue.tokens, *_encode(self.tokenizer, message)])
        before = "".join(f"{each['content']}\n" for each in dialogue.messages)
        return Prompt(list(self.tokenizer(before + message)["input_ids"]))


def choose_format(tokenizer: PreTrainedTokenizerBase, style: str = "auto") -> ChatFormat:
    """The format of a style in STYLES; "auto" is the tokenizer's template, plain text for sinklora's
    byte tokenizer, else LLaMA-2's.

    Raises:
        ValueError: an unknown style, or "template" where there is none.
    """
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style}")
    if style == "auto":
        style = "template" if tokenizer.chat_template else "plain" if _is_bytes(tokenizer) else "llama2"
    if style == "template":
        if not tokenizer.chat_template:
            raise ValueError("style: expected a style that the tokenizer has, got template; it has none")
        return TemplateFormat(tokenizer)
    return Llama2Format(tokenizer) if style == "llama2" else PlainFormat(tokenizer)


def _is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    special = all(getattr(tokenizer, name, None) == text for name, text in SPECIAL_TOKENS.items())
    return special and len(tokenizer) == 256 + len(SPECIAL_TOKENS)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
