"""Stretches a model's rotary positions for a longer context."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any, Literal, NamedTuple, get_args

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..hf.rope import Positions, config_takes, context_of, positions_of, set_positions
from ..hf.settings import text_config

logger = logging.getLogger("sinklora")

Rope = Literal["linear", "yarn", "dynamic", "llama3"]
# What the frequencies are computed from before any scaling; kept whatever the type.
_OF_EVERY_TYPE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
_WITH_ORIGINAL = ("yarn", "llama3", "longrope")


class PositionPlan(NamedTuple):
    """Positions for a context: what to write into the config, and in words what becomes of the present ones.

    factor: how many times further they reach than the present ones; 1.0: nothing changes.
    """

    positions: Positions
    factor: float
    words: str


def extend_positions(model: PreTrainedModel, context: int, rope: Rope = "linear") -> float:
    """Stretches a model's rotary positions to reach `context` tokens, in place.

    Returns how many times further they reach (1.0: they did already, nothing changed).

    Args:
        rope: "linear" divides all positions by one factor (position interpolation, Chen et al., arXiv
            2306.15595); "yarn" divides the slow frequencies only and sharpens the attention (Peng et al.,
            arXiv 2309.00071); "dynamic" leaves positions as they are up to the trained length and slows them
            from there, by the length of each text (NTK); "llama3" is for models that have it.

    A model whose positions scale already: by the same type, the factors are multiplied; by another type, that
    is replaced, and the factor counts from the length before any scaling. What was done is logged in one
    sentence (level INFO), and stands in config.rope_parameters and config.max_position_embeddings, so that a
    saved model needs no flag. With "dynamic", max_position_embeddings is the length before any scaling, as
    transformers computes those positions from it.

    Raises:
        ValueError: an unknown `rope`, or "llama3" for a model without. NotImplementedError: positions that
        are not rotary, differ between layers, or do not follow config.rope_parameters.
    """
    plan = plan_positions(model.config, context, rope)
    set_positions(model, plan.positions)
    logger.info("positions: %s", plan.words)
    return plan.factor


def plan_positions(config: PreTrainedConfig, context: int, rope: Rope = "linear") -> PositionPlan:
    """What extend_positions would do to a model of this config. Raises as it does."""
    if rope not in get_args(Rope):
        raise ValueError(f"rope: expected one of {', '.join(get_args(Rope))} or None, got {rope!r}")
    config = text_config(config)
    now = positions_of(config)
    reach = context_of(config)
    assert reach is not None  # as positions_of found them
    if context <= reach:
        return PositionPlan(now, 1.0, f"unchanged, as the model takes {reach} tokens already")
    original, factor = _before_scaling(now, reach)
    if rope == "llama3" and now.kind != "llama3":
        raise ValueError(f'rope: expected "llama3" for a model with such positions, got it for {now.kind}')
    same = now.kind == rope
    # llama3's trained length is not its factor times the original one.
    new_factor = factor * context / reach if same and rope in ("linear", "llama3") else context / original
    words = f"{rope} scaling by {new_factor:g} from {original} tokens"
    if same:
        words += f" (the model's own {factor:g} times {new_factor / factor:g})"
    elif now.kind != "default":
        words = f"the model's own {now.kind} scaling from {original} tokens is replaced by {words}"
    words += f"; {reach} tokens become {context}"
    positions = _positions(now, rope, new_factor, original, context)
    if not config_takes(config, positions):
        positions = _as_longrope(config, positions, original)
        words += f"; written as longrope, which is what {type(config).__name__} takes"
    return PositionPlan(positions, context / reach, words)


def _before_scaling(now: Positions, reach: int) -> tuple[int, float]:
    """(tokens that the positions reached before any scaling, the factor since)."""
    parameters, trained = now
    factor = parameters.get("factor")
    if now.kind in ("default", "dynamic"):
        return trained, float(factor or 1.0)
    if now.kind == "linear":
        return round(trained / float(factor or 1.0)), float(factor or 1.0)
    if now.kind in _WITH_ORIGINAL:
        original = int(parameters["original_max_position_embeddings"])
        return original, float(factor or reach / original)
    raise NotImplementedError(
        f"rope: the model's positions scale already, by a type not known here ({now.kind!r}); pass rope=None "
        "to train with the positions it has"
    )


def _positions(now: Positions, rope: str, factor: float, original: int, context: int) -> Positions:
    """The config's entries for positions of type `rope`."""
    if now.kind == rope:
        parameters = {**now.rope_parameters, "factor": factor}
        if rope == "yarn" and _is_yarns_default(now.rope_parameters):
            # It belongs to the old factor; left out, it is computed from the new one.
            parameters.pop("attention_factor", None)
    else:
        parameters = {key: now.rope_parameters[key] for key in _OF_EVERY_TYPE if key in now.rope_parameters}
        parameters.update(rope_type=rope, factor=factor)
        if rope in _WITH_ORIGINAL:
            parameters["original_max_position_embeddings"] = original
    return Positions(parameters, original if rope == "dynamic" else context)


def _is_yarns_default(parameters: dict[str, Any]) -> bool:
    given, factor = parameters.get("attention_factor"), parameters.get("factor")
    return given is None or (
        factor is not None and math.isclose(given, 0.1 * math.log(max(factor, 1.0)) + 1.0, rel_tol=1e-6)
    )


def _as_longrope(config: PreTrainedConfig, positions: Positions, original: int) -> Positions:
    """The same frequencies as factors of longrope, one for each pair of dimensions.

    Phi-3's config takes no other scaling; with equal factors for short and long texts longrope is any fixed
    scaling. Raises NotImplementedError where that is not taken either.
    """
    refusal = NotImplementedError(
        f"rope: {type(config).__name__} does not take positions of rope_type {positions.kind!r}"
    )
    if positions.kind == "dynamic":  # its frequencies depend on the text
        raise refusal
    changed = copy.deepcopy(config)
    changed.rope_parameters = copy.deepcopy(positions.rope_parameters)
    changed.max_position_embeddings = positions.max_position_embeddings
    if hasattr(changed, "original_max_position_embeddings"):  # it goes before the entry of rope_parameters
        changed.original_max_position_embeddings = original
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[positions.kind](changed)
    changed.rope_parameters = {**positions.rope_parameters, "rope_type": "linear", "factor": 1.0}
    plain, _ = ROPE_INIT_FUNCTIONS["linear"](changed)
    factors = (plain.double() / frequencies.double()).tolist()
    parameters = {key: value for key, value in positions.rope_parameters.items() if key in _OF_EVERY_TYPE} | {
        "rope_type": "longrope",
        "factor": positions.rope_parameters["factor"],
        "attention_factor": attention_factor,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": getattr(config, "original_max_position_embeddings", original),
    }
    written = Positions(parameters, positions.max_position_embeddings)
    if not config_takes(config, written):
        raise refusal
    return written
