"""Do extended models still read short texts as well as the model that they were made from?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .perplexity import file_losses, resampled_interval
from .sliding import totals
from .task import Advance, Cell, NotMeasurableError, Row, Task, Way, with_values
from .texts import Text, Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..loading import OpenedModel


class ShortTask(Task):
    """The losses of pieces of text, each read by itself, and their difference to those of a base model.

    Documents are cut into pieces of the cell's length; what is left at the end is dropped, and so are shorter
    documents. Documents are compared in pairs, and the interval comes from resampling them. Every way is
    compared with the base's full attention.

    Args:
        base: name of the base model.
        length: tokens of a piece, no more than the base's context.

    Raises:
        ValueError: tokens_per_batch below 1.
    """

    name = "short"

    def __init__(self, texts: Texts, base: str, length: int, *, tokens_per_batch: int = 8192) -> None:
        if tokens_per_batch < 1:
            raise ValueError(f"batch_tokens: expected at least 1, got {tokens_per_batch}")
        self.texts, self.base, self.length = texts, base, length
        self.tokens_per_batch = tokens_per_batch

    def settings(self) -> dict[str, Any]:
        return self.texts.settings()

    def cells(self) -> list[Cell]:
        return [Cell(self.length)]

    def takes(self, way: Way) -> bool:
        """Not through a cache: a piece has no prompt that could be evicted from."""
        return way.make_cache is None

    def work(self, opened: OpenedModel, way: Way, cell: Cell) -> int:
        return sum(piece.numel() for _, pieces in self._pieces(opened, cell) for piece in pieces)

    def measure(self, opened: OpenedModel, way: Way, cell: Cell, advance: Advance) -> dict[str, Any]:
        found = self._pieces(opened, cell)
        if not found:
            raise NotMeasurableError(f"data: no document has {cell.length} tokens")
        flat = [piece for _, pieces in found for piece in pieces]
        losses = file_losses(
            opened.model,
            flat,
            cell.length,
            cell.length - 1,
            tokens_per_batch=self.tokens_per_batch,
            on_tokens=advance,
        )
        documents, done = [], 0
        for text, pieces in found:
            own = torch.cat(losses[done : done + len(pieces)]).double()
            done += len(pieces)
            share = len(own) / (len(text.tokens) - 1)
            documents.append(
                {
                    "source": text.source,
                    "tokens": len(own),
                    "bytes": round(text.scored_bytes * share),
                    "nats": float(own.sum()),
                    # Of another tokenizer's tokens a difference would mean nothing.
                    "digest": hashlib.sha256(torch.stack(list(pieces)).numpy().tobytes()).hexdigest()[:16],
                }
            )
        return {**totals(documents), "documents": documents}

    def _pieces(self, opened: OpenedModel, cell: Cell) -> list[tuple[Text, list[torch.Tensor]]]:
        return [
            (text, list(text.tokens[: len(text.tokens) // cell.length * cell.length].view(-1, cell.length)))
            for text in self.texts.tokens(opened.tokenizer)
            if len(text.tokens) >= cell.length
        ]

    def finish(self, rows: Sequence[Row]) -> list[Row]:
        """With `difference` in nats per token to the base, `difference_low`, `difference_high` and `word`."""
        bases = {row.way: row for row in rows if row.model == self.base}
        base = bases.get("full") or next(iter(bases.values()), None)
        return [with_values(row, compared(row, base)) for row in rows]

    def columns(self) -> Sequence[str]:
        return (
            "word",
            "perplexity",
            "difference",
            "difference_low",
            "difference_high",
            "nats_per_token",
            "bits_per_byte",
            "tokens",
        )

    def notes(self, rows: Sequence[Row]) -> list[str]:
        counts = {len(row.values["documents"]) for row in rows}
        found = [
            f"short: pieces of {self.length} tokens, each read by itself, of {', '.join(map(str, counts))} "
            f"documents, compared with {self.base}; a word only where the 95 % interval over documents does "
            "not hold 0."
        ]
        for row in rows:
            if row.values.get("difference") is not None and row.model != self.base:
                numbers = [row.values[name] for name in ("difference", "difference_low", "difference_high")]
                interval = "" if None in numbers else " ({1:+.4f} to {2:+.4f})".format(*numbers)
                found.append(f"{row.model}, {row.way}: {numbers[0]:+.4f}{interval} nats per token")
        return found

    def draw(self, rows: Sequence[Row]) -> Figure:
        from ..plots_bars import plot_differences

        bars = {
            f"{row.model}, {row.way}": (
                row.values["difference"],
                row.values["difference_low"],
                row.values["difference_high"],
            )
            for row in rows
            if row.values.get("difference") is not None
        }
        return plot_differences(
            bars,
            x_label=f"nats per token more than {self.base} (right is worse)",
            title=f"Texts of {self.length} tokens",
        )


def compared(row: Row, base: Row | None) -> dict[str, Any]:
    """The difference of a row to its base in nats per token, its interval, and what that means in a word."""
    nothing = dict.fromkeys(("difference", "difference_low", "difference_high"))
    if base is None:
        return {**nothing, "word": "base not measured"}
    if row is base:
        return {**nothing, "difference": 0.0, "word": "base"}
    here, there = row.values["documents"], base.values["documents"]
    if [each["digest"] for each in here] != [each["digest"] for each in there]:
        return {**nothing, "word": "other tokens than the base's"}
    differences = [a["nats"] - b["nats"] for a, b in zip(here, there, strict=True)]
    tokens = [each["tokens"] for each in here]
    mean = sum(differences) / sum(tokens)
    if len(here) < 2:
        return {**nothing, "difference": mean, "word": f"{_change(mean)} (one document: no interval)"}
    low, high = resampled_interval(differences, tokens)
    word = "no worse" if low <= 0 <= high else _change(mean)
    return {"difference": mean, "difference_low": low, "difference_high": high, "word": word}


def _change(nats: float) -> str:
    """A difference in nats as one in perplexity."""
    percent = 100 * math.expm1(nats)
    return f"worse by {percent:.1f} %" if nats > 0 else f"better by {-percent:.1f} %"
