"""What a mixture is made of: sources with shares, filters, and the shares of a published one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Rows of plain text become an answer, learnt whole, to this.
TEXT_INSTRUCTION = "Write a long text."
_SHARE_ERROR = 1e-6


class Preset(NamedTuple):
    """rows: as many as published. shares: source -> share of them."""

    rows: int
    shares: Mapping[str, float]


PRESETS = {
    # Shares of LongAlpaca-plus as SinkLoRA's paper gives them: Natural Questions, RedPajama, BookSum, LongQA.
    "longalpaca-plus": Preset(28_000, {"nq": 0.44, "redpajama": 0.27, "booksum": 0.18, "longqa": 0.11})
}


@dataclasses.dataclass(frozen=True)
class MixSource:
    """One source: its name, where its rows are (as read_rows takes it), its share of the mixture, and its
    licence as the user gives it."""

    name: str
    path: str
    share: float
    licence: str | None = None


@dataclasses.dataclass(frozen=True)
class MixSettings:
    """How a mixture is made.

    Args:
        sources: shares add up to 1.
        rows: of the mixture.
        tokenizer: folder or name on the Hub; needed where lengths are bounded, and refused elsewhere.
        min_tokens, max_tokens: rows outside are left out; tokens of the messages' texts, without what a chat
            template adds.
        seed: of the choice and the order of the rows.
        allow_fewer: where a source has too few rows, make a smaller mixture of the same shares.
        split: of saved data sets and of the Hub's.
        text_field: of rows that are no conversations, what holds their text.
        text_instruction: the question to which such a text is the answer.
        read_rows: rows read of each source at most; None: all.

    Raises:
        ValueError: a setting out of range; the message begins with its name.
    """

    sources: Sequence[MixSource]
    rows: int
    tokenizer: str | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    allow_fewer: bool = False
    split: str = "train"
    text_field: str = "text"
    text_instruction: str = TEXT_INSTRUCTION
    read_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("source: expected at least one, got none")
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"source: expected each name once, got {', '.join(twice)} more than once")
        for source in self.sources:
            if not 0 < source.share <= 1:
                raise ValueError(
                    f"source: {source.name}: expected a share above 0, at most 1, got {source.share:g}"
                )
        total = math.fsum(source.share for source in self.sources)
        if abs(total - 1) > _SHARE_ERROR:
            raise ValueError(f"source: expected shares that add up to 1 (100 %), got {total:g}")
        for name in ("rows", "min_tokens", "max_tokens", "read_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.tokenizer is None and (self.min_tokens or self.max_tokens):
            name = "min_tokens" if self.min_tokens else "max_tokens"
            raise ValueError(f"{name}: expected a tokenizer too, to count with")
        if self.tokenizer is not None and not (self.min_tokens or self.max_tokens):
            raise ValueError("tokenizer: expected min_tokens or max_tokens too, which alone it counts for")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: expected at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )

    def counts(self, rows: int) -> list[int]:
        """Rows of each source in a mixture of so many: shares by largest remainder."""
        exact = [source.share * rows for source in self.sources]
        whole = [math.floor(value + _SHARE_ERROR) for value in exact]
        by_rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
        for index in by_rest[: rows - sum(whole)]:
            whole[index] += 1
        return whole


def make_sources(
    given: Sequence[str], licences: Sequence[str] = (), preset: str | None = None
) -> list[MixSource]:
    """Sources from "NAME=PATH:SHARE" (with a preset "NAME=PATH") and "NAME=LICENCE"; a share is 0.44 or 44%.

    Raises:
        ValueError: another form, a preset that is not known or not complete, a licence of no source.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset}")
    shares = None if preset is None else PRESETS[preset].shares
    sources = [_source(text, shares) for text in given]
    if shares is not None:
        missing = [name for name in shares if name not in {source.name for source in sources}]
        if missing:
            raise ValueError(f"source: expected NAME=PATH for {', '.join(shares)}, got none for {missing[0]}")
    texts: dict[str, str] = {}
    for licence in licences:
        name, equals, text = licence.partition("=")
        if not equals or not text:
            raise ValueError(f"licence: expected NAME=TEXT, got {licence!r}")
        if name not in {source.name for source in sources}:
            raise ValueError(f"licence: expected the name of a source, got {name}")
        texts[name] = text
    return [dataclasses.replace(source, licence=texts.get(source.name)) for source in sources]


def _source(text: str, shares: Mapping[str, float] | None) -> MixSource:
    name, equals, rest = text.partition("=")
    path, colon, tail = rest.rpartition(":")
    share = _share(tail) if colon else None
    if shares is not None:
        if share is not None:
            raise ValueError(f"source: {name}: expected no share, as the preset has it, got {tail}")
        if name not in shares:
            raise ValueError(f"source: expected one of {', '.join(shares)} as names, got {name or text!r}")
        path, share = rest, shares[name]
    if not (name and equals and path) or share is None:
        form = "NAME=PATH:SHARE, as nq=nq.jsonl:44%" if shares is None else "NAME=PATH"
        raise ValueError(f"source: expected {form}, got {text!r}")
    return MixSource(name, path, share)


def _share(text: str) -> float | None:
    number, percent, rest = text.partition("%")
    try:
        value = float(number)
    except ValueError:
        return None
    return None if rest or not math.isfinite(value) else value / 100 if percent else value


def listed(option: str, value: Any) -> Any:
    """The mapping of a YAML file as the list that the option takes; anything else as it is.

    {nq: nq.jsonl:44%} and {nq: {path: nq.jsonl, share: 0.44}} are nq=nq.jsonl:0.44.

    Raises:
        ValueError: something else in the mapping.
    """
    if not isinstance(value, Mapping):
        return value
    texts = []
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            if option != "source" or not {"path"} <= set(entry) <= {"path", "share"}:
                raise ValueError(
                    f"{option}: {name}: expected path and share, got {', '.join(map(str, entry))}"
                )
            text = f"{entry['path']}" + (f":{entry['share']}" if "share" in entry else "")
        elif isinstance(entry, str):
            text = entry
        else:
            raise ValueError(f"{option}: {name}: expected text, got {entry!r}")
        texts.append(f"{name}={text}")
    return texts
