"""Folders that LongLoRA's own scripts wrote, opened as those scripts meant them.

Such a folder holds an adapter of PEFT, and beside it trainable_params.bin: the embeddings and norms that were
trained whole. Nothing in it says how far positions were stretched: LongLoRA set that at every start.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import LONGLORA_FILE, PREFIX, AdapterFiles, num_tokens, put_on
from .hf.rope import Positions, positions_of, set_positions
from .weights import open_weights, read_shapes, read_tensors, shown

logger = logging.getLogger("sinklora")

# The token that LongLoRA's training added where a tokenizer had nothing to pad with.
PAD_TOKEN = "[PAD]"


def is_longlora(folder: Path) -> bool:
    return (folder / LONGLORA_FILE).is_file()


def open_longlora(
    files: AdapterFiles, options: dict[str, Any], *, context: int | None, rope_factor: float | None
) -> PeftModel:
    """The base model with a LongLoRA folder's adapter, embeddings and norms, and its positions interpolated.

    Args:
        options: of AutoModelForCausalLM.from_pretrained, for the base.
        context: tokens it was trained at; the factor is then the whole number of the base's contexts in it,
            as LongLoRA's scripts computed it.
        rope_factor: the factor itself, instead.

    Raises:
        ValueError: neither or both of those; files that are broken, hold more than tensors, or do not fit
            the base.
    """
    _check(files.folder, context, rope_factor)
    trained = trained_weights(files.folder) if is_longlora(files.folder) else {}
    base = open_weights(files.base, options)
    positions = interpolated(positions_of(base.config), context, rope_factor)
    _put_in(base, trained, files)
    set_positions(base, positions)
    return put_on(base, files, set(read_shapes(files.weights)))


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Embeddings and norms of trainable_params.bin, by their names in the base model."""
    found = read_tensors(folder / LONGLORA_FILE)
    # The rotary frequencies that old versions of transformers saved are computed today.
    return {
        key.removeprefix(PREFIX): value
        for key, value in found.items()
        if not key.endswith("rotary_emb.inv_freq")
    }


def interpolated(now: Positions, context: int | None, rope_factor: float | None) -> Positions:
    """The positions that LongLoRA's scripts gave a base at their start."""
    if now.kind != "default":
        raise ValueError(
            f"base: expected a model whose positions do not scale yet, as LongLoRA's were, got {now.kind}"
        )
    trained = now.max_position_embeddings
    factor = float(math.ceil(context / trained)) if context is not None else float(rope_factor or 1.0)
    if factor <= 1.0:
        return now
    parameters = {**now.rope_parameters, "rope_type": "linear", "factor": factor}
    return Positions(parameters, context if context is not None else round(trained * factor))


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Adds the token that LongLoRA's training added, where the model has a row for it."""
    if tokenizer.pad_token is None and len(tokenizer) == rows - 1:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def _check(folder: Path, context: int | None, rope_factor: float | None) -> None:
    if (context is None) == (rope_factor is None):
        got = "neither" if context is None else "both"
        raise ValueError(
            f"context: expected the tokens that {folder} was trained at, or instead --rope-factor, as the "
            f"folder of an old LongLoRA run does not say, got {got}"
        )
    if context is not None and context < 1:
        raise ValueError(f"context: expected at least 1, got {context}")
    if rope_factor is not None and not rope_factor >= 1.0:
        raise ValueError(f"rope_factor: expected at least 1, got {rope_factor}")


def _put_in(base: PreTrainedModel, trained: dict[str, torch.Tensor], files: AdapterFiles) -> None:
    source = files.folder / LONGLORA_FILE
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    embedding = trained.get(names[id(base.get_input_embeddings().weight)])
    if embedding is not None and embedding.ndim == 2 and embedding.shape[0] != num_tokens(base):
        _resize(base, embedding.shape[0])
    parameters = dict(base.named_parameters())
    unknown = set(trained) - set(parameters)
    if unknown:
        raise ValueError(f"base: {source} holds {shown(unknown)}, which {files.base} does not have")
    for name, value in trained.items():
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"base: {source} holds {name} of shape {tuple(value.shape)}, but in {files.base} it has "
                f"{tuple(parameters[name].shape)}"
            )
        with torch.no_grad():
            parameters[name].copy_(value)
    logger.info("%s: %d trained embeddings and norms", source, len(trained))


def _resize(base: PreTrainedModel, rows: int) -> None:
    """Adds rows of the mean of all others to embedding and output, as LongLoRA's scripts did: only those of
    the embedding were saved."""
    before = num_tokens(base)
    base.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if layer is not None and rows > before:
                weight: Any = layer.weight
                weight[before:] = weight[:before].mean(dim=0, keepdim=True)
    logger.info("vocabulary: %d tokens instead of %d", rows, before)
