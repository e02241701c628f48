"""Opens a model to generate with: a folder of a model or of a PEFT adapter, or a name on the Hub."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .hf.patching import patch
from .hf.settings import CONFIG_KEY, FILE_NAME, base_model, text_config
from .pattern import SFPattern

logger = logging.getLogger("sinklora")

# Where `sinklora demo` writes when it is not told otherwise.
DEMO_FOLDER = "sinklora-demo"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


class OpenedModel(NamedTuple):
    """A patched model in eval mode, its tokenizer, and the name that it was opened by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def open_model(name: str | os.PathLike[str] | None = None, dtype: str = "auto") -> OpenedModel:
    """Opens a causal language model and patches it with the settings that it carries, else the defaults.

    Args:
        name: the folder of a saved model, or of a PEFT adapter (on the base model that its
            adapter_config.json names), or a model's name on the Hub. None: what `sinklora demo` left in its
            default folder.
        dtype: of the weights: one of DTYPES; "auto" is the one that they were saved in.

    In eval mode a patched model attends fully; settings that keep SF-Attn in eval mode are overruled, since
    SF-Attn does not go on from cached tokens.

    Raises:
        ValueError: nothing there that can be opened (the message names `model` or `dtype`).
        NotImplementedError: an adapter that is not made of weights (prompt tuning), a model that `patch`
        refuses.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    source = _locate(name)
    carried: Path | SFPattern | None = None
    options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    folder = Path(source)
    if (folder / _ADAPTER_FILE).is_file():
        model, tokenizer_source = _open_adapter(folder, options)
        carried = folder if (folder / FILE_NAME).is_file() else None
    else:
        model, tokenizer_source = _open(AutoModelForCausalLM, source, options), source
    tokenizer: PreTrainedTokenizerBase = _open(AutoTokenizer, tokenizer_source, {})
    if carried is None and getattr(text_config(model.config), CONFIG_KEY, None) is None:
        # Given, not left out: patch warns of settings nobody chose, and none of them acts in eval mode.
        carried = SFPattern()
    patch(model, carried, eval_attention="full")
    return OpenedModel(model.eval(), tokenizer, str(source))


def on_the_hub(name: str) -> bool:
    """Whether open_model will ask the Hub for it: "owner/name", and nothing of that name here."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _locate(name: str | os.PathLike[str] | None) -> str:
    """The folder or Hub name to open; refuses what is neither before anything is loaded."""
    if name is None:
        if not (Path(DEMO_FOLDER) / "config.json").is_file():
            raise ValueError(
                f"model: none given, and no model of the demo in {DEMO_FOLDER}; run `sinklora demo` here, or "
                "name a folder or a model of the Hub with --model"
            )
        return DEMO_FOLDER
    text = os.path.expanduser(os.fspath(name))
    path = Path(text)
    if on_the_hub(text):
        return text
    if not text:
        raise ValueError("model: no such folder: ''")
    if path.is_dir():
        if any((path / file).is_file() for file in ("config.json", _ADAPTER_FILE)):
            return text
        raise ValueError(f"model: expected config.json or {_ADAPTER_FILE} in {text}, found neither")
    if path.exists():
        raise ValueError(f"model: expected a folder, got the file {text}")
    # The Hub's old names without an owner are not asked for: they are mostly folders spelt wrong.
    raise ValueError(f"model: no such folder, nor a name on the Hub (owner/name): {text!r}")


def _open_adapter(folder: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, str]:
    """The base model with the adapter's weights in its layers, and where to open the tokenizer from."""
    from .extras import require

    require("train", "peft")
    from peft import PeftConfig, PeftModel

    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"model: cannot open {folder / _ADAPTER_FILE}: {_first_line(error)}") from error
    if settings.is_prompt_learning:
        raise NotImplementedError(
            f"model: expected an adapter of weights such as LoRA, got {settings.peft_type} in {folder}, "
            "which puts tokens of its own into the cache"
        )
    if not any((folder / file).is_file() for file in _ADAPTER_WEIGHTS):
        # PEFT would ask the Hub for them.
        raise ValueError(f"model: expected {_ADAPTER_WEIGHTS[0]} in {folder}, found none")
    base = settings.base_model_name_or_path
    if not base:
        raise ValueError(f"model: {folder / _ADAPTER_FILE} names no base model (base_model_name_or_path)")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(f"model: the base model of the adapter {folder} is not there: {base}")
    model = _open(AutoModelForCausalLM, base, options)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"model: the adapter {folder} does not fit {base}: {_first_line(error)}") from error
    own = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    # The adapter's layers are inside the base model, which generates as it does without PEFT around it.
    return base_model(adapted), str(folder) if own else base


def _open(factory: Any, source: str, options: dict[str, Any]) -> Any:
    """factory.from_pretrained with what goes wrong as one line that names the model."""
    try:
        return factory.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        place = "" if Path(source).is_dir() else " (no folder of that name here, so looked for on the Hub)"
        raise ValueError(f"model: cannot open {source}{place}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
