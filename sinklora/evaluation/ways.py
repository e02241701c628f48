"""The ways to read a text: attending to everything, with the training pattern, or through a bounded cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..budget import Budget
from .task import Way

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Amount = int | float
ATTENTIONS = ("full", "sf")


@dataclasses.dataclass(frozen=True)
class H2O:
    """Makes H2O caches: half of the budget heavy, half recent, the sinks on top.

    budget: entries, or a share of the length that the model sees at once.
    """

    budget: Amount
    sinks: int

    def __call__(self, model: PreTrainedModel, length: int) -> Cache:
        from ..cache.h2o_cache import H2OCache

        entries = count(self.budget, length)
        heavy = entries // 2
        return H2OCache(model.config, heavy=heavy, recent=entries - heavy, num_sink_tokens=self.sinks)


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Makes StreamingLLM's caches: the newest entries, and the sinks on top, positions by rank."""

    budget: Amount
    sinks: int

    def __call__(self, model: PreTrainedModel, length: int) -> Cache:
        from ..cache.h2o_cache import H2OCache

        cache: Cache = H2OCache.streaming(model.config, self.sinks, recent=count(self.budget, length))
        return cache


def count(budget: Amount, length: int) -> int:
    """Entries of a budget at a length, at least 1; shares are rounded down."""
    return Budget(0, budget).entries(length)[1]


def make_ways(
    attention: Sequence[str], h2o: Sequence[Amount], streaming: Sequence[Amount], sinks: int, chunk: int
) -> list[Way]:
    """The chosen ways in order, each once.

    Raises:
        ValueError, TypeError: an unknown attention, or a budget, sinks or chunk out of range; the message
        names the argument.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
    found: dict[str, Way] = {}
    for name in attention:
        if name not in ATTENTIONS:
            raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {name}")
        found[name] = Way(name, attention=name)
    settings = {"sinks": sinks}
    for kind, maker, budgets in (("h2o", H2O, h2o), ("streaming", Streaming, streaming)):
        for budget in budgets:
            _check(kind, budget, sinks)
            name = f"{kind} {shown(budget)}"
            found[name] = Way(name, make_cache=maker(budget, sinks), chunk=chunk, settings=settings)
    return list(found.values())


def shown(budget: Amount) -> str:
    return f"{100 * budget:g}%" if isinstance(budget, float) else str(budget)


def _check(kind: str, budget: Amount, sinks: int) -> None:
    try:
        Budget(0, budget, sinks)
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(": ")
        option = "sinks" if name == "num_sink_tokens" else kind
        raise type(error)(f"{option}: {rest.partition(': without')[0]}") from error
