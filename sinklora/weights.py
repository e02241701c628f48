"""Opening saved weights so that nothing is guessed: a broken file, or a weight that is missing, is an error.

transformers and PEFT only warn of weights that they do not find, and go on with random ones.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

# What libraries raise for folders that are wrong in some way.
UNUSABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    EOFError,
    StrictDataclassError,
    SafetensorError,
    json.JSONDecodeError,
    pickle.UnpicklingError,
)
_SHOWN_NAMES = 3

Shapes = dict[str, tuple[int, ...]]


def open_weights(source: str, options: dict[str, Any], name: str = "model") -> PreTrainedModel:
    """AutoModelForCausalLM.from_pretrained(source, **options), with every weight of the model found there.

    Raises:
        ValueError: in one line that begins with `name`: nothing that can be opened, a broken file (named), or
            weights that are missing or of another shape.
    """
    model, found = open_library(AutoModelForCausalLM, source, {**options, "output_loading_info": True}, name)
    missing = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if missing:
        unused = found["unexpected_keys"]
        instead = f"; it holds {shown(unused)}, which the model does not have" if unused else ""
        raise ValueError(
            f"{name}: expected all weights of {type(model).__name__} in {source}, found no {shown(missing)}"
            f"{instead}"
        )
    opened: PreTrainedModel = model
    return opened


def open_library(factory: Any, source: str, options: dict[str, Any], name: str = "model") -> Any:
    """factory.from_pretrained with what goes wrong as one line that begins with `name`."""
    try:
        return factory.from_pretrained(source, **options)
    except UNUSABLE as error:
        local = Path(source).is_dir()
        place = "" if local else " (no folder of that name here, so looked for on the Hub)"
        broken = broken_file(Path(source)) if local else None
        if broken is not None:
            raise ValueError(f"{name}: {broken[0]} is broken: {broken[1]}") from error
        raise ValueError(f"{name}: cannot open {source}{place}: {first_line(error)}") from error


def broken_file(folder: Path) -> tuple[Path, str] | None:
    """The first file of weights in folder that is not whole, and what is wrong with it."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return path, first_line(error)
    return None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of torch.save's, by name; nothing in the file is run.

    Raises ValueError naming the file where it holds something else, or is broken.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise ValueError(
                f"{path} holds more than tensors, and such a file can run anything on this machine: refused"
            ) from error
        raise ValueError(f"{path} is broken: {first_line(error)}") from error
    except UNUSABLE as error:
        raise ValueError(f"{path} is broken: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()
    ):
        raise ValueError(f"{path}: expected tensors by name, got {type(found).__name__}")
    return found


def read_shapes(path: Path) -> Shapes:
    """The shapes of the tensors in a file, as read_tensors."""
    if path.suffix != ".safetensors":
        return {key: tuple(value.shape) for key, value in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is broken: {first_line(error)}") from error


def shown(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    some = sorted(names)
    more = len(some) - _SHOWN_NAMES
    return ", ".join(some[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """Of an error's message; all of it where the first line only begins a list."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].rstrip().endswith(":"):
        return " ".join(line.strip() for line in lines)
    return lines[0] if lines else type(error).__name__
