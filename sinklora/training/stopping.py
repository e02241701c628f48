"""Ctrl-C and SIGTERM: the step is finished and saved before the run ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppedError(Exception):
    """A run ended early because it was asked to; what it had learnt is saved.

    exit_code: as a shell gives it for the signal, 130 or 143.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def format_message(self) -> str:
        """What the command line shows."""
        return str(self)


class StopRequest:
    """Notes the first Ctrl-C or SIGTERM inside its with block, for the loop to look at; a second Ctrl-C acts
    at once.

    Outside the main thread, where Python takes no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """What was asked with, in words."""
        return _NAMES.get(signal.Signals(self.signal_number), str(self.signal_number))

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal_number:
            self.signal_number = number
            # No logging here: its locks may be held by what was interrupted.
            if os.environ.get("RANK", "0") == "0":  # under torchrun all processes get the signal
                sys.stderr.write("\nstopping after this step; Ctrl-C again stops at once\n")
