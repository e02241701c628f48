"""The results of a run: weights, tokenizer, log, picture and model card, moved into place together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .card import versions, write_card
from .checkpoints import write_errors
from .devices import on_main
from .folder import FINISHED, RunFolder
from .log import draw_losses, write_log
from .plan import Lines
from .settings import FinetuneSettings


def write_results(
    folder: RunFolder, trainer: Any, tokenizer: Any, settings: FinetuneSettings, plan: Lines
) -> None:
    """Writes a finished run's results; called in all processes, for those of a sharded model gather its
    weights together.

    Raises OSError: they cannot be written; the checkpoint of the last step is kept, and --resume writes them.
    """
    with write_errors(folder.path, "the results"):
        scratch = on_main(folder.begin_results)
        trainer.save_model(str(scratch), _internal_call=True)
        on_main(lambda: _write_rest(folder, scratch, trainer, tokenizer, settings, plan))


def _write_rest(
    folder: RunFolder, scratch: Path, trainer: Any, tokenizer: Any, settings: FinetuneSettings, plan: Lines
) -> None:
    (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of this machine
    tokenizer.model_max_length = max(tokenizer.model_max_length, settings.context)
    tokenizer.save_pretrained(scratch)
    history = trainer.state.log_history
    draw_losses(history, f"Training at {settings.context:,} tokens", scratch / "loss.png")
    adapter = (scratch / "adapter_config.json").is_file()
    write_card(scratch / "README.md", settings, plan, history, adapter)
    facts = {"finished": True, "steps": trainer.state.global_step, "versions": versions()}
    write_log(history, facts, scratch / FINISHED)
    folder.finish_results()
