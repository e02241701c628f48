"""Perplexity by context length, over sliding windows, read in full, with the training pattern or a cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .continuation import continuation_losses
from .perplexity import Window, batches, file_losses, resampled_interval, windows
from .task import Advance, Cell, NotMeasurableError, Row, Task, Way
from .texts import Text, Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..loading import OpenedModel

# Of windows by default.
MAX_STRIDE = 256
# exp() of more is no float.
MAX_NATS = 700


class PerplexityTask(Task):
    """LongLoRA's protocol: every token but a document's first is predicted once, inside windows of the cell's
    length, each moved on by `stride` tokens.

    Documents shorter than a length are left out of it. Through a cache, the tokens of a window that earlier
    windows have predicted are its prompt, read at once, as generate reads a prompt; the others are read
    way.chunk at a time, so that they see what the cache keeps and up to way.chunk - 1 tokens more.

    Args:
        lengths: tokens of a window.
        stride: by default 256, and at most half the shortest length.
        tokens_per_batch: windows are computed together up to so many tokens; changes speed and memory only.
        start_contexts: tokens that the models were first trained on, marked in the picture.

    Raises:
        ValueError: a number out of range; the message names the option.
    """

    name = "perplexity"

    def __init__(
        self,
        texts: Texts,
        lengths: Sequence[int],
        *,
        stride: int | None = None,
        tokens_per_batch: int = 8192,
        start_contexts: Sequence[int] = (),
    ) -> None:
        if min(lengths) < 2:
            raise ValueError(f"length: expected at least 2 tokens, got {min(lengths)}")
        if stride is None:
            stride = min(MAX_STRIDE, min(lengths) // 2)
        if not 1 <= stride < min(lengths):
            raise ValueError(
                f"stride: expected from 1 to the shortest length less 1 = {min(lengths) - 1}, got {stride}"
            )
        if tokens_per_batch < 1:
            raise ValueError(f"batch_tokens: expected at least 1, got {tokens_per_batch}")
        self.texts, self.lengths, self.stride = texts, sorted(set(lengths)), stride
        self.tokens_per_batch, self.start_contexts = tokens_per_batch, sorted(set(start_contexts))

    def settings(self) -> dict[str, Any]:
        return {**self.texts.settings(), "stride": self.stride}

    def cells(self) -> list[Cell]:
        return [Cell(length) for length in self.lengths]

    def work(self, opened: OpenedModel, way: Way, cell: Cell) -> int:
        found = windows([len(text.tokens) for text in self._chosen(opened, cell)], cell.length, self.stride)
        # Of a window that goes through a cache the last token is only predicted.
        return sum(window.end - window.begin - (way.make_cache is not None) for window in found)

    def measure(self, opened: OpenedModel, way: Way, cell: Cell, advance: Advance) -> dict[str, Any]:
        texts = self._chosen(opened, cell)
        files = [text.tokens for text in texts]
        if not files:
            longest = max(len(text.tokens) for text in self.texts.tokens(opened.tokenizer))
            raise NotMeasurableError(
                f"data: no document has {cell.length} tokens; the longest has {longest} with this tokenizer"
            )
        if way.make_cache is None:
            options: dict[str, Any] = {"tokens_per_batch": self.tokens_per_batch, "on_tokens": advance}
            losses = file_losses(opened.model, files, cell.length, self.stride, **options)
        else:
            losses = self._through_cache(opened.model, files, way, cell.length, advance)
        documents = [
            {
                "source": text.source,
                "tokens": len(loss),
                "bytes": text.scored_bytes,
                "nats": float(loss.double().sum()),
            }
            for text, loss in zip(texts, losses, strict=True)
        ]
        left_out = len(self.texts.tokens(opened.tokenizer)) - len(texts)
        read = None if way.make_cache is None else way.chunk
        return {**totals(documents), "documents": documents, "left_out": left_out, "chunk": read}

    def _chosen(self, opened: OpenedModel, cell: Cell) -> list[Text]:
        return [text for text in self.texts.tokens(opened.tokenizer) if len(text.tokens) >= cell.length]

    def _through_cache(
        self, model: Any, files: Sequence[torch.Tensor], way: Way, length: int, advance: Advance
    ) -> list[torch.Tensor]:
        """As file_losses, with a new cache for each batch of windows."""
        assert way.make_cache is not None
        losses = [torch.zeros(len(file) - 1) for file in files]
        todo = sorted(windows([len(file) for file in files], length, self.stride), key=_shape)
        for (tokens, prompt), group in itertools.groupby(todo, key=_shape):
            for batch in batches(list(group), max(1, self.tokens_per_batch // tokens)):
                rows = torch.stack([files[window.file][window.begin : window.end] for window in batch])
                cache = way.make_cache(model, length)
                found, _ = continuation_losses(model, rows, prompt, cache, chunk=way.chunk, on_tokens=advance)
                for window, row in zip(batch, found, strict=True):
                    losses[window.file][window.first_target - 1 : window.end - 1] = row
        return losses

    def columns(self) -> Sequence[str]:
        return ("perplexity", "low", "high", "nats_per_token", "bits_per_byte", "tokens", "left_out")

    def notes(self, rows: Sequence[Row]) -> list[str]:
        found = [
            "perplexity: per token of the model's tokenizer, in windows of that many tokens, each moved on "
            f"by {self.stride}; every token but a document's first is predicted once."
        ]
        chunks = sorted({row.values["chunk"] for row in rows if row.values["chunk"] is not None})
        if chunks:
            pieces = ", ".join(map(str, chunks))
            found.append(
                "Through a cache: of each window but a document's first, the tokens that are not predicted "
                f"are read at once, as a prompt; the others {pieces} at a time, from what the cache keeps "
                "and the tokens beside them."
            )
        counts = {row.cell.length: len(row.values["documents"]) for row in rows}
        left_out = {row.cell.length: row.values["left_out"] for row in rows}
        if any(left_out.values()):
            shown = ", ".join(f"{counts[n]} at {n}" for n in sorted(counts))
            found.append(
                f"LEFT OUT: documents shorter than the length; there are {shown}: these columns are not of "
                "the same texts (--min-tokens makes them so)."
            )
        return found

    def draw(self, rows: Sequence[Row]) -> Figure:
        from ..plots_curves import plot_lines

        lines: dict[str, dict[float, float]] = {}
        for row in rows:
            line = lines.setdefault(f"{row.model}, {row.way}", {})
            line[float(row.cell.length)] = row.values["perplexity"]
        figure = plot_lines(
            lines,
            x_label="tokens that the model sees at once",
            y_label="perplexity per token",
            title="Perplexity by context length",
            log_x=True,
        )
        axes = figure.axes[0]
        for context in self.start_contexts:
            axes.axvline(context, color="grey", linestyle=":", label=f"trained from {context}")
        axes.legend()
        return figure


def totals(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity and what belongs to it over documents, with the 95 % interval of resampled documents.

    low and high are None for a single document. Losses that are not finite give a ValueError.
    """
    nats = sum(document["nats"] for document in documents)
    tokens = sum(document["tokens"] for document in documents)
    num_bytes = sum(document["bytes"] for document in documents)
    if not nats / tokens < MAX_NATS:  # NaN too
        raise ValueError(
            f"the model's losses are not numbers ({nats / tokens:g} nats per token); try float32"
        )
    low, high = None, None
    if len(documents) > 1:
        low, high = resampled_interval(
            [document["nats"] for document in documents], [document["tokens"] for document in documents]
        )
    return {
        "perplexity": math.exp(nats / tokens),
        "low": None if low is None else math.exp(low),
        "high": None if high is None else math.exp(high),
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "tokens": tokens,
    }


def _shape(window: Window) -> tuple[int, int]:
    """Tokens of a window, and those of its prompt."""
    return window.end - window.begin, window.first_target - window.begin
