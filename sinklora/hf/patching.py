"""SF-Attn in transformers: one registered attention name, and switching a model to it and back.

No forward method is replaced. transformers looks the name "sinklora" up for every attention call and every
mask (attention.py, masks.py); the settings live in the model's config (settings.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..pattern import SFPattern
from .attention import describe, first_time, forget, sinklora_attention
from .masks import sinklora_mask
from .rope import context_of, keep, put_back, restore_positions
from .saving import read_positions, watch_saving
from .settings import CONFIG_KEY, base_model, from_settings, read_directory, text_config, to_settings

NAME = "sinklora"
logger = logging.getLogger("sinklora")

Model = TypeVar("Model", bound=torch.nn.Module)
Source = SFPattern | str | os.PathLike[str] | None

# Where patch remembers on the model what unpatch gives back. Not in the config: it is not to be saved.
_BEFORE = "_sinklora_before"
_ABSENT = object()
_DEFAULTS = "defaults, as neither the call nor the model's config gives any"


class _Before(NamedTuple):
    """What a model had before it was patched: its attention's name, and settings of its configs (or None)."""

    attention: str | None
    settings: tuple[dict[str, Any] | None, ...]


def register() -> None:
    """Makes `attn_implementation="sinklora"` known to transformers. Idempotent; changes no model.

    A model loaded with that name uses the settings in its config (`config.sinklora`), else the default
    `SFPattern`.
    """
    AttentionInterface.register(NAME, sinklora_attention)
    # Without a mask function of this name transformers would drop the user's padding mask silently.
    AttentionMaskInterface.register(NAME, sinklora_mask)
    watch_saving(import_peft=False)


def patch(
    model: Model,
    pattern: Source = None,
    *,
    group_ratio: float | None = None,
    context: int | None = None,
    eval_attention: str | None = None,
) -> Model:
    """Switches a model's attention to SF-Attn in training mode and exact full causal attention in eval mode.

    Args:
        model: a transformers causal language model, a multimodal one (its text model is switched), or a
            wrapper of one (PEFT, torch.compile, DDP). The same object is returned.
        pattern: an `SFPattern`; or the directory of a saved model or adapter, whose settings are used (of an
            adapter also the rotary positions that it was trained with, which stay after `unpatch`); or None:
            what `model.config.sinklora` says, else the default `SFPattern`.
        group_ratio: instead of pattern, the group as a fraction of the context, resolved here and now.
        context: the context in tokens that group_ratio is a fraction of; default
            what the model's positions reach, mostly `config.max_position_embeddings`.
        eval_attention: "full", or "sf" to keep SF-Attn in eval mode (whole sequences only, no cache).
            Default: what the settings say, else "full".

    The settings are written to `model.config.sinklora` as plain JSON, so they are saved with the model;
    saving an adapter writes them beside it as sinklora.json. Patching again replaces them.

    Raises:
        ValueError: settings that are wrong or contradict each other, or a directory without any; an
            adapter's positions for another model.
        TypeError: a model or pattern of another kind.
        NotImplementedError: a model whose attention cannot be switched, or has what SF-Attn has not:
            attention dropout, soft-capped logits, non-causal layers.
    """
    base = base_model(model)
    config = text_config(base.config)
    settings, source = _resolve(config, pattern, group_ratio, context, eval_attention)
    positions = read_positions(pattern) if isinstance(pattern, (str, os.PathLike)) else None
    _refuse_model(base, config)
    register()
    watch_saving(import_peft=True)

    before, kept = _snapshot(base), keep(base)
    try:
        if positions is not None:
            restore_positions(base, positions, source)
        _switch(base, NAME)
        for each in _configs(base):
            setattr(each, CONFIG_KEY, dict(settings))
    except BaseException:
        _restore(base, before)
        put_back(base, kept)
        raise
    if _BEFORE not in base.__dict__:
        setattr(base, _BEFORE, before)
    _announce(base, config, settings, source)
    return model


def unpatch(model: Model) -> Model:
    """Gives a model back the attention and settings that it had before `patch`; one never patched is left
    alone.

    A model that was loaded with `attn_implementation="sinklora"` gets transformers' own default.
    """
    base = base_model(model)
    before = base.__dict__.get(_BEFORE)
    if before is not None:
        _restore(base, before)
        delattr(base, _BEFORE)
    if text_config(base.config)._attn_implementation == NAME:
        _switch(base, base.get_correct_attn_implementation(None))
    return model


@contextlib.contextmanager
def patched(
    model: Model,
    pattern: Source = None,
    *,
    group_ratio: float | None = None,
    context: int | None = None,
    eval_attention: str | None = None,
) -> Iterator[Model]:
    """`patch` for the length of a with block, after which the model is as it was before the block. Nests."""
    base = base_model(model)
    before, outer, kept = _snapshot(base), base.__dict__.get(_BEFORE, _ABSENT), keep(base)
    patch(model, pattern, group_ratio=group_ratio, context=context, eval_attention=eval_attention)
    try:
        yield model
    finally:
        _restore(base, before)
        put_back(base, kept)
        if outer is not _ABSENT:
            setattr(base, _BEFORE, outer)
        elif _BEFORE in base.__dict__:
            delattr(base, _BEFORE)


def _resolve(
    config: Any, pattern: Source, group_ratio: float | None, context: int | None, eval_attention: str | None
) -> tuple[dict[str, Any], str]:
    """The settings to use as plain JSON, and in words where they come from."""
    if context is not None and group_ratio is None:
        raise ValueError(f"context: expected only together with group_ratio, got {context} alone")
    if group_ratio is not None:
        if pattern is not None:
            raise ValueError("group_ratio: expected either a pattern or a group_ratio, got both")
        tokens = context_of(config) if context is None else context
        if tokens is None:
            raise ValueError(
                "context: expected a number of tokens, as config.max_position_embeddings is not set"
            )
        chosen = SFPattern.from_ratio(tokens, group_ratio)
        return to_settings(chosen, eval_attention or "full"), f"{group_ratio:g} of {tokens} tokens"
    if isinstance(pattern, SFPattern):
        return to_settings(pattern, eval_attention or "full"), "given"
    found: dict[str, Any] | None
    if isinstance(pattern, (str, os.PathLike)):
        found, source = read_directory(pattern), os.fspath(pattern)
    elif pattern is None:
        found, source = {}, ""
    else:
        raise TypeError(f"pattern: expected an SFPattern, a directory or None, got {type(pattern).__name__}")
    if not found:
        found, source = getattr(config, CONFIG_KEY, None), "the model's config"
        if not found:
            trained_fully = f"defaults, as {os.fspath(pattern)} was trained without" if pattern else None
            return to_settings(SFPattern(), eval_attention or "full"), trained_fully or _DEFAULTS
    carried, carried_eval = from_settings(found, source)
    return to_settings(carried, eval_attention or carried_eval), source


def _refuse_model(base: PreTrainedModel, config: Any) -> None:
    """Refuses what a model's config and layers already tell; the rest shows at the first call."""
    kind = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"model: expected a decoder-only model, got the encoder-decoder {kind}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(
            f"attn_logit_softcapping: expected None, got {config.attn_logit_softcapping} in {kind}'s config; "
            "SF-Attn has no soft-capped logits"
        )
    for module in base.modules():
        if getattr(module, "config", None) is not config:
            continue
        if getattr(module, "is_causal", True) is False or getattr(config, "is_causal", True) is False:
            raise NotImplementedError(
                f"model: expected causal attention, got the non-causal {type(module).__name__}"
            )
        if getattr(module, "sinks", None) is not None:
            raise NotImplementedError(
                f"model: expected plain softmax attention, got learned sink logits in {type(module).__name__}"
            )
        dropout = getattr(module, "attention_dropout", 0.0)
        if isinstance(dropout, (int, float)) and dropout > 0:
            raise NotImplementedError(
                f"attention_dropout: expected 0, got {dropout} in {type(module).__name__}; SF-Attn has no "
                "dropout; load the model with attention_dropout=0.0 (layers keep what they were built with)"
            )


def _text_model(base: PreTrainedModel) -> PreTrainedModel:
    """The outermost model inside base whose own config is the language model's."""
    config = text_config(base.config)
    for module in base.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            return module
    raise NotImplementedError(
        f"model: found no language model with its own config inside {type(base).__name__}"
    )


def _configs(base: PreTrainedModel) -> tuple[Any, ...]:
    """The configs that carry the settings: the one the layers read, and a multimodal model's outer one."""
    inner = text_config(base.config)
    return (inner,) if inner is base.config else (inner, base.config)


def _switch(base: PreTrainedModel, name: str | None) -> None:
    """Sets the language model's attention only. Raises NotImplementedError where it does not take."""
    model = _text_model(base)
    if model.config._attn_implementation == name:
        return
    model.set_attn_implementation({"": name})
    if model.config._attn_implementation != name:
        raise NotImplementedError(
            f"model: {type(model).__name__} does not use transformers' attention interface, so its attention "
            f'cannot be switched to "{name}" (it is still "{model.config._attn_implementation}")'
        )


def _snapshot(base: PreTrainedModel) -> _Before:
    settings = tuple(getattr(each, CONFIG_KEY, None) for each in _configs(base))
    return _Before(text_config(base.config)._attn_implementation, settings)


def _restore(base: PreTrainedModel, before: _Before) -> None:
    for each, settings in zip(_configs(base), before.settings, strict=True):
        if settings is not None:
            setattr(each, CONFIG_KEY, settings)
        elif hasattr(each, CONFIG_KEY):
            delattr(each, CONFIG_KEY)
    _switch(base, before.attention)
    forget(text_config(base.config))


def _announce(base: PreTrainedModel, config: Any, settings: dict[str, Any], source: str) -> None:
    """Says in one line what is active, and warns of settings that change little."""
    pattern, eval_attention = from_settings(settings)
    num_heads = getattr(config, "num_attention_heads", None)
    forget(config)
    first_time(config, "active")  # so that the first call does not say it again
    level = logging.WARNING if source == _DEFAULTS else logging.INFO
    logger.log(
        level,
        "%s: %s; settings: %s",
        type(base).__name__,
        describe(pattern, eval_attention, num_heads),
        source,
    )
    if (
        num_heads is not None
        and pattern.shifted_fraction > 0
        and int(num_heads * pattern.shifted_fraction) == 0
    ):
        logger.warning(
            "no head is shifted: %g of %d heads is less than one, so groups are joined by sink tokens only; "
            "choose a larger shifted_fraction",
            pattern.shifted_fraction,
            num_heads,
        )
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and 0 < window <= pattern.group_size:
        logger.warning(
            "sliding_window %d is no longer than a group of %d: training rows longer than the window are "
            "refused; load the model with sliding_window=None",
            window,
            pattern.group_size,
        )
