"""The models that are measured: their names in tables, and the context that they began with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache

from ..hf.settings import CONFIG_KEY, FILE_NAME, read_directory
from ..loading import on_the_hub
from .fingerprint import parts


class NamedModel(NamedTuple):
    """A model's name in tables, and its folder or name on the Hub."""

    name: str
    source: str


def name_models(given: Sequence[str]) -> list[NamedModel]:
    """Names for "NAME=PATH" and for "PATH", whose name is the folder's.

    Raises:
        ValueError: none, two of one name, or an empty name or path.
    """
    if not given:
        raise ValueError("model: expected at least one model, got none")
    found = []
    for text in given:
        name, sign, source = text.partition("=")
        if not sign or Path(text).exists():
            source = os.path.expanduser(text)
            name = text if on_the_hub(text) else Path(source).resolve().name
        if not name or not source:
            raise ValueError(f"model: expected PATH or NAME=PATH, got {text!r}")
        found.append(NamedModel(name, os.path.expanduser(source)))
    names = [model.name for model in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"model: two models are named {twice[0]}; name them with NAME=PATH")
    return found


def start_context(model: NamedModel) -> int | None:
    """Tokens that a model's positions were first trained on, before any were stretched; of an adapter, its
    base's.

    None where the config does not tell, or cannot be read.
    """
    *_, source = parts(model.source)
    config = _config(source)
    context = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original, factor = _number(rope, "original_max_position_embeddings"), _number(rope, "factor")
    if original:
        return int(original)
    if not isinstance(context, int):
        return None
    kind = rope.get("rope_type", rope.get("type"))
    # transformers' "dynamic" leaves the context at what was trained; "linear" stands for a stretched one.
    return round(context / factor) if factor and kind == "linear" else context


def carried_pattern(model: NamedModel) -> dict[str, Any] | None:
    """SF-Attn's settings that stand beside an adapter or in a model's config, as open_model finds them."""
    for source in parts(model.source):
        if (Path(source) / FILE_NAME).is_file():
            return read_directory(source)
        found = _config(source).get(CONFIG_KEY)
        if found:
            return dict(found)
    return None


def _config(source: str) -> dict[str, Any]:
    """The language model's part of a config.json; empty where there is none that can be read. Of a model on
    the Hub that of the local cache: nothing is asked for here."""
    path: Any = Path(source, "config.json")
    if not path.is_file() and on_the_hub(source):
        path = try_to_load_from_cache(source, "config.json")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        return dict(config.get("text_config") or config)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _number(rope: Any, name: str) -> float | None:
    value = rope.get(name) if isinstance(rope, dict) else None
    return value if isinstance(value, (int, float)) and value > 0 else None
