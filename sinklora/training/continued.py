"""The run of `sinklora finetune`: continued pre-training of a model at a longer context."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..data.packing import PackedRows, collate, split_documents
from ..data.shards import TokenStore
from ..data.tokens import tokenize_documents
from ..finetune.prepare import prepare
from ..finetune.rope import plan_positions
from ..hf.rope import context_of
from ..hf.settings import base_model
from ..loading import open_for_training
from . import checkpoints
from .card import summary
from .choices import (
    cache_folder,
    check_reports,
    errors_about,
    join,
    number_of_steps,
    trainer_arguments,
    training_pattern,
    weight_dtype,
)
from .chunked_loss import use_chunked_loss
from .devices import has_gpu, is_main, main_first, on_main
from .dry_run import estimate
from .folder import LOG, RunFolder
from .log import RunLog
from .plan import Lines, describe_run
from .results import write_results
from .settings import FinetuneSettings
from .sharding import read_weights_everywhere, sharding_arguments
from .stopping import StoppedError
from .trainer import LongTrainer, NonFiniteLossError

logger = logging.getLogger("sinklora")

# begin(description, total) starts a progress bar and returns what advances it, with a note beside it.
Begin = Callable[[str, int], Callable[..., None]]
# show(what, lines) shows lines of name and text: the "plan", an "estimate", the "result".
Show = Callable[[str, Lines], None]


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on and what is held out. documents, tokens: of the training text alone."""

    training: PackedRows
    held_out: PackedRows | None
    documents: int
    held_out_documents: int


class FinetuneRun:
    """One run, in its order: check, read, prepare, train, write.

    Args:
        settings: as given; `self.settings` are the resolved ones.
        begin: shows progress; None shows none.

    `show` may be set before `run`; it is called in the main process and in the others.
    """

    def __init__(self, settings: FinetuneSettings, begin: Begin | None = None) -> None:
        self.settings = settings.resolved(has_gpu())
        self.folder = RunFolder(self.settings.output)
        self.begin = begin if begin is not None and is_main() else _no_progress
        self.show: Show = lambda title, lines: None
        # What prepare did to the positions, in words.
        self.stretched = "as the model has them"
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    def run(self) -> Any:
        """Trains and writes the results; returns the trainer as it ended, or None after a dry run.

        Raises:
            ValueError: a setting, the data, or an output folder that cannot be used. OSError: a file.
            StoppedError: Ctrl-C or SIGTERM. NonFiniteLossError: the loss became NaN.
        """
        settings = self.settings
        on_main(lambda: self.folder.check(settings.resume))
        check_reports(settings.report_to)
        set_seed(settings.seed)
        read_weights_everywhere()
        model, tokenizer = open_for_training(
            _whole_name(settings.model), dtype=weight_dtype(settings), quantize=settings.quantize
        )
        use_cache = model.config.use_cache
        data = self.read(tokenizer)
        prepared = self.prepare(model)
        arguments = self.arguments(data)
        plan = self.describe(prepared, data, arguments)
        self.show("plan", plan)
        self.warn(prepared, data, arguments)
        if settings.dry_run:
            self.show("estimate", estimate(self, prepared, tokenizer, data, arguments))
            return None
        facts = self.facts(data, arguments)
        on_main(lambda: self.folder.begin(settings.as_options(), facts, settings.resume))
        self.begun()
        trainer = self.trainer(prepared, tokenizer, data, arguments)
        trainer.add_callback(RunLog(self.folder.path / LOG, self.begin("train", arguments.max_steps)))
        self.train(trainer)
        # The Trainer has switched it off for the training; a saved model is to generate with one.
        model.config.use_cache = use_cache
        write_results(self.folder, trainer, tokenizer, settings, plan)
        self.show("result", summary(trainer.state.log_history))
        return trainer

    def describe(self, model: Any, data: Data, arguments: TrainingArguments) -> Lines:
        """What the run is going to do, for the terminal and the model card."""
        return describe_run(self.settings, model, data, arguments, self.stretched)

    def begun(self) -> None:
        """Called when the folder is this run's to write into, before the training."""

    def warn(self, model: Any, data: Data, arguments: TrainingArguments) -> None:
        """Says what is allowed and rarely meant."""
        settings = self.settings
        if not is_main():
            return
        reach = context_of(base_model(model).config)
        if reach is not None and reach < settings.context:
            logger.warning(
                "the model's positions reach %d tokens, and rows have %d: with --rope none it has to learn "
                "new ones",
                reach,
                settings.context,
            )
        if settings.group_size == settings.context:
            logger.warning(
                "group_size is the whole context of %d tokens: unshifted heads attend fully", settings.context
            )
        per_step = settings.batch_size * settings.accumulate * arguments.world_size
        if len(data.training) < per_step:
            logger.warning(
                "there are %d rows and a step takes %d (--batch-size, --accumulate): each step is a pass "
                "over the text",
                len(data.training),
                per_step,
            )
        if arguments.max_steps <= settings.warmup_steps and settings.schedule != "constant":
            logger.warning(
                "all of the %d steps are --warmup-steps: the learning rate never gets to %g",
                arguments.max_steps,
                settings.learning_rate,
            )

    # ---- the steps of a run ----

    def read(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        """The rows of the options' data, tokenised once into the cache."""
        settings = self.settings
        with main_first():
            store = self._tokens("data", settings.data, tokenizer)
            held_out_store = None
            if settings.eval_data:
                held_out_store = self._tokens("eval_data", settings.eval_data, tokenizer)
        training, held_out = None, None
        if settings.eval_share:
            training, held_out = split_documents(store, settings.eval_share, settings.seed)
            held_out_store = store
        rows = self._rows(store, training)
        return Data(
            rows,
            None if held_out_store is None else self._rows(held_out_store, held_out),
            len(store) if training is None else len(training),
            0 if held_out_store is None else len(held_out_store if held_out is None else held_out),
        )

    def _tokens(self, name: str, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenStore:
        with errors_about(name):
            return tokenize_documents(
                sources,
                tokenizer,
                cache_folder(self.settings.cache_dir),
                text_field=self.settings.text_field,
                begin=self.begin,
            )

    def _rows(self, store: TokenStore, documents: Any) -> PackedRows:
        packing: Any = "cut" if self.settings.packing == "joined" else self.settings.packing
        return PackedRows(store, self.settings.context, documents=documents, packing=packing)

    def prepare(self, model: PreTrainedModel) -> Any:
        """The model with its longer positions, its training attention, and what is trained in float32."""
        settings = self.settings
        rope: Any = None if settings.rope == "none" else settings.rope
        if rope is not None:
            self.stretched = plan_positions(model.config, settings.context, rope).words
        prepared = prepare(
            model,
            settings.context,
            pattern=training_pattern(settings) or "full",
            rope=rope,
            lora_rank=0 if settings.full_finetuning else settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=list(settings.lora_targets) or None,
            train_embeddings_and_norms=settings.train_embeddings_and_norms,
        )
        # It tries the model, which before this cast has one dtype throughout and needs no autocast.
        self.limit_logits(prepared)
        for parameter in prepared.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if settings.attention == "s2-torch":
            from ..hf.s2_torch import use_s2_torch

            use_s2_torch(prepared, int(settings.group_size or 0))
        return prepared

    def limit_logits(self, model: Any) -> None:
        """Sees to it that the logits of all tokens never exist together."""
        use_chunked_loss(model, self.settings.chunk_tokens)

    def arguments(self, data: Data, kind: Any = TrainingArguments, **more: Any) -> Any:
        """The Trainer's arguments; what is not an option here is as in LongLoRA's training.

        kind: TrainingArguments or a subclass. more: what a subclass also takes.
        """
        settings = self.settings
        evaluating = data.held_out is not None
        fresh = not (settings.resume and checkpoints.find_checkpoints(self.folder.checkpoints))
        return kind(
            output_dir=str(self.folder.checkpoints),
            eval_strategy="steps" if evaluating else "no",
            eval_on_start=evaluating and fresh,
            **trainer_arguments(settings, number_of_steps(settings, len(data.training))),
            **sharding_arguments(settings.sharding),
            **more,
        )

    def facts(self, data: Data, arguments: TrainingArguments) -> dict[str, Any]:
        """What must be the same when the run goes on, beside the options."""
        settings = self.settings
        return {
            "rows of a step": settings.batch_size * settings.accumulate * arguments.world_size,
            "steps": arguments.max_steps,
            "documents": data.documents,
            "tokens": data.training.num_tokens,
        }

    def trainer(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, arguments: TrainingArguments
    ) -> Any:
        """The trainer of the run, which shows and writes nothing but checkpoints."""
        return LongTrainer(
            model=model,
            args=arguments,
            train_dataset=data.training,
            eval_dataset=data.held_out,
            data_collator=self.collator(),
        )

    def collator(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
        """What makes a batch of rows."""
        return join if self.settings.packing == "joined" else collate

    def train(self, trainer: LongTrainer) -> None:
        """All steps, from the newest whole checkpoint on where the run is resumed."""
        with trainer.stop:
            try:
                if self.settings.resume:
                    trainer.resume()
                else:
                    trainer.train()
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}; {self._last_good()}") from None
        if trainer.stopped_by and trainer.state.global_step < trainer.state.max_steps:
            raise StoppedError(
                f"stopped by {trainer.stop.name} after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}, which is saved; go on with the same command and --resume",
                trainer.stopped_by,
            )

    def _last_good(self) -> str:
        found = checkpoints.find_checkpoints(self.folder.checkpoints)
        kept = f"{found[0]} is kept" if found else "there is no checkpoint yet"
        return f"{kept}; begin again in another folder with a lower --learning-rate or more --warmup-steps"


def _no_progress(description: str, total: int) -> Callable[..., None]:
    return lambda amount, note="": None


def _whole_name(model: str) -> str:
    """The model's name as an adapter is to remember it: a folder from wherever it is opened."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
