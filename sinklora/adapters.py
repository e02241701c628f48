"""Opens a PEFT adapter on its base as it was trained: vocabulary, positions, and every weight."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from .hf.rope import restore_positions
from .hf.saving import read_positions
from .weights import UNUSABLE, Shapes, broken_file, first_line, open_weights, read_shapes, shown

logger = logging.getLogger("sinklora")

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What LongLoRA's own script wrote beside an adapter: trained embeddings and norms.
LONGLORA_FILE = "trainable_params.bin"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
# Before the names of the base's modules in an adapter's weights.
PREFIX = "base_model.model."


class AdapterFiles(NamedTuple):
    """An adapter's folder after the checks that need no model.

    weights: its file of weights; base: folder or name of the base model; tokenizer: where to open one from.
    """

    folder: Path
    weights: Path
    base: str
    tokenizer: str


def adapter_files(folder: Path, base: str | None = None) -> AdapterFiles:
    """Reads what an adapter's folder says, before anything large is opened.

    Args:
        base: instead of the base that adapter_config.json names.

    Raises:
        ValueError: no usable adapter, or no base. NotImplementedError: not made of weights (prompt tuning).
    """
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except UNUSABLE as error:
        raise ValueError(f"model: cannot open {folder / CONFIG_FILE}: {first_line(error)}") from error
    if settings.is_prompt_learning:
        raise NotImplementedError(
            f"model: expected an adapter of weights such as LoRA, got {settings.peft_type} in {folder}, "
            "which puts tokens of its own into the cache"
        )
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        # PEFT would ask the Hub for them.
        raise ValueError(f"model: expected {WEIGHT_FILES[0]} in {folder}, found none")
    named = base or settings.base_model_name_or_path
    if not named:
        raise ValueError(f"model: {folder / CONFIG_FILE} names no base model (base_model_name_or_path)")
    if Path(named).is_absolute() and not Path(named).is_dir():
        raise ValueError(f"model: the base model of the adapter {folder} is not there: {named}")
    if (Path(named) / CONFIG_FILE).is_file():
        raise ValueError(
            f"model: the base of the adapter {folder} is itself an adapter: {named}; merge that one first"
        )
    own = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return AdapterFiles(folder, weights, named, str(folder) if own else named)


def open_adapter(files: AdapterFiles, options: dict[str, Any], name: str = "model") -> PeftModel:
    """The base model, with the vocabulary and the positions of the adapter's training, and its weights in it.

    Args:
        options: of AutoModelForCausalLM.from_pretrained, for the base.

    Raises:
        ValueError: a base that cannot be opened or does not fit; weights that are missing or too many.
    """
    if (files.folder / LONGLORA_FILE).is_file():
        raise ValueError(
            f"{name}: {files.folder} is an old LongLoRA folder (embeddings and norms in {LONGLORA_FILE}); "
            f"convert it first: sinklora merge {files.folder} --context TOKENS --output DIR"
        )
    base = open_weights(files.base, options, name)
    shapes = read_shapes(files.weights)
    resize_vocabulary(base, shapes, files)
    positions = read_positions(files.folder)
    if positions is not None:
        restore_positions(base, positions, str(files.folder))
    return put_on(base, files, set(shapes), name)


def put_on(base: PreTrainedModel, files: AdapterFiles, keys: set[str], name: str = "model") -> PeftModel:
    """The adapter's weights, whose names are `keys`, in the layers of its base. Raises ValueError."""
    try:
        adapted = PeftModel.from_pretrained(base, str(files.folder))
    except UNUSABLE as error:
        broken = broken_file(files.folder)
        if broken is not None:
            raise ValueError(f"{name}: {broken[0]} is broken: {broken[1]}") from error
        # PEFT looks whole modules up by name.
        what = f"{files.weights.name} has no {error.args[0]}" if isinstance(error, KeyError) else None
        raise ValueError(
            f"{name}: the adapter {files.folder} does not fit {files.base}: {what or first_line(error)}"
        ) from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    vocabulary = tuple(f"{PREFIX}{each}." for each in _vocabulary_layers(base))
    for words, wrong in (
        ("has no", expected - keys),
        # PEFT may save resized embeddings under other names as well.
        ("has", {key for key in keys - expected if not key.startswith(vocabulary)}),
    ):
        if wrong:
            raise ValueError(
                f"{name}: the adapter {files.folder} does not fit {files.base}: {files.weights.name} {words} "
                f"{shown(wrong)}"
            )
    return adapted


def resize_vocabulary(base: PreTrainedModel, shapes: Shapes, files: AdapterFiles) -> None:
    """Gives the base as many tokens as the adapter's embeddings have, before those are put in.

    Raises ValueError for an adapter that has embeddings of new tokens, and no output rows of theirs.
    """
    embedding, output = _vocabulary_layers(base)
    rows, now = _rows(shapes, embedding), num_tokens(base)
    if rows is None or rows == now:
        return
    if rows > now and not is_tied(base) and _rows(shapes, output) is None:
        raise ValueError(
            f"model: the adapter {files.folder} has embeddings of {rows - now} tokens that {files.base} has "
            "not, and no output layer of theirs; resize the base first"
        )
    # The new rows come with the adapter.
    base.resize_token_embeddings(rows, mean_resizing=False)
    logger.info("vocabulary: %d tokens instead of %d, as the adapter has", rows, now)


def num_tokens(model: PreTrainedModel) -> int:
    return int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])


def is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _vocabulary_layers(base: PreTrainedModel) -> tuple[str, str]:
    """Names of the input embedding and of the output layer."""
    names = {id(module): name for name, module in base.named_modules()}
    return names[id(base.get_input_embeddings())], names.get(id(base.get_output_embeddings()), "")


def _rows(shapes: Shapes, layer: str) -> int | None:
    for ending in (".weight", ".base_layer.weight"):
        found = shapes.get(f"{PREFIX}{layer}{ending}")
        if found is not None:
            return found[0]
    return None
