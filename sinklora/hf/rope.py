"""A model's rotary positions as its config says them, and setting them in a model that exists.

transformers reads config.rope_parameters and config.max_position_embeddings when it builds a model; a change
later needs the rotary modules computed again, which is done here in place: whoever holds such a module, or
has hooks on it, keeps both.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .settings import base_model, text_config

logger = logging.getLogger("sinklora")

# Where set_positions remembers on the model what it had. Not in the config: it is not to be saved.
BEFORE = "_sinklora_positions_before"
# Frequencies are compared in the dtype that the model's were cast to, at worst bfloat16.
_TOLERANCE = 1e-2


class Positions(NamedTuple):
    """The two entries of a config that decide its rotary positions."""

    rope_parameters: dict[str, Any]
    max_position_embeddings: int

    @property
    def kind(self) -> str:
        return str(self.rope_parameters["rope_type"])


def positions_of(config: PreTrainedConfig) -> Positions:
    """The positions of a config that has one kind for all layers. Raises NotImplementedError for others."""
    config = text_config(config)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise NotImplementedError(
            f"rope: {config.model_type} has no rotary positions (config.rope_parameters) to stretch"
        )
    if "rope_type" not in parameters:
        raise NotImplementedError(
            f"rope: {config.model_type} has different positions in different layers "
            f"({', '.join(parameters)}); one factor does not fit them"
        )
    trained = getattr(config, "max_position_embeddings", None)
    if not isinstance(trained, int):
        raise NotImplementedError("rope: the model's config has no max_position_embeddings to extend from")
    return Positions(copy.deepcopy(dict(parameters)), trained)


def context_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model's positions reach; None where its config does not say.

    max_position_embeddings, except where the factor counts from it: "dynamic" positions are computed from
    the length they were trained at, and "yarn" is often written beside an unchanged length.
    """
    try:
        parameters, trained = positions_of(config)
    except NotImplementedError:
        length = getattr(text_config(config), "max_position_embeddings", None)
        return length if isinstance(length, int) else None
    factor = float(parameters.get("factor") or 1.0)
    if parameters["rope_type"] == "dynamic":
        return round(trained * factor)
    if parameters["rope_type"] == "yarn":
        return max(trained, round(int(parameters["original_max_position_embeddings"]) * factor))
    return trained


def config_takes(config: PreTrainedConfig, positions: Positions) -> bool:
    """Whether a config of this class, saved with these positions, is the same once opened again."""
    try:
        again = type(config).from_dict({**copy.deepcopy(config.to_dict()), **_entries(positions)})
    except (StrictDataclassError, ValueError, TypeError, KeyError):
        return False
    return bool(again.rope_parameters == positions.rope_parameters)


def set_positions(model: torch.nn.Module, positions: Positions) -> None:
    """Gives a model other rotary positions, in place; nothing is changed before everything could be.

    Raises:
        NotImplementedError: a model without rotary modules, one whose modules do not follow the config, or
            whose config does not take such positions.
    """
    base = base_model(model)
    config = text_config(base.config)
    before = positions_of(config)
    if before == positions:
        return
    if not config_takes(config, positions):
        raise NotImplementedError(
            f"rope: {type(config).__name__} does not take positions of rope_type {positions.kind!r}"
        )
    changed = copy.deepcopy(config)
    _write(changed, positions)
    rebuilt = [(module, _rebuilt(module, config, changed)) for module in _rotary_modules(base, config)]

    _write(config, positions)
    for module, new in rebuilt:
        _adopt(module, new)
        module.config = config
    if BEFORE not in base.__dict__:
        setattr(base, BEFORE, before)


def restore_positions(model: torch.nn.Module, saved: Positions, source: str) -> None:
    """Gives a model the positions that an adapter was trained with; one that has them is left alone.

    Raises:
        ValueError: positions that were stretched here already, and otherwise; or a model whose positions
            turn at another rate (rope_theta) or in another share of the dimensions: not the one that the
            adapter was trained on. NotImplementedError: as set_positions.
    """
    base = base_model(model)
    now = positions_of(base.config)
    same = now.rope_parameters == saved.rope_parameters
    if same and (now == saved or (saved.kind != "dynamic" and saved[1] <= now[1])):
        return
    for key, default in (("rope_theta", None), ("partial_rotary_factor", 1.0)):
        was, is_now = (each.rope_parameters.get(key, default) for each in (saved, now))
        if was != is_now:
            raise ValueError(
                f"{source}: {key}: expected the base that the adapter was trained on, with {was}, got a "
                f"model with {is_now}"
            )
    if BEFORE in base.__dict__ and not same:
        raise ValueError(
            f"{source}: trained with positions of {_words(saved)}, but the model's were already set to "
            f"{_words(now)}; open the base again"
        )
    set_positions(base, saved)
    logger.info("positions: %s instead of %s, as %s says", _words(saved), _words(now), source)


class Kept(NamedTuple):
    """What put_back gives back; positions None: of a model whose positions are not set here."""

    positions: Positions | None
    before: Positions | None


def keep(model: torch.nn.Module) -> Kept:
    """A model's positions, to be put back."""
    base = base_model(model)
    try:
        return Kept(positions_of(base.config), base.__dict__.get(BEFORE))
    except NotImplementedError:
        return Kept(None, None)


def put_back(model: torch.nn.Module, kept: Kept) -> None:
    base = base_model(model)
    if kept.positions is not None:
        set_positions(base, kept.positions)
    if kept.before is None and BEFORE in base.__dict__:
        delattr(base, BEFORE)


def _words(positions: Positions) -> str:
    factor = positions.rope_parameters.get("factor")
    scaled = f" by {factor:g}" if isinstance(factor, (int, float)) else ""
    return f"{positions.kind}{scaled} for {positions.max_position_embeddings} tokens"


def _entries(positions: Positions) -> dict[str, Any]:
    return copy.deepcopy(positions._asdict())


def _write(config: PreTrainedConfig, positions: Positions) -> None:
    for key, value in _entries(positions).items():
        setattr(config, key, value)


def _rotary_modules(base: PreTrainedModel, config: PreTrainedConfig) -> list[Any]:
    """The modules that compute the language model's rotary frequencies."""
    found = [
        module
        for module in base.modules()
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
        and getattr(module, "config", None) is config
    ]
    if not found:
        raise NotImplementedError(f"rope: found no rotary module in {type(base).__name__}")
    return found


def _rebuilt(module: Any, config: PreTrainedConfig, changed: PreTrainedConfig) -> Any:
    """A new rotary module for the changed config. Raises NotImplementedError where it would not follow it."""
    refusal = NotImplementedError(
        f"rope: {type(module).__name__} does not follow config.rope_parameters, so its positions cannot be "
        "stretched here; use rope=None and extend them yourself"
    )
    kind = changed.rope_parameters["rope_type"]
    try:
        now, new = type(module)(config=config), type(module)(config=changed)
        expected = ROPE_INIT_FUNCTIONS[kind](changed)[0] if kind != "default" else new.inv_freq
    except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise refusal from error
    # The frequencies in use may be those of a longer text: dynamic positions change them at run time.
    in_use = getattr(module, "original_inv_freq", module.inv_freq)
    if not (_alike(now.inv_freq, in_use) and _alike(new.inv_freq, expected)):
        raise refusal
    return new.to(module.inv_freq.device)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.float().cpu(), other.float().cpu(), rtol=_TOLERANCE, atol=0.0
    )


def _adopt(module: Any, new: Any) -> None:
    """Makes a rotary module what new is; caches of the frequencies it had go."""
    stale = [name for name in vars(module) if name.endswith("inv_freq") and name not in vars(new)]
    for name in stale:
        delattr(module, name)
    for name, value in vars(new).items():
        if not name.startswith("_") and name != "training":
            setattr(module, name, value)
    for name, buffer in new.named_buffers(recurse=False):
        module._buffers[name] = buffer
