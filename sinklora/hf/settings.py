"""SF-Attn's settings as a model carries them: plain JSON in config.sinklora, and sinklora.json beside an
adapter.

PEFT saves no base config, so what stands in the base model's config would never reach an adapter's directory:
saving is therefore followed by writing the file, by a wrapper around save_pretrained that changes nothing
else.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..pattern import SFPattern

FILE_NAME = "sinklora.json"
CONFIG_KEY = "sinklora"
EVAL_ATTENTION = ("full", "sf")


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

    Raises ValueError where there are none, naming what was looked for.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(
            f"pattern: expected an SFPattern or the directory of a saved model or adapter, got {folder}"
        )
    own = folder / FILE_NAME
    if own.is_file():
        return _checked(_read_json(own), str(own))
    config_file = folder / "config.json"
    if config_file.is_file():
        config = _read_json(config_file)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and part.get(CONFIG_KEY) is not None:
                return _checked(part[CONFIG_KEY], str(config_file))
    raise ValueError(
        f"pattern: expected {FILE_NAME}, or {CONFIG_KEY!r} in config.json, in {folder}; found neither"
    )


def write_directory(directory: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Writes sinklora.json into directory, whole or not at all. Raises OSError."""
    target = Path(directory) / FILE_NAME
    scratch = target.with_name(f".{FILE_NAME}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


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


def watch_saving(import_peft: bool) -> None:
    """From now on saving an adapter of a model with settings also writes sinklora.json beside it. Idempotent.

    PEFT may wrap a model after `patch` (TRL does), so this acts on PEFT's class; without import_peft only if
    PEFT has been imported already.
    """
    _wrap_saving(PreTrainedModel)  # adapters that transformers itself holds (model.add_adapter)
    if "peft" in sys.modules or (import_peft and importlib.util.find_spec("peft") is not None):
        try:
            from peft import PeftModel
        except ImportError:  # installed but unusable here: then no model of PEFT's will be saved either
            return
        _wrap_saving(PeftModel)


def _wrap_saving(model_class: Any) -> None:
    original = model_class.save_pretrained
    if getattr(original, "writes_sinklora_settings", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("is_main_process", True):
            _write_beside_adapters(self, Path(given["save_directory"]), given.get("selected_adapters"))
        return result

    save_pretrained.writes_sinklora_settings = True  # type: ignore[attr-defined]
    model_class.save_pretrained = save_pretrained


def _write_beside_adapters(model: Any, directory: Path, selected: list[str] | None) -> None:
    if isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False):
        return  # a whole model: its config.json carries the settings
    try:
        settings = getattr(text_config(base_model(model).config), CONFIG_KEY, None)
    except (TypeError, AttributeError, ValueError):  # PEFT around something that is not a transformers model
        return
    if settings is None:
        return
    names = selected if selected is not None else list(getattr(model, "peft_config", {}))
    in_folder = isinstance(
        model, PreTrainedModel
    )  # transformers writes one adapter, PEFT one folder for each
    for name in names:
        folder = directory if in_folder or name == "default" else directory / name
        if (folder / "adapter_config.json").is_file():
            write_directory(folder, settings)
