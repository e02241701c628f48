"""What there is to choose for an evaluation, checked before a model is opened."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..loading import DTYPES, choose_device
from .models import NamedModel, name_models
from .task import Way
from .ways import Amount, make_ways

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """The options of `sinklora evaluate` by their names; commands/evaluate.py says what each means.

    Raises:
        ValueError, TypeError: a value out of range; the message begins with its name.
    """

    model: tuple[str, ...]
    task: tuple[str, ...] = ("perplexity",)
    data: tuple[str, ...] = ()
    text_field: str = "text"
    split: str = "train"
    length: tuple[int, ...] = (512, 1024, 2048, 4096)
    stride: int | None = None
    attention: tuple[str, ...] = ("full",)
    h2o: tuple[Amount, ...] = ()
    streaming: tuple[Amount, ...] = ()
    sinks: int = 4
    chunk: int = 32
    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int = 8192
    max_documents: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 2
    base: str | None = None
    short_length: int | None = None
    repeats: int = 10
    depth: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    distractors: int = 4
    topic: int = 1
    dialogues: tuple[str, ...] = ()
    chat: bool = False
    prefill_chunk: int | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.task:
            raise ValueError("task: expected at least one, got none")
        if not self.length:
            raise ValueError("length: expected at least one, got none")
        if min(self.length) < 2:
            raise ValueError(f"length: expected at least 2 tokens, got {min(self.length)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}")
        choose_device(self.device)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected from 0 to 2**63 - 1, got {self.seed}")
        if self.short_length is not None and self.short_length < 2:
            raise ValueError(f"short_length: expected at least 2 tokens, got {self.short_length}")
        names = [model.name for model in self.models()]
        if self.base is not None and self.base not in names:
            raise ValueError(f"base: expected one of the models, {', '.join(names)}, got {self.base}")
        self.ways()

    def models(self) -> list[NamedModel]:
        return name_models(self.model)

    def ways(self) -> list[Way]:
        return make_ways(self.attention, self.h2o, self.streaming, self.sinks, self.chunk)

    def place(self) -> torch.device:
        """Where the models run: one device for all ways, so that what is compared differs in nothing else."""
        kernels = any(way.make_cache is not None or way.attention == "sf" for way in self.ways())
        return choose_device(self.device, kernels=kernels)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON and YAML values, by option names."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
