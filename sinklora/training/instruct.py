"""The run of `sinklora sft`: supervised fine-tuning on instruction data, at a long context, on TRL."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig

from ..data.instruction_store import REPORT, tokenize_instructions
from ..data.overlong import TruncationReport
from ..data.packing import PackedRows, split_documents
from ..data.shards import TokenStore
from ..data.templates import has_generation_tags, own_template, plain_template, rewrites_history
from .choices import cache_folder, errors_about
from .continued import Begin, Data, FinetuneRun
from .devices import main_first, on_main
from .folder import write_json
from .instruct_rows import ConversationRows
from .instruct_settings import SftSettings
from .instruct_trainer import SftTrainer
from .plan import Lines

logger = logging.getLogger("sinklora")


class SftRun(FinetuneRun):
    """One run, in the order of FinetuneRun: what differs is its data, and the trainer that takes it."""

    settings: SftSettings

    def __init__(self, settings: SftSettings, begin: Begin | None = None) -> None:
        super().__init__(settings, begin)
        self.given_template = settings.template()
        self.reports: dict[str, TruncationReport] = {}

    def read(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        """The conversations of the options' data, tokenised once into the cache."""
        settings = self.settings
        template = training_template(tokenizer, self.given_template)
        with main_first():
            store = self._conversations("data", settings.data, tokenizer, template)
            held_out_store = None
            if settings.eval_data:
                held_out_store = self._conversations("eval_data", settings.eval_data, tokenizer, template)
        training, held_out = None, None
        if settings.eval_share:
            training, held_out = split_documents(store, settings.eval_share, settings.seed)
            held_out_store = store
        packed = not settings.no_packing
        return Data(
            ConversationRows(store, settings.context, documents=training, packed=packed),
            None
            if held_out_store is None
            else ConversationRows(held_out_store, settings.context, documents=held_out, packed=packed),
            len(store) if training is None else len(training),
            0 if held_out_store is None else len(held_out_store if held_out is None else held_out),
        )

    def _conversations(
        self, name: str, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str | None
    ) -> TokenStore:
        settings = self.settings
        with errors_about(name):
            store, self.reports[name] = tokenize_instructions(
                sources,
                tokenizer,
                cache_folder(settings.cache_dir),
                context=settings.context,
                overlong=settings.overlong,
                chat_template=template,
                system=settings.system,
                begin=self.begin,
            )
        return store

    def limit_logits(self, model: Any) -> None:
        """Nothing to do: TRL's trainer makes them in chunks itself."""

    def arguments(self, data: Data, kind: Any = SFTConfig, **more: Any) -> Any:
        """The trainer's arguments; rows come tokenised, cut and packed."""
        own = {
            "max_length": None,
            "packing": False,
            "padding_free": not self.settings.no_packing,
            "loss_type": "nll",
            "shuffle_dataset": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        return super().arguments(data, kind, **own, **more)

    def facts(self, data: Data, arguments: Any) -> dict[str, Any]:
        """As of FinetuneRun, and the template, whose file may have changed."""
        text = self.given_template
        own = {} if text is None else {"chat template": hashlib.sha256(text.encode()).hexdigest()[:16]}
        return {**super().facts(data, arguments), **own}

    def trainer(self, model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, arguments: Any) -> Any:
        training, held_out = data.training, data.held_out
        assert isinstance(training, ConversationRows)
        trainer = SftTrainer(
            model=model,
            args=arguments,
            train_dataset=training.as_dataset(),
            eval_dataset=held_out.as_dataset() if isinstance(held_out, ConversationRows) else None,
            processing_class=tokenizer,
        )
        # Saved with the tokenizer, so that the model is asked as it was taught.
        if self.given_template is not None:
            tokenizer.chat_template = self.given_template
        elif own_template(tokenizer) is None:
            tokenizer.chat_template = plain_template(tokenizer)
        return trainer

    def describe(self, model: Any, data: Data, arguments: Any) -> Lines:
        """As of FinetuneRun, with conversations for its documents, and what became of rows that were too
        long."""
        lines: Lines = []
        for name, text in super().describe(model, data, arguments):
            if name in ("text", "held out"):
                rows = data.training if name == "text" else data.held_out
                assert rows is not None
                lines.append((name, describe_rows(rows)))
            else:
                lines.append((name, text))
        for name, report in self.reports.items():
            title = "truncated" if name == "data" else "truncated, held out"
            lines += [(title, line) for line in report.lines()]
        return lines

    def begun(self) -> None:
        """Writes the report of what was truncated."""
        values = {name: report.as_json() for name, report in self.reports.items()}
        on_main(lambda: write_json(self.folder.path / REPORT, values))


def describe_rows(rows: PackedRows) -> str:
    """Of how many conversations and tokens, and which share of them is learnt."""
    share = rows.num_labels / max(rows.num_tokens, 1)
    return (
        f"{rows.num_tokens:,} tokens in {rows.num_pieces:,} conversations; the loss is on "
        f"{rows.num_labels:,} tokens of answers ({share:.1%})"
    )


def training_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str | None:
    """The template that tells answers apart: the given one, else the tokenizer's, else TRL's form of that for
    training where the tokenizer's rewrites what was said before and TRL has one; None: there is no template.
    """
    own = own_template(tokenizer)
    if given is not None or own is None or has_generation_tags(own) or not rewrites_history(tokenizer, own):
        return given or own
    from trl.chat_template_utils import get_training_chat_template

    try:
        known = get_training_chat_template(tokenizer)
    except Exception:  # it probes the template, and templates raise whatever they like
        known = None
    if known is None:
        logger.warning(
            "the tokenizer's chat template writes earlier answers differently once more is said; rows of "
            "several answers will be refused (--chat-template FILE takes one that does not)"
        )
        return own
    logger.warning(
        "the tokenizer's chat template writes earlier answers differently once more is said; TRL's form of "
        "it for training, which does not, is used"
    )
    return known
