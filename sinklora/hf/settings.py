"""SF-Attn's settings as a model carries them: plain JSON in config.sinklora, and sinklora.json beside an
adapter (saving.py writes it)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..pattern import SFPattern

FILE_NAME = "sinklora.json"
CONFIG_KEY = "sinklora"
EVAL_ATTENTION = ("full", "sf")
# Of sinklora.json only: the positions that an adapter was trained with (rope.py).
POSITION_KEYS = ("rope_parameters", "max_position_embeddings")


def to_settings(pattern: SFPattern, eval_attention: str) -> dict[str, Any]:
    """The settings as plain JSON values. Raises ValueError for a value that cannot be honoured."""
    if eval_attention not in EVAL_ATTENTION:
        raise ValueError(f"eval_attention: expected one of {EVAL_ATTENTION}, got {eval_attention!r}")
    if not pattern.causal:
        raise ValueError("pattern: expected causal=True for a language model, got causal=False")
    return {**pattern.to_dict(), "eval_attention": eval_attention}


def from_settings(settings: Any, source: str = "config.sinklora") -> tuple[SFPattern, str]:
    """Pattern and eval_attention of a settings dict; source names it in the ValueError of bad settings."""
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: expected an object of settings, got {type(settings).__name__}")
    if "group_size" not in settings:
        raise ValueError(f"{source}: expected a group_size, got only {list(settings)}")
    eval_attention = settings.get("eval_attention", "full")
    if eval_attention not in EVAL_ATTENTION:
        raise ValueError(
            f"{source}: eval_attention: expected one of {EVAL_ATTENTION}, got {eval_attention!r}"
        )
    values = {key: value for key, value in settings.items() if key != "eval_attention"}
    try:
        return SFPattern.from_dict(values), eval_attention
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def read_directory(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that a saved adapter (sinklora.json) or model (config.json) carries.

    Empty for an adapter trained with the model's own attention, whose file holds positions only.

    Raises ValueError where there are none, naming what was looked for.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(
            f"pattern: expected an SFPattern or the directory of a saved model or adapter, got {folder}"
        )
    beside = read_beside_adapter(folder)
    if beside is not None:
        own = str(folder / FILE_NAME)
        found = {key: value for key, value in beside.items() if key not in POSITION_KEYS}
        return _checked(found, own) if found or not beside else {}
    config_file = folder / "config.json"
    if config_file.is_file():
        config = _read_json(config_file)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and part.get(CONFIG_KEY) is not None:
                return _checked(part[CONFIG_KEY], str(config_file))
    raise ValueError(
        f"pattern: expected {FILE_NAME}, or {CONFIG_KEY!r} in config.json, in {folder}; found neither"
    )


def read_beside_adapter(folder: Path) -> dict[str, Any] | None:
    """What sinklora.json in folder holds; None where there is no such file. Raises ValueError."""
    own = folder / FILE_NAME
    if not own.is_file():
        return None
    found = _read_json(own)
    if not isinstance(found, dict):
        raise ValueError(f"{own}: expected an object of settings, got {type(found).__name__}")
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def _checked(settings: Any, source: str) -> dict[str, Any]:
    pattern, eval_attention = from_settings(settings, source)
    return to_settings(pattern, eval_attention)


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's, torch.compile's and distributed wrappers. Raises TypeError."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif callable(getattr(inner, "get_base_model", None)):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), torch.nn.Module):
            inner = inner.module
        else:
            raise TypeError(
                f"model: expected a transformers model or a wrapper of one, got {type(model).__name__}"
            )
    return inner


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that the language model's attention layers read: config itself but for multimodal models."""
    found: PreTrainedConfig = config.get_text_config()
    return found
