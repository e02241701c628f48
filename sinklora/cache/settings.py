"""What an H2OCache may be asked for: models that can have one, settings, and the layers that come of them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any

from ..budget import Budget
from ..hf.settings import text_config
from .layer import H2OLayer, Settings
from .ranks import RankedLayer
from .rotary import Rotary

Entries = int | float
_POSITIONS = ("original", "cache")
_REDUCTIONS = ("sum", "mean")
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})


def decoder_config(config: Any) -> Any:
    """The language model's config. Raises TypeError, NotImplementedError where its cache is of another
    kind.
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config: expected a model's config (model.config), got {type(config)!r}")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError("config: expected a decoder-only model, got an encoder-decoder's")
    text: Any = text_config(config)
    others = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        raise NotImplementedError(
            f"config: expected layers of plain attention, got layer_types {sorted(others)}"
        )
    rank = getattr(text, "kv_lora_rank", None)
    if rank is not None:
        raise NotImplementedError(
            f"config: expected keys cached as attention gets them, got latent attention (kv_lora_rank {rank})"
        )
    if getattr(text, "kv_sharing_modes", None) is not None or getattr(text, "num_kv_shared_layers", None):
        raise NotImplementedError("config: expected keys of each layer's own, got layers that share them")
    return text


def make_settings(score_window: int | None, group_reduction: str, positions: str, record: bool) -> Settings:
    """Raises ValueError or TypeError for a setting that is none."""
    if score_window is not None:
        if isinstance(score_window, bool) or not isinstance(score_window, numbers.Integral):
            raise TypeError(f"score_window: expected an integer or None, got {type(score_window)!r}")
        if score_window < 1:
            raise ValueError(f"score_window: expected at least 1 query, or None for all, got {score_window}")
        score_window = operator.index(score_window)
    if group_reduction not in _REDUCTIONS:
        raise ValueError(f"group_reduction: expected one of {_REDUCTIONS}, got {group_reduction!r}")
    if positions not in _POSITIONS:
        raise ValueError(f"positions: expected one of {_POSITIONS}, got {positions!r}")
    if not isinstance(record, bool):
        raise TypeError(f"record: expected a bool, got {type(record)!r}")
    return Settings(score_window, group_reduction, positions, record)


def make_budgets(heavy: Any, recent: Any, num_sink_tokens: int, num_layers: int) -> list[Budget]:
    """One budget a layer. Raises ValueError for a list of another length, and Budget's errors."""
    pairs = zip(_each("heavy", heavy, num_layers), _each("recent", recent, num_layers), strict=True)
    return [Budget(*pair, num_sink_tokens) for pair in pairs]


def make_layers(budgets: Sequence[Budget], settings: Settings) -> list[H2OLayer]:
    """Empty layers."""
    layers: list[H2OLayer]
    if settings.positions == "original":
        layers = [H2OLayer(i, budget, settings) for i, budget in enumerate(budgets)]
    else:
        rotary = Rotary()
        layers = [RankedLayer(i, budget, settings, rotary) for i, budget in enumerate(budgets)]
    for layer in layers:
        layer.num_layers, layer.first = len(layers), layers[0]
    return layers


def _each(name: str, value: Any, num_layers: int) -> list[Entries]:
    if not isinstance(value, (list, tuple)):
        return [value] * num_layers
    if len(value) != num_layers:
        raise ValueError(
            f"{name}: expected one value, or one for each of the model's {num_layers} layers, got "
            f"{len(value)}"
        )
    return list(value)


def check_shape(path: Any, layers: Sequence[H2OLayer], config: Any) -> None:
    """ValueError unless layers, from path, can be of a model with this config."""
    found = {"num_hidden_layers": len(layers)}
    if layers[0].is_initialized:
        found["num_key_value_heads"], found["head_dim"] = layers[0].keys.shape[1], layers[0].keys.shape[3]
    heads = config.num_attention_heads
    expected = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }
    for name, number in found.items():
        if number != expected[name]:
            raise ValueError(f"{path}: expected {name} {expected[name]}, as the config says, got {number}")
