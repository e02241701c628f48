"""What stands between a generating model and its reader: text out of tokens, and stopping by Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

# Tokens before the new ones that are decoded with them: a space at the front of a word shows only then.
CONTEXT_TOKENS = 8
# What a decoder writes for bytes that are no character, and so for one that is not complete yet.
REPLACEMENT = "\ufffd"
# Presses of Ctrl-C in one answer until the program gives up waiting for the model to look at the flag.
PATIENCE = 3


class TokenText:
    """Turns tokens into text piece by piece; a character is given out once all its tokens are there.

    Args:
        context: tokens that precede the first new one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self.tokenizer: Any = tokenizer
        self.window = list(context[-CONTEXT_TOKENS:])
        # Everything up to here in the window has been given out, and so have `given` characters after it.
        self.done = len(self.window)
        self.given = 0

    def push(self, token: int) -> str:
        """The text that can be shown now."""
        self.window.append(token)
        text = self._pending()
        complete = text.rstrip(REPLACEMENT)
        piece = complete[self.given :]
        if text and complete == text:
            del self.window[: self.done]
            self.done, self.given = len(self.window), 0
        else:
            self.given = max(self.given, len(complete))
        return piece

    def finish(self) -> str:
        """The rest: bytes that never became a character."""
        piece = self._pending()[self.given :]
        self.done, self.given = len(self.window), 0
        return piece

    def _pending(self) -> str:
        before, after = self._decode(self.window[: self.done]), self._decode(self.window)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TokenSink(BaseStreamer):
    """The streamer that hands each new token to a function; the prompt, which comes first, is left out."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.prompt_pending = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_pending:
            self.prompt_pending = False
            return
        for token in value.reshape(-1).tolist():
            self.on_token(token)

    def end(self) -> None:
        pass


class Interrupt:
    """A flag that Ctrl-C sets and generation reads between two forwards.

    An exception could leave a forward between two layers, and the cache's layers with different lengths.
    """

    def __init__(self) -> None:
        self.presses = 0

    @property
    def requested(self) -> bool:
        return self.presses > 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT. Where the model does not look at the flag, the third press ends the
        program."""
        self.presses += 1
        if self.presses >= PATIENCE:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Takes SIGINT for the length of a with block, from a flag that is not set."""
        self.presses = 0
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        before = signal.signal(signal.SIGINT, self.handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class StopWhenInterrupted(StoppingCriteria):
    """Ends generation after the token during which the flag was set."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.interrupt.requested, device=input_ids.device)
