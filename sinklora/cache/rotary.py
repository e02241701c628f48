"""Rotary embeddings of the model's own, undone and redone: what positions="cache" needs.

A layer gets keys that are already rotated, and no cos and sin. Those come from the rotary class of the module
that defines the layer, made from the layer's config: the same numbers that the model rotated with.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Rope types whose frequencies do not change with the length, so that a rotation can be undone later.
_FIXED = frozenset({"default", "linear", "yarn", "llama3"})
_SUFFIX, _FUNCTION = "RotaryEmbedding", "apply_rotary_pos_emb"
_WHY = 'positions: "cache" '


@dataclasses.dataclass
class Received:
    """The rotation that a forward's new tokens came with: float32 (B or 1, n, rotary dim) each."""

    cos: Tensor
    sin: Tensor
    positions: Tensor  # int64 (B or 1, n)
    _stands: bool | None = None

    def stands_at(self, ranks: Tensor, mask: Tensor | None) -> bool:
        """Are the positions of the kept tokens these? They are the same for all layers: asked only once."""
        if self._stands is None:
            there = self.positions == ranks
            self._stands = bool((there if mask is None else there | ~mask).all())
        return self._stands


class Rotary:
    """cos and sin of the model that a cache is used with; one for all its layers.

    Finds the model's class at the first call, and refuses with NotImplementedError what it cannot undo.
    """

    def __init__(self) -> None:
        self._embedding: Any = None
        self._config: Any = None  # the embedding is of the model with this one
        self._table: tuple[Tensor, Tensor] | None = None
        self._memo: tuple[weakref.ref[Tensor], torch.dtype, Received] | None = None

    def received(self, module: torch.nn.Module, index: int, positions: Tensor, like: Tensor) -> Received:
        """What layer `index` of the model, module, rotated tokens at these positions with, in like's
        dtype.
        """
        if self._config is not module.config:  # after a reset another model may use the cache
            self._embedding, self._table, self._memo = _find(module, like.shape[-1]), None, None
            self._config = module.config
        memo = self._memo
        if index and memo is not None and memo[0]() is positions and memo[1] == like.dtype:
            return memo[2]  # all layers of a forward rotate alike
        cos, sin = (each.float() for each in self._embedding(like, positions))
        found = Received(cos, sin, positions)
        self._memo = weakref.ref(positions), like.dtype, found
        return found

    def of_ranks(self, ranks: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
        """float32 cos and sin, (*ranks.shape, rotary dim), of ranks, all below num_ranks."""
        table = self._table  # copies of a cache share it, also those in other threads
        if table is None or len(table[0]) < num_ranks:
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(num_ranks + num_ranks // 4, device=ranks.device)[None]
                like = torch.empty(0, dtype=torch.float32, device=ranks.device)
                cos, sin = self._embedding(like, positions)
                table = self._table = cos[0], sin[0]
        return table[0][ranks], table[1][ranks]

    def memory_bytes(self) -> int:
        """Bytes of the table of ranks."""
        return 0 if self._table is None else sum(part.untyped_storage().nbytes() for part in self._table)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotary:
        return self  # it holds what the model says, nothing of a text

    def __reduce__(self) -> tuple[type[Rotary], tuple[()]]:
        return Rotary, ()  # a pickled cache finds the model's class again


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (.., n, D) rotated in float32; cos and sin (.., n, at most D): the first dimensions are the
    rotated.
    """
    dim = cos.shape[-1]
    front = x[..., :dim].float()
    turned = front * cos + _half(front) * sin
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:].float()], -1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of rotate, for cos and sin as they are: rounded or scaled, their squares need not sum to
    1.
    """
    square = cos * cos + sin * sin
    return rotate(x, cos / square, -sin / square)


def refuse_config(config: Any) -> None:
    """NotImplementedError where a config already tells that its rotation cannot be undone."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_type" not in rope:
        raise NotImplementedError(
            _WHY + f"needs one rotary embedding for all layers, got rope_parameters {rope!r}"
        )
    if rope["rope_type"] not in _FIXED or "mrope_section" in rope:
        raise NotImplementedError(
            _WHY
            + f"needs frequencies that do not change with the length, rope_type one of {sorted(_FIXED)}, got "
            f"{rope['rope_type']!r}{' of several axes' if 'mrope_section' in rope else ''}"
        )
    layers = getattr(config, "no_rope_layers", None) or ()
    if 0 in layers or len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise NotImplementedError(_WHY + "needs layers that all rotate alike, got layers of several kinds")


def _half(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat([-x[..., middle:], x[..., :middle]], -1)


def _find(module: torch.nn.Module, head_dim: int) -> Any:
    """The rotary embedding of module's model. Raises NotImplementedError where it is not as rotate has it."""
    refuse_config(module.config)
    names = [kind.__module__ for kind in type(module).__mro__ if kind.__module__ in sys.modules]
    for name in names:
        source = vars(sys.modules[name])
        classes = [each for key, each in source.items() if key.endswith(_SUFFIX) and isinstance(each, type)]
        if classes:
            break
    kind = type(module).__name__
    if not names or len(classes) != 1 or _FUNCTION not in source:
        raise NotImplementedError(
            _WHY + f"needs one class *{_SUFFIX} and a function {_FUNCTION} beside {kind}, found "
            f"{[each.__name__ for each in classes]}"
        )
    embedding = classes[0](config=module.config)
    if not _is_half_split(embedding, source[_FUNCTION], head_dim):
        raise NotImplementedError(
            _WHY + f"needs a rotation of a head's first half against its second half, which {kind}'s is not"
        )
    return embedding


def _is_half_split(embedding: Any, apply: Callable[..., Any], head_dim: int) -> bool:
    """Does the model's own function rotate a query as rotate does?"""
    query = torch.arange(3 * head_dim, dtype=torch.float32).sin().view(1, 1, 3, head_dim)
    cos, sin = embedding(query, torch.arange(5, 8)[None])
    dim = cos.shape[-1]
    if dim > head_dim or dim % 2 or not torch.equal(cos[..., : dim // 2], cos[..., dim // 2 :]):
        return False
    expected = rotate(query, cos[:, None], sin[:, None])
    for size in {head_dim, dim}:  # partial rotary: within the function, or by the layer before it calls it
        try:
            found = apply(query[..., :size], query[..., :size], cos, sin)[0]
        except (RuntimeError, TypeError, ValueError):
            continue
        if found.shape[-1] == size:
            return torch.allclose(found, expected[..., :size], atol=1e-5)
    return False
