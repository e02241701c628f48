"""Follows the memory of tensors through a step, operator by operator; fake tensors take none themselves."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclasses.dataclass
class Peak:
    """The most memory of a phase, in bytes, and what of it were gradients of weights and scratch memory of
    attention."""

    total: float = 0
    gradients: float = 0
    workspace: float = 0


class MemoryWatch(TorchDispatchMode):
    """Inside, counts the bytes of every tensor that an operator makes until nothing holds it any more.

    Args:
        weights: their memory is not counted; their gradients' is.
        workspace: bytes that an operator takes for itself while it runs, by the operator and its arguments.

    The peak of each phase is kept; the phase is what `phase` was set to last.
    """

    def __init__(self, weights: Iterable[Tensor], workspace: Callable[[Any, Any], int]) -> None:
        super().__init__()
        self.weights = list(weights)
        self.workspace = workspace
        self.live = 0
        self.phase: Any = None
        self.peaks: dict[Any, Peak] = {}
        self._known: dict[int, Any] = {}
        self._given = {weight.untyped_storage()._cdata for weight in self.weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        scratch = self.workspace(func, args)
        peak = self.peaks.setdefault(self.phase, Peak())
        if self.live + scratch > peak.total:
            peak.total, peak.workspace = self.live + scratch, scratch
            peak.gradients = self.gradients()
        return result

    def gradients(self) -> int:
        """Bytes of the weights' gradients."""
        return sum(tensor_bytes(weight.grad) for weight in self.weights if weight.grad is not None)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._given:
            return
        size = storage.nbytes()
        self.live += size

        def gone(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)


def tensor_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


class Phases:
    """Tells a MemoryWatch where a model's training step is, by hooks on the model's layers.

    The phases are ("forward", i) for layer i (with what precedes the first), "loss" from the last layer's
    end until its gradient is there, ("backward", i), and "end" behind the first layer's backward.
    """

    def __init__(self, watch: MemoryWatch, layers: torch.nn.ModuleList) -> None:
        self.watch = watch
        self.saved = 0  # bytes at the end of the last layer's forward
        self.in_loss = False
        self.handles: list[Any] = []
        for i, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(self._before(i), with_kwargs=True))
        self.handles.append(layers[-1].register_forward_hook(self._behind(len(layers) - 1)))
        watch.phase = ("forward", 0)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, i: int) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            if self.in_loss:
                return  # checkpointing: the layer runs again, in the backward
            self.watch.phase = ("forward", i)
            states = args[0] if args else kwargs["hidden_states"]
            if states.requires_grad:
                states.register_hook(self._enter(("backward", i - 1) if i else "end"))

        return hook

    def _behind(self, last: int) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Any) -> None:
            if self.in_loss:
                return
            self.in_loss = True
            self.saved = self.watch.live
            self.watch.phase = "loss"
            states = output if isinstance(output, Tensor) else output[0]
            states.register_hook(self._enter(("backward", last)))

        return hook

    def _enter(self, phase: Any) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.watch.phase = phase

        return hook
