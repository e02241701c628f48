"""TRL's SFTTrainer as runs of `sinklora sft` need it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from .trainer import SafeTraining, TokenEvaluation

# What TRL says about padding-free rows one at a time: here a row is packed already.
_ANSWERED = "padding-free training"


class SftTrainer(SafeTraining, TokenEvaluation, SFTTrainer):
    """TRL's SFTTrainer with the checkpoints, stops and evaluation of sinklora's runs.

    Its data set brings input_ids, labels and seq_lengths (ConversationRows.as_dataset) and is taken as it is:
    TRL neither tokenises nor cuts nor packs. The logits are only made where there is a label, and in chunks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        trained = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
        with _without_answered_warnings():
            super().__init__(*args, **kwargs)
        if getattr(model, "is_loaded_in_4bit", False):
            # TRL makes them bfloat16, in which a small step of the optimiser is none.
            for weight, before in trained:
                weight.data = before

    def batch_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss: torch.Tensor = self.compute_loss(model, inputs)
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None with every checkpoint: the run writes its own beside the result."""


@contextlib.contextmanager
def _without_answered_warnings() -> Iterator[None]:
    logger = logging.getLogger("trl.trainer.sft_trainer")

    def keep(record: logging.LogRecord) -> bool:
        return _ANSWERED not in str(record.msg)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
