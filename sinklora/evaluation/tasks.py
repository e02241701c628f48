"""The tasks by name, made from the settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .models import NamedModel, start_context
from .settings import EvaluateSettings
from .task import Task
from .texts import Texts


class Maker:
    """Makes tasks; texts are read once for all that want them."""

    def __init__(self, settings: EvaluateSettings, models: Sequence[NamedModel]) -> None:
        self.settings, self.models = settings, models
        self._texts: Texts | None = None

    def texts(self) -> Texts:
        settings = self.settings
        if self._texts is None:
            self._texts = Texts(
                settings.data,
                max_documents=settings.max_documents,
                max_tokens=settings.max_tokens,
                min_tokens=settings.min_tokens,
                text_field=settings.text_field,
                split=settings.split,
            )
        return self._texts

    def perplexity(self) -> Task:
        from .sliding import PerplexityTask

        settings = self.settings
        contexts = (start_context(model) for model in self.models)
        return PerplexityTask(
            self.texts(),
            settings.length,
            stride=settings.stride,
            tokens_per_batch=settings.batch_tokens,
            start_contexts=[context for context in contexts if context is not None],
        )

    def short(self) -> Task:
        from .short import ShortTask

        settings = self.settings
        base = next(model for model in self.models if model.name == (settings.base or self.models[0].name))
        length = settings.short_length or start_context(base)
        if length is None:
            raise ValueError(
                f"short_length: {base.name}'s config does not tell the context that it began with; give it"
            )
        return ShortTask(self.texts(), base.name, length, tokens_per_batch=settings.batch_tokens)

    def passkey(self) -> Task:
        from .passkey import Passkey

        return Passkey(depths=self.settings.depth or None, **self.retrieval())

    def needle(self) -> Task:
        from .needle import Needle

        settings = self.settings
        texts = [document.text for document in self.texts().documents] if settings.data else []
        return Needle(
            depths=settings.depth or None,
            distractors=settings.distractors,
            filler=texts,
            **self.retrieval(),
        )

    def topics(self) -> Task:
        from .dialogues import read_dialogues
        from .topics import Topics

        settings = self.settings
        dialogues = read_dialogues(settings.dialogues) if settings.dialogues else []
        return Topics(topic=settings.topic, dialogues=dialogues, **self.retrieval())

    def retrieval(self) -> dict[str, Any]:
        """What all tasks of retrieval take."""
        settings = self.settings
        return {
            "lengths": sorted(set(settings.length)),
            "repeats": settings.repeats,
            "seed": settings.seed,
            "chat": settings.chat,
            "prefill_chunk": settings.prefill_chunk,
            "tokens_per_batch": settings.batch_tokens,
        }

    def harness(self, name: str) -> Task:
        from .harness import HarnessTask

        settings = self.settings
        return HarnessTask(
            name,
            settings.length,
            limit=settings.limit,
            seed=settings.seed,
            tokens_per_batch=settings.batch_tokens,
            known=tuple(TASKS),
        )


TASKS: dict[str, Callable[[Maker], Task]] = {
    "perplexity": Maker.perplexity,
    "passkey": Maker.passkey,
    "topics": Maker.topics,
    "needle": Maker.needle,
    "short": Maker.short,
}


def make_tasks(settings: EvaluateSettings, models: Sequence[NamedModel]) -> list[Task]:
    """The tasks of the settings in order, each once; names that are not in TASKS are lm-evaluation-harness's.

    Raises:
        ValueError: an unknown task, or what a task refuses; the message begins with the setting's name.
        MissingExtraError: a name that is none of ours, and lm-eval is not installed.
    """
    maker = Maker(settings, models)
    found = []
    for name in dict.fromkeys(settings.task):
        found.append(TASKS[name](maker) if name in TASKS else maker.harness(name))
    return found
