"""The attention function of the name "sinklora" in transformers' AttentionInterface.

In training mode it is SF-Attn (below). In eval mode it is exact full causal attention (full.py), over an
H2OCache that cache's own (h2o.py). What it cannot honour it refuses by name; nothing is dropped.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from ..cache import link as cache_link
from ..pattern import SFPattern
from .full import full_attention, run_kernel
from .h2o import h2o_attention
from .masks import Rows, find_rows, padding_of_dense
from .saving import watch_saving
from .settings import CONFIG_KEY, from_settings

logger = logging.getLogger("sinklora")

_DEFAULT = (SFPattern(), "full")

# What models hand to their attention function that changes the result and that neither path here computes.
_REFUSED = {
    "softcap": "soft-capped logits (softcap)",
    "s_aux": "learned sink logits (s_aux)",
    "sinks": "learned sink logits (sinks)",
    "indices": "keys chosen by an indexer (indices)",
    "block_indices": "keys chosen by an indexer (block_indices)",
    "cache": "the paged cache of continuous batching",
}
_ELSEWHERE = 'model.set_attn_implementation("sdpa") or "eager" for this model'

_said: dict[int, set[str]] = {}


def sinklora_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: query (B, H, n_query, D), key and value (B, Hkv, n_key, D) -> (B, n_query, H,
    D).

    attention_mask is what `sinklora_mask` made, or a caller's own dense mask. Other keyword arguments are
    those that transformers passes through a model: position_ids and cu_seq_lens_q/_k tell packed rows apart.
    Raises NotImplementedError for what cannot be honoured, saying what to change.
    """
    _refuse_arguments(kwargs)
    pattern, eval_attention = settings_of(module.config)  # type: ignore[arg-type]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = cache_link.take(key)
    if layer is not None:
        output = h2o_attention(
            *(module, layer, query, key, value, attention_mask),
            causal=causal,
            scaling=scaling,
            eval_attention=eval_attention,
            sliding_window=sliding_window,
            position_bias=position_bias,
            kwargs=kwargs,
        )
        return output, None
    if module.training or eval_attention == "sf":
        _refuse_for_sf(module, query, key, dropout, causal, sliding_window, position_bias)
        rows = _rows_for_sf(attention_mask, query.shape[2], kwargs)
        if module.training and not torch.compiler.is_compiling():
            _warn_short_rows(module.config, pattern, query.shape[2])
        return run_kernel(module, query, key, value, pattern, scaling, rows), None

    output = full_attention(
        *(module, query, key, value, attention_mask),
        causal=causal,
        dropout=dropout,
        scaling=scaling,
        position_bias=position_bias,
        kwargs=kwargs,
    )
    return output, None


def settings_of(config: Any) -> tuple[SFPattern, str]:
    """The pattern and eval_attention that a config carries, or the defaults; what is used is said once."""
    settings = getattr(config, CONFIG_KEY, None)
    found = _DEFAULT if settings is None else from_settings(settings)
    if not torch.compiler.is_compiling() and first_time(config, "active"):
        watch_saving(import_peft=False)  # PEFT may have come after `register`, and `patch` was not called
        line = describe(*found, getattr(config, "num_attention_heads", None))
        if settings is None:
            logger.warning("the model's config carries no sinklora settings, using the defaults: %s", line)
        else:
            logger.info("as the model's config says: %s", line)
    return found


def describe(pattern: SFPattern, eval_attention: str, num_heads: int | None) -> str:
    """One line of what is active."""
    _, shift, sinks, fraction, _ = pattern.settings
    share = (
        f"{fraction:g} of the heads"
        if num_heads is None
        else f"{int(num_heads * fraction)} of {num_heads} heads"
    )
    in_eval = "full causal attention" if eval_attention == "full" else "SF-Attn too"
    return (
        f"SF-Attn in training mode (group_size {pattern.group_size}, {sinks} sink tokens, {share} shifted by "
        f"{shift}), {in_eval} in eval mode"
    )


def first_time(config: Any, topic: str) -> bool:
    """Is this the first question about this topic for this config object since `forget`?"""
    topics = _said.get(id(config))
    if topics is None:
        topics = _said[id(config)] = set()
        weakref.finalize(config, _said.pop, id(config), None)
    if topic in topics:
        return False
    topics.add(topic)
    return True


def forget(config: Any) -> None:
    """What was said about config's settings may be said again: they are new."""
    if id(config) in _said:
        _said[id(config)].clear()


def _warn_short_rows(config: Any, pattern: SFPattern, num_tokens: int) -> None:
    if num_tokens <= pattern.group_size and first_time(config, "short rows"):
        logger.warning(
            "a training row of %d tokens is no longer than a group of %d: SF-Attn in unshifted heads "
            "is then full attention; choose a smaller group_size or longer rows",
            num_tokens,
            pattern.group_size,
        )


def _refuse_arguments(kwargs: dict[str, Any]) -> None:
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: sinklora cannot compute {meaning}; use {_ELSEWHERE}")
    if kwargs.get("output_attentions", False):
        raise NotImplementedError(
            "output_attentions: expected False, got True; sinklora never stores attention weights, "
            'model.set_attn_implementation("eager") does'
        )


def _refuse_for_sf(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    dropout: float,
    causal: bool,
    sliding_window: int | None,
    position_bias: torch.Tensor | None,
) -> None:
    mode = "in training mode" if module.training else 'with eval_attention="sf"'
    n_query, n_key = query.shape[2], key.shape[2]
    if not causal:
        raise NotImplementedError(
            f"is_causal: SF-Attn {mode} is causal, got a non-causal layer; use {_ELSEWHERE}"
        )
    if n_query != n_key:
        change = (
            "model.eval() for generation, use_cache=False, no prefix tuning"
            if module.training
            else 'eval_attention="full"'
        )
        raise NotImplementedError(
            f"past_key_values: SF-Attn {mode} needs as many queries as keys, got {n_query} and {n_key} "
            f"(past tokens in a cache); change to {change}"
        )
    if dropout > 0:
        raise NotImplementedError(
            f"attention_dropout: expected 0, got {dropout}; SF-Attn has no dropout, load the model with "
            "attention_dropout=0.0 (its layers keep the value they were built with)"
        )
    if sliding_window is not None and 0 < sliding_window < n_key:
        raise NotImplementedError(
            f"sliding_window: expected none, or at least the {n_key} tokens of a row, got {sliding_window}; "
            "load the model with sliding_window=None (use_sliding_window=False) or train on shorter rows"
        )
    if position_bias is not None:
        raise NotImplementedError(f"position_bias: SF-Attn adds no bias to the scores; use {_ELSEWHERE}")


def _rows_for_sf(attention_mask: torch.Tensor | None, num_tokens: int, kwargs: dict[str, Any]) -> Rows:
    if attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim <= 2):
        return find_rows(attention_mask, num_tokens, kwargs)
    padding_mask = None
    if isinstance(attention_mask, torch.Tensor) and not torch.compiler.is_compiling():
        padding_mask = padding_of_dense(attention_mask, num_tokens)
    if padding_mask is None:
        raise NotImplementedError(
            f"attention_mask: SF-Attn takes a 2D padding mask or a causal one, got one of shape "
            f"{tuple(attention_mask.shape)} that is more (or that cannot be read here); pass the 2D mask, or "
            "position_ids that restart for packed rows"
        )
    return find_rows(padding_mask, num_tokens, kwargs)
