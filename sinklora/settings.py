"""The settings of one call as the torch operators take them: one text, exact and readable in a dump."""

from __future__ import annotations

import functools
import inspect

Settings = tuple[int, int, int, float, bool, float]  # as SFPattern.settings, and the scale


def settings_text(
    group_size: int,
    shift: int,
    num_sink_tokens: int,
    shifted_fraction: float,
    causal: bool,
    scale: float,
) -> str:
    """The text of the numbers that a pattern and a scale come to."""
    return (
        f"group_size={group_size} shift={shift} num_sink_tokens={num_sink_tokens} "
        f"shifted_fraction={shifted_fraction!r} causal={int(causal)} scale={scale!r}"
    )


_NAMES = tuple(inspect.signature(settings_text).parameters)
cached_settings_text = functools.lru_cache(maxsize=1024)(settings_text)


@functools.lru_cache(maxsize=1024)
def read_settings(text: str) -> Settings:
    """The numbers of a text that settings_text made. ValueError for any other."""
    try:
        numbers = dict(item.split("=") for item in text.split(" "))
        group_size, shift, sinks, fraction, causal, scale = (numbers.pop(name) for name in _NAMES)
        if numbers:
            raise ValueError(f"unknown {', '.join(numbers)}")
        return int(group_size), int(shift), int(sinks), float(fraction), bool(int(causal)), float(scale)
    except (KeyError, ValueError) as error:
        raise ValueError(f"settings: expected a text of settings_text, got {text!r} ({error})") from None
