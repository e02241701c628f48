"""sinklora.json beside an adapter: SF-Attn's settings, and the positions that it was trained with.

PEFT saves no base config, so what stands in the base model's config would never reach an adapter's directory:
saving is therefore followed by writing the file, by a wrapper around save_pretrained that changes nothing
else.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..folders import write_whole
from .rope import BEFORE, Positions, positions_of
from .settings import CONFIG_KEY, FILE_NAME, POSITION_KEYS, base_model, read_beside_adapter, text_config


def read_positions(directory: str | os.PathLike[str]) -> Positions | None:
    """The positions that the adapter in directory was trained with; None where its file does not say.

    Raises ValueError for a file that says something else.
    """
    found = read_beside_adapter(Path(directory))
    if found is None or not any(key in found for key in POSITION_KEYS):
        return None
    parameters, trained = (found.get(key) for key in POSITION_KEYS)
    source = Path(directory) / FILE_NAME
    if not isinstance(parameters, dict) or not isinstance(parameters.get("rope_type"), str):
        raise ValueError(
            f"{source}: rope_parameters: expected an object with a rope_type, got {parameters!r}"
        )
    factor = parameters.get("factor")  # not of every type
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(f"{source}: rope_parameters: expected a factor above 0, got {factor!r}")
    if isinstance(trained, bool) or not isinstance(trained, int) or trained < 1:
        raise ValueError(f"{source}: max_position_embeddings: expected a number of tokens, got {trained!r}")
    return Positions(parameters, trained)


def write_directory(directory: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Writes sinklora.json into directory, whole or not at all. Raises OSError."""
    write_whole(Path(directory) / FILE_NAME, json.dumps(settings, indent=2) + "\n")


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
        base = base_model(model)
        settings = getattr(text_config(base.config), CONFIG_KEY, None)
    except (TypeError, AttributeError, ValueError):  # PEFT around something that is not a transformers model
        return
    beside = {**(settings or {}), **_positions(base, bool(settings))}
    if not beside:
        return
    names = selected if selected is not None else list(getattr(model, "peft_config", {}))
    in_folder = isinstance(
        model, PreTrainedModel
    )  # transformers writes one adapter, PEFT one folder for each
    for name in names:
        folder = directory if in_folder or name == "default" else directory / name
        if (folder / "adapter_config.json").is_file():
            write_directory(folder, beside)


def _positions(base: PreTrainedModel, patched: bool) -> dict[str, Any]:
    """The model's positions as entries of the file; none for a model that is as it was loaded."""
    if not patched and BEFORE not in base.__dict__:
        return {}
    try:
        return positions_of(base.config)._asdict()
    except NotImplementedError:  # not rotary, or not the same in all layers: nothing here changes them
        return {}
