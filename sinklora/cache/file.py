"""An H2O cache as a safetensors file: its tensors, and its settings and counts as JSON in the metadata.

A loaded cache goes on with the same bits: entries keep their slots. Nothing of a file is trusted: what the
kernels would read as counts or positions is checked first.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..budget import Budget
from .layer import TENSORS, H2OLayer, Settings
from .record import Timeline
from .rows import RowCounts
from .settings import make_layers, make_settings

_KEY = "sinklora.H2OCache"
_FORMAT = 1
_FIELDS: dict[str, type] = {
    "format": int,
    "settings": dict,
    "budgets": list,
    "columns": int,
    "clean": int,
    "prompt": list,
    "evicted": list,
    "seen": list,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write(path: str | os.PathLike[str], layers: Sequence[H2OLayer]) -> None:
    """Writes layers, which have all seen the same tokens, to path: whole or not at all. Raises OSError."""
    first = layers[0]
    about = {
        "format": _FORMAT,
        "settings": dataclasses.asdict(first.settings),
        "budgets": [dataclasses.astuple(layer.budget) for layer in layers],
        "columns": first.columns,
        "clean": first.clean,
        "prompt": first.counts.prompt,
        "evicted": [layer.counts.evicted for layer in layers],
        "seen": [] if first.timeline is None else first.timeline.seen,
    }
    tensors = {
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(layers)
        for name, tensor in _tensors(layer).items()
    }
    target = Path(os.path.realpath(path))  # where path is a link, what it points to is replaced
    if not target.parent.is_dir():  # safetensors would raise an error of its own, which is no OSError
        raise FileNotFoundError(errno.ENOENT, "No such folder to save the cache in", str(target.parent))
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{get_ident()}")
    try:
        save_file(tensors, scratch, metadata={_KEY: json.dumps(about)})
        scratch.replace(target)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> list[H2OLayer]:
    """The layers of a file. Raises OSError, or ValueError for a file that is not a whole one of write's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            with torch.inference_mode(False), torch.no_grad():
                # Copies: tensors of an open file are pages of it, and gone with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got {error}") from error
    if _KEY not in metadata:
        raise ValueError(f"{path}: expected a file of H2OCache.save, found no {_KEY!r} in its metadata")
    try:
        about = json.loads(metadata[_KEY])
        layers = _layers(about)
        _fill(layers, about, tensors)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return layers


def _tensors(layer: H2OLayer) -> dict[str, Tensor]:
    """What is saved of a layer: no slots but those in use and one more, and nothing of what was in memory."""
    if not layer.is_initialized:
        return {}
    slots = layer.counts.most_used + 1
    found = {}
    for name in TENSORS:
        tensor = getattr(layer, name)
        found[name] = tensor[:, :, :slots].clone() if tensor.ndim > 2 else tensor.clone()
    unused = found["positions"] < 0
    for name in ("keys", "values"):
        found[name].masked_fill_(unused[..., None], 0)
    if layer.timeline is not None and layer.timeline.evicted_at is not None:
        found["evicted_at"] = layer.timeline.evicted_at.clone()
    return found


def _layers(about: Any) -> list[H2OLayer]:
    """Empty layers of the settings in a file's metadata."""
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ValueError(f"expected an object of format {_FORMAT}, got {str(about)[:80]}")
    if set(about) != set(_FIELDS):
        raise ValueError(f"expected the fields {sorted(_FIELDS)}, got {sorted(about)}")
    for name, kind in _FIELDS.items():
        if type(about[name]) is not kind:
            raise ValueError(f"{name}: expected {kind.__name__}, got {about[name]!r}")
    known = {field.name for field in dataclasses.fields(Settings)}
    if set(about["settings"]) != known:
        raise ValueError(f"settings: expected {sorted(known)}, got {sorted(about['settings'])}")
    if not about["budgets"]:
        raise ValueError("budgets: expected one a layer, got none")
    settings = make_settings(**about["settings"])
    return make_layers([Budget(*parts) for parts in about["budgets"]], settings)


def _fill(layers: Sequence[H2OLayer], about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if about["columns"] < 0:
        raise ValueError(f"columns: expected at least 0, got {about['columns']}")
    names = [*TENSORS, *(["evicted_at"] if layers[0].settings.record else [])]
    filled = about["columns"] > 0
    expected = {f"layers.{i}.{name}" for i in range(len(layers)) for name in names} if filled else set()
    if set(tensors) != expected:
        unknown, missing = sorted(set(tensors) - expected), sorted(expected - set(tensors))
        raise ValueError(f"expected other tensors: unknown {unknown[:3]}, missing {missing[:3]}")
    if not 0 <= about["clean"] <= about["columns"]:
        raise ValueError(f"clean: expected from 0 to {about['columns']}, got {about['clean']}")
    if len(about["evicted"]) != len(layers):
        raise ValueError(f"evicted: expected {len(layers)} values, got {len(about['evicted'])}")
    for i, layer in enumerate(layers):
        if filled:
            found = {name: tensors[f"layers.{i}.{name}"] for name in names}
            _check_tensors(i, found, tensors["layers.0.keys"], about["seen"])
            _put(layer, found, about, bool(about["evicted"][i]))
        layer.columns, layer.clean = int(about["columns"]), int(about["clean"])


def _check_tensors(index: int, found: dict[str, Tensor], like: Tensor, seen: list[list[int]]) -> None:
    """ValueError unless a layer's tensors have the shapes and dtypes that the kernels expect."""
    if like.ndim != 4 or like.dtype not in _DTYPES:
        raise ValueError(f"keys: expected 4 dimensions of {_DTYPES}, got {tuple(like.shape)} of {like.dtype}")
    slots = found["keys"].shape[2] if found["keys"].ndim == 4 else 0
    batch, heads, _, dim = like.shape
    shapes = {
        "keys": ((batch, heads, slots, dim), like.dtype),
        "values": ((batch, heads, slots, dim), like.dtype),
        "scores": ((batch, heads, slots), torch.float32),
        "positions": ((batch, heads, slots), torch.int32),
        "free_slot": ((batch, heads), torch.int32),
        "rows": ((batch, 4), torch.int32),
    }
    if "evicted_at" in found:
        length = found["evicted_at"].shape[-1]
        shapes["evicted_at"] = ((batch, heads, length), torch.int32)
        if any(len(moment) != batch or not 0 <= min(moment) <= max(moment) <= length for moment in seen):
            raise ValueError(f"seen: expected {batch} numbers up to {length} for each forward, got others")
    for name, (shape, dtype) in shapes.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"layers.{index}.{name}: expected shape {shape} of {dtype}, got {tuple(tensor.shape)} of "
                f"{tensor.dtype}"
            )


def _put(layer: H2OLayer, found: dict[str, Tensor], about: dict[str, Any], evicted: bool) -> None:
    """Gives the layer its tensors, if their numbers agree with each other."""
    seen, used, budget, recent = found["rows"].t().tolist()
    prompt = [int(number) for number in about["prompt"]]
    if len(prompt) != len(seen):
        raise ValueError(f"prompt: expected {len(seen)} numbers, one a row, got {len(prompt)}")
    counts = RowCounts.empty(len(seen), layer.budget).with_prompt(prompt, layer.budget)
    counts.seen, counts.used, counts.evicted = seen, used, evicted
    positions, free = found["positions"], found["free_slot"]
    rows = found["rows"].long()[:, :, None]
    slots = torch.arange(positions.shape[2])
    at_free = slots == free[..., None]
    ranges = (positions >= -1) & (positions < rows[:, :1])
    agree = (
        (counts.budget, counts.recent) == (budget, recent)
        and all(0 <= a <= min(b, c) for a, b, c in zip(used, seen, budget, strict=True))
        and all(a <= about["columns"] for a in seen)
        and all(a <= b for a, b in zip(prompt, seen, strict=True))
        and bool(ranges.all())
        and bool(((positions >= 0) == ((slots <= rows[:, 1:2]) & ~at_free)).all())
        and bool(((free >= 0) & (free <= rows[:, 1])).all())
        # Where the free slot is the next to be made, as many as are used are there.
        and bool(((positions >= 0).sum(2) == rows[:, 1]).all())
        and not bool(found["scores"].isnan().any())
    )
    if not agree:
        raise ValueError(
            f"layers.{layer.index}: expected counts, slots and positions that agree, got some that do not"
        )
    for name in TENSORS:
        setattr(layer, name, found[name])
    layer.counts = counts
    layer.is_initialized = True
    if layer.timeline is not None:
        layer.timeline = Timeline()
        layer.timeline.evicted_at = found["evicted_at"]
        layer.timeline.seen = [list(moment) for moment in about["seen"]]
