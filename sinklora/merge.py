"""Writes an adapter into its base: a plain checkpoint that loads anywhere, without sinklora or PEFT."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .adapters import CONFIG_FILE, AdapterFiles, adapter_files, is_tied, num_tokens, open_adapter
from .folders import replaced_folder
from .hf.rope import context_of
from .hf.saving import read_positions
from .hf.settings import CONFIG_KEY, FILE_NAME, base_model, read_directory, text_config
from .loading import choose_device, on_the_hub
from .longlora import complete_tokenizer, is_longlora, open_longlora
from .merge_card import write_card
from .merge_check import TOLERANCES, Check, check_logits, compare
from .weights import open_library, open_weights

# The entry of a folder that says it was written here: what was merged, and how the check went.
MARKER = "sinklora_merge.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMG]i?B", re.IGNORECASE)

Begin = Callable[[str, int], Callable[[int], None]]


@dataclasses.dataclass(frozen=True)
class Merged:
    """What was written: rope and context of its config, tied: whether embeddings and output are one."""

    output: Path
    adapter: Path
    base: str
    dtype: str
    parameters: int
    vocabulary: int
    tied: bool
    rope: str
    context: int | None
    check: Check


def merge_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str = "auto",
    shard_size: str = "5GB",
    device: str = "cpu",
    context: int | None = None,
    rope_factor: float | None = None,
    begin: Begin | None = None,
) -> Merged:
    """Merges an adapter into its base, writes the result as safetensors, and checks it as it lies on disk.

    LoRA, embeddings, norms and a changed vocabulary go into the weights, stretched positions into the config;
    the tokenizer and the generation settings come along. The sum is computed in float32 and rounded once:
    in bfloat16 most of LoRA's small updates would be lost beside the weights they are added to.

    Args:
        adapter: its folder; also one that LongLoRA's own scripts wrote.
        output: a new or empty folder, or one written here before. Nothing is written there before the check
            has passed.
        base: folder or name of the base model, instead of the one that the adapter names.
        dtype: of the result: one of DTYPES; "auto" is the one the base was saved in.
        shard_size: the largest file of weights, such as "5GB".
        device: where to compute.
        context, rope_factor: for an adapter that does not carry its positions, see `open_longlora`.
        begin: shows progress.

    Raises:
        ValueError: nothing usable at `adapter` or `base`, or a setting. RuntimeError: the check failed.
        OSError: `output` cannot be written.
    """
    folder = Path(os.path.expanduser(os.fspath(adapter)))
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"model: expected the folder of an adapter ({CONFIG_FILE}), got {folder}")
    if not _SHARD_SIZE.fullmatch(shard_size):
        raise ValueError(f"shard_size: expected a size such as 5GB, got {shard_size}")
    if base is not None and not Path(base).is_dir() and not on_the_hub(base):
        raise ValueError(f"base: no such folder, nor a name on the Hub (owner/name): {base!r}")
    files = adapter_files(folder, base)
    opened = _Opener(files, context, rope_factor, choose_device(device))
    kind = _dtype(files, dtype)
    target = Path(output)
    _refuse_own_folders(target, files)
    stale = _written_before(target)
    with replaced_folder(target, MARKER) as scratch:
        advance = (begin or (lambda description, total: lambda amount: None))("merge", 3)
        result = _write(opened, kind, shard_size, scratch, target, advance)
    for name in stale - _written_before(target):
        (target / name).unlink(missing_ok=True)
    return result


def _write(
    opened: _Opener,
    dtype: torch.dtype,
    shard_size: str,
    scratch: Path,
    target: Path,
    advance: Callable[[int], None],
) -> Merged:
    """Writes the merged model into scratch, and checks it there. At most one model is held at a time."""
    files = opened.files
    adapted = opened(dtype)
    rows = num_tokens(base_model(adapted))
    expected = check_logits(adapted, rows)
    advance(1)
    if dtype != torch.float32:
        del adapted
        adapted = opened(torch.float32)
    model: Any = _merged(adapted, files.folder)
    model = model.to(dtype)
    model.save_pretrained(scratch, max_shard_size=shard_size)
    positions = _positions(model.config)
    _save_tokenizer(files, rows, context_of(model.config), scratch)
    del adapted, model
    advance(1)
    plain: Any = open_weights(str(scratch), {"dtype": "auto"}, "output")
    plain = plain.to(opened.device).eval()
    check = compare(expected, check_logits(plain, rows), dtype)
    if _positions(plain.config) != positions:
        raise RuntimeError("output: the merged model's positions are not the adapter's; nothing was written")
    result = Merged(
        output=target,
        adapter=files.folder,
        base=files.base,
        dtype=str(dtype).removeprefix("torch."),
        parameters=plain.num_parameters(),
        vocabulary=rows,
        tied=is_tied(plain),
        rope=_rope_words(plain.config),
        context=context_of(plain.config),
        check=check,
    )
    write_card(result, scratch)
    _write_marker(result, scratch)
    advance(1)
    return result


class _Opener:
    """Opens the adapter's model in a dtype, from whichever kind of folder."""

    def __init__(
        self,
        files: AdapterFiles,
        context: int | None,
        rope_factor: float | None,
        device: torch.device,
    ) -> None:
        carried = read_positions(files.folder) is not None
        stretched = context is not None or rope_factor is not None
        if carried and stretched:
            option = "context" if context is not None else "rope_factor"
            raise ValueError(
                f"{option}: expected only for adapters that do not carry their positions, but "
                f"{files.folder / FILE_NAME} has them"
            )
        self.files, self.context, self.rope_factor = files, context, rope_factor
        self.device = device
        self.by_hand = stretched or is_longlora(files.folder)

    def __call__(self, dtype: torch.dtype) -> PeftModel:
        options = {"dtype": dtype}
        if self.by_hand:
            opened = open_longlora(self.files, options, context=self.context, rope_factor=self.rope_factor)
        else:
            opened = open_adapter(self.files, options)
        moved: PeftModel = opened.to(self.device)
        return moved.eval()


def _dtype(files: AdapterFiles, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name}")
    if name == "auto":
        config = open_library(AutoConfig, files.base, {})
        name = str(text_config(config).dtype or config.dtype or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    if found not in TOLERANCES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name} of the base")
    return torch.float32 if found is None else found


def _refuse_own_folders(output: Path, files: AdapterFiles) -> None:
    for name, place in (("adapter", files.folder), ("base", Path(files.base))):
        if output.resolve() == place.resolve():
            raise ValueError(f"output: expected another folder than the {name}'s, got {output}")


def _merged(adapted: PeftModel, folder: Path) -> PreTrainedModel:
    """The base model with the adapter in its weights, and a config that says all that is needed."""
    model: Any = adapted.merge_and_unload(safe_merge=True)
    if (folder / FILE_NAME).is_file():
        settings = read_directory(folder)
        if settings:
            setattr(text_config(model.config), CONFIG_KEY, settings)
    merged: PreTrainedModel = model
    return merged


def _save_tokenizer(files: AdapterFiles, rows: int, context: int | None, scratch: Path) -> None:
    tokenizer = open_library(AutoTokenizer, files.tokenizer, {})
    if is_longlora(files.folder):
        complete_tokenizer(tokenizer, rows)
    if context is not None:
        tokenizer.model_max_length = context
    tokenizer.save_pretrained(scratch)


def _positions(config: PreTrainedConfig) -> tuple[Any, Any]:
    config = text_config(config)
    return getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)


def _rope_words(config: PreTrainedConfig) -> str:
    parameters, _ = _positions(config)
    if not parameters:
        return "not rotary"
    if "rope_type" not in parameters:
        return "different in different layers"
    factor = parameters.get("factor")
    return str(parameters["rope_type"]) + (f" by {factor:g}" if isinstance(factor, (int, float)) else "")


def _write_marker(result: Merged, scratch: Path) -> None:
    values = dataclasses.asdict(result)
    del values["output"]
    values.update(adapter=str(result.adapter), check=result.check._asdict())
    values["files"] = sorted([*(entry.name for entry in scratch.iterdir()), MARKER])
    (scratch / MARKER).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _written_before(output: Path) -> set[str]:
    """Names of the files that the marker in output lists: a smaller result leaves none of them behind."""
    try:
        names = json.loads((output / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}
