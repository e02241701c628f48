"""transformers' Trainer as runs of sinklora need it: whole checkpoints, agreed stops, no step on a bad
loss."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from . import checkpoints
from .devices import peak_memory
from .sharding import WholeCheckpoints
from .stopping import StopRequest

if TYPE_CHECKING:
    from transformers import TrainingArguments

    _Base = Trainer
else:
    _Base = object


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient became NaN or infinite; the step that it belongs to was not taken."""


class SafeTraining(WholeCheckpoints):
    """Mixin that makes a Trainer's run safe to kill, to stop and to leave alone.

    Put it before transformers' Trainer or a subclass of it: `class Mine(SafeTraining, SFTTrainer)`.

    * A checkpoint is whole or absent (checkpoints.py): it is written under a scratch name, brought to the
      disk and renamed, at a moment that all processes agree on. `args.save_total_limit` keeps the newest.
    * `resume` continues from the newest whole checkpoint with the losses of a run that was never interrupted:
      the same rows in the same order, random state, schedule and optimiser. The loss is logged wherever a
      checkpoint is made, so that no average spans it.
    * Inside `with trainer.stop:` Ctrl-C and SIGTERM end the run after the step, with a checkpoint, at the
      same step in all processes. `trainer.stopped_by` is then the signal's number in all of them, else 0.
    * A loss or gradient that is NaN or infinite raises NonFiniteLossError in all processes before the
      optimiser takes its step, and no checkpoint is made.
    * What is logged of a step also has tokens (seen so far, padding included), tokens_per_second (of
      training alone) and memory (peak, bytes).

    The checks cost one exchange of two numbers a step between processes, and none in a single one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop = StopRequest()
        self.stopped_by = 0
        self._scratch: Path | None = None
        self._step_losses: list[torch.Tensor] = []
        self._step_tokens = 0
        self._logged_tokens = 0
        self._training_seconds = 0.0
        # It would replace a NaN by the average of the losses before.
        self.args.logging_nan_inf_filter = False
        self.add_callback(_Steps(self))
        self.remove_callback(PrinterCallback)

    def resume(self) -> Any:
        """Trains on from the newest whole checkpoint in args.output_dir, from the start where there is none.

        Raises:
            DamagedCheckpointError: every checkpoint is damaged.
        """
        found = checkpoints.last_whole(Path(str(self.args.output_dir)))
        return self.train(resume_from_checkpoint=None if found is None else str(found))

    # ---- what a step is ----

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._step_tokens += int(inputs["input_ids"].numel()) * self.args.world_size
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_losses.append(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer asks for it when all gradients of a step are there and the optimiser has not moved."""
        norm = super()._get_grad_norm(*args, **kwargs)
        self._agree(norm)
        return norm

    def _agree(self, norm: Any) -> None:
        """Brings a bad number or a wish to stop in one process to all of them."""
        total = torch.stack([loss.float() for loss in self._step_losses]).sum()
        self._step_losses.clear()
        # With float16 an infinite gradient is ordinary: its scaler skips the step and scales less.
        if norm is not None and getattr(self.accelerator, "scaler", None) is None:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            total = total + torch.as_tensor(whole, dtype=torch.float32, device=total.device)
        is_bad = not math.isfinite(float(total))
        self.stopped_by = self.stop.signal_number
        if self.args.world_size > 1:
            flags = torch.tensor([int(is_bad), self.stopped_by], device=total.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            is_bad, self.stopped_by = bool(flags[0]), int(flags[1])
        if is_bad:
            raise NonFiniteLossError(
                f"the loss or its gradient became NaN or infinite in step {self.state.global_step + 1}; the "
                "step was not taken"
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the Trainer's estimate walks all parameters in every step and knows no attention pattern."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            seen = self.state.num_input_tokens_seen
            logs["tokens"] = seen
            if self._training_seconds:
                logs["tokens_per_second"] = (seen - self._logged_tokens) / self._training_seconds
            logs["memory_bytes"] = peak_memory(self.args.device)
            self._logged_tokens, self._training_seconds = seen, 0.0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Its data loader draws a number: training is to go on as if there had been no evaluation.
        with torch.random.fork_rng(devices=[]):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics

    # ---- where a run goes on ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint: the Trainer would take one more step before it looks.
            self.control.should_training_stop = True
            return
        _set_order(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        main = bool(self.args.should_save)
        what = f"the checkpoint of step {self.state.global_step}"
        with (
            checkpoints.write_errors(folder, what),
            checkpoints.scratch_folder(folder, clear=main) as scratch,
        ):
            self.accelerator.wait_for_everyone()
            self._scratch = scratch
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._scratch = None
            self.accelerator.wait_for_everyone()
            if main:
                checkpoints.commit(scratch / f"checkpoint-{self.state.global_step}", folder)
                checkpoints.keep_newest(folder, self.args.save_total_limit)
                checkpoints.clean(folder)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._scratch is None else str(self._scratch)

    def step_begins(self) -> None:
        self._begun = time.perf_counter()

    def step_ends(self) -> None:
        self._training_seconds += time.perf_counter() - self._begun
        self.state.num_input_tokens_seen += self._step_tokens
        self._step_tokens = 0


class TokenEvaluation(_Base):
    """Mixin, before a Trainer too: the evaluation loss is of every token alike, and comes with
    eval_perplexity.

    In eval mode a patched model attends fully. args.per_device_eval_batch_size is to be 1: the rows that
    several processes repeat to end together are then known and left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scored: list[torch.Tensor] = []

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._scored.clear()
        output = super().evaluation_loop(*args, **kwargs)
        loss, count = torch.cat(self._scored).cpu().double().sum(0).tolist()
        self._scored.clear()
        assert output.metrics is not None
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = loss / count
        output.metrics[f"{prefix}_perplexity"] = math.exp(min(loss / count, 700.0))
        return output

    @torch.no_grad()
    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.batch_loss(model, inputs).detach().float()
        count = (inputs["labels"][..., 1:] != -100).sum()
        # A row without a label has a loss of 0/0.
        nll = torch.where(count > 0, loss * count, 0.0)
        self._scored.append(self.accelerator.gather_for_metrics(torch.stack([nll, count.float()])[None]))
        return loss, None, None

    def batch_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """The mean over this batch's own labels."""
        loss: torch.Tensor = model(**inputs).loss
        return loss


class LongTrainer(SafeTraining, TokenEvaluation, Trainer):
    """The Trainer of `sinklora finetune`."""


class _Steps(TrainerCallback):
    """Tells the trainer of its steps; after one in which the processes agreed to stop, saves and ends; logs
    wherever one saves."""

    def __init__(self, trainer: SafeTraining) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._logged_tokens = state.num_input_tokens_seen
        # A state that was read from a checkpoint has the intervals of the run that wrote it.
        state.compute_steps(args, state.max_steps)
        if args.eval_strategy == "steps" and state.global_step and state.global_step % state.eval_steps == 0:
            # Stopped before the evaluation that was due: it comes now.
            args.eval_on_start = not any(
                "eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.step_begins()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.step_ends()
        if self.trainer.stopped_by and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if control.should_save:
            control.should_log = True


def _set_order(loader: Any, epoch: int) -> None:
    """Tells the sampler under a data loader's wrappers which epoch's order to draw.

    accelerate does so itself, but not through both wrappers of a resumed run in several processes.
    """
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None and not hasattr(sampler, "set_epoch"):
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    if sampler is not None:
        sampler.set_epoch(epoch)
