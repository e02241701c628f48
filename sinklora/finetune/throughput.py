"""Tokens per second, attention's share of a step, and memory, in the logs of any Trainer."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training.devices import peak_memory

logger = logging.getLogger("sinklora")

# Operators of attention, forward and backward, as the profiler names them.
_ATTENTION = re.compile(r"sinklora::|scaled_dot_product|flash_attn|flash_attention")


class ThroughputCallback(TrainerCallback):
    """Adds to what a Trainer of transformers or TRL logs, for its log_history and report_to alike:

    * tokens_per_second: tokens that the model was given in training, without padding that an attention_mask
      tells of, by the time since the last log without evaluations and checkpoints; data loading counts.
    * attention_share: of a step's time, forward and backward, from 0 to 1; in the log after a step that was
      profiled. The operators of SF-Attn and of torch's fused attention are counted, on CUDA by their time on
      the device; a model's own eager attention is not one operator and counts as nothing.
    * memory_bytes: the most bytes that torch held on the CUDA device, else that the process held.

    The same as a line of the logger "sinklora" (level INFO). Each process counts its own tokens and takes the
    others' to be as many.

    Args:
        profile_every: profile a step after so many, the second step first; None: never. Other steps cost
            nothing that can be measured; a profiled one takes longer, and is not counted in
            tokens_per_second.

    Attributes: tokens_per_second, attention_share and memory as last logged, None before.
    """

    def __init__(self, profile_every: int | None = 100) -> None:
        if profile_every is not None:
            if isinstance(profile_every, bool) or not isinstance(profile_every, int):
                raise TypeError(f"profile_every: expected an integer, got {type(profile_every).__name__}")
            if profile_every < 1:
                raise ValueError(f"profile_every: expected at least 1, got {profile_every}")
        self.profile_every = profile_every
        self.tokens_per_second: float | None = None
        self.attention_share: float | None = None
        self.memory: int | None = None
        self._steps = 0
        self._share: float | None = None  # measured and not yet logged
        self._profile: OperatorTimes | None = None
        self._hook: Any = None
        self._reset()

    def _reset(self) -> None:
        self._tokens: int | torch.Tensor = 0
        self._seconds = 0.0
        self._mark = time.perf_counter()

    # ---- what the Trainer tells ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._go_first()
        self._unhook()
        # In a compiled model a count that changes would be compiled again and again.
        count = torch.compiler.disable(self._count)
        self._hook = kwargs["model"].register_forward_pre_hook(count, with_kwargs=True)
        self._steps = 0
        self._reset()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = self.profile_every is not None and self._steps % self.profile_every == min(
            1, self.profile_every - 1
        )
        # Where the user profiles already, there is no second profile.
        if due and not torch._C._autograd._profiler_enabled():
            self._before_profile = self._tokens
            self._profile = OperatorTimes(args.device)
            self._mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps += 1
        if self._profile is None:
            now = time.perf_counter()
            self._seconds, self._mark = self._seconds + now - self._mark, now
            return
        self._share = self._profile.attention_share()
        self._profile = None
        self._tokens = self._before_profile
        self._mark = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return  # an evaluation's, or the summary at the end
        # The loss that is logged was read from the device, so that what was begun has ended.
        seconds = self._seconds + time.perf_counter() - self._mark
        tokens = int(self._tokens) * args.world_size
        found: dict[str, float] = {"memory_bytes": peak_memory(args.device)}
        if tokens and seconds > 0:
            found["tokens_per_second"] = tokens / seconds
            self.tokens_per_second = found["tokens_per_second"]
        if self._share is not None:
            found["attention_share"] = self.attention_share = self._share
            self._share = None
        self.memory = int(found["memory_bytes"])
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)  # a copy of logs, made before
        if state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, self._line())
        self._reset()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._unhook()

    # ---- how it is counted ----

    def _count(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self._tokens = self._tokens + mask.sum()  # stays on the device until it is logged
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        self._tokens = self._tokens + ids.numel()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._profile is not None:  # an error ended the training within a step
            self._profile.attention_share()
            self._profile = None

    def _go_first(self) -> None:
        """Before the callbacks that report logs elsewhere, which the Trainer puts before its user's.

        A callback is not told who calls it; where that cannot be found, only log_history has the figures.
        """
        handler = sys._getframe(2).f_locals.get("self")
        callbacks = getattr(handler, "callbacks", None)
        if isinstance(callbacks, list) and self in callbacks:
            # A new list: the old one is being gone through.
            handler.callbacks = [self, *(each for each in callbacks if each is not self)]  # type: ignore[union-attr]

    def _line(self) -> str:
        parts = []
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.attention_share is not None:
            parts.append(f"attention {self.attention_share:.0%} of a step")
        return ", ".join([*parts, f"at most {(self.memory or 0) / 2**30:.2f} GiB"])


class OperatorTimes:
    """Profiles from its making until it is asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]
        self.profile = torch.profiler.profile(activities=activities)
        with _no_debug_lines():
            self.profile.start()
        self.begun = time.perf_counter()

    def attention_share(self) -> float:
        """Ends the profile; the share of attention's operators in the time since, on CUDA in the device's."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.device)
        whole = 1e6 * (time.perf_counter() - self.begun)
        with _no_debug_lines():
            self.profile.stop()
        operators = [e for e in self.profile.events() or () if e.device_type.name == "CPU"]
        attention = [e for e in operators if _ATTENTION.search(e.name) and not _inside_attention(e)]
        if on_cuda:
            # A kernel's time is its operator's own.
            whole = sum(event.self_device_time_total for event in operators)
        taken = sum(event.device_time_total if on_cuda else event.cpu_time_total for event in attention)
        return float(taken / whole) if whole else 0.0


@contextlib.contextmanager
def _no_debug_lines() -> Iterator[None]:
    """torch's profiler writes two lines to the terminal for debuggers, past Python and whatever its level."""
    try:
        kept = os.dup(2)
    except OSError:  # no stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stderr.flush()
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _inside_attention(event: Any) -> bool:
    """Whether an operator was called by one that counts already."""
    parent = event.cpu_parent
    while parent is not None:
        if _ATTENTION.search(parent.name):
            return True
        parent = parent.cpu_parent
    return False
