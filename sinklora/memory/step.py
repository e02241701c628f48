"""A training step on tensors without memory: the model's own code, and what it would have taken."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import types
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from ..finetune.prepare import prepare
from ..hf.settings import base_model
from ..pattern import SFPattern
from ..training.chunked_loss import use_chunked_loss
from .attention import plain_attention, workspace_of
from .watch import MemoryWatch, Peak, Phases, tensor_bytes

# Bytes of optimizer state for each trained weight, by the size of the weight's type.
OPTIMIZERS = {"adamw": lambda size: 2 * size, "adamw_8bit": lambda size: 2, "sgd": lambda size: 0}
# bitsandbytes' NF4 with blocks of 64 and the blocks' scales quantised again.
_BYTES_OF_4_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The arguments of memory_estimate that shape a step."""

    context: int
    batch_size: int
    pattern: SFPattern | Literal["full"] | None
    lora_rank: int
    train_embeddings_and_norms: bool
    target_modules: Any
    gradient_checkpointing: bool
    dtype: torch.dtype
    trained_dtype: torch.dtype | None
    autocast: torch.dtype | None
    optimizer: str
    chunk_tokens: int | None
    quantize: str | None
    accumulate: bool
    device: str


@dataclasses.dataclass
class Step:
    """What a step of a model took, in bytes: numbers that grow linearly with its layers."""

    weights: float
    optimizer: float
    saved: float
    peaks: dict[str, Peak]

    def between(self, other: Step, far: float) -> Step:
        """Linear from self (far = 0) through other (far = 1)."""

        def at(a: float, b: float) -> float:
            return a + (b - a) * far

        peaks = {}
        for name, peak in self.peaks.items():
            there = other.peaks[name]
            pairs = zip(dataclasses.astuple(peak), dataclasses.astuple(there), strict=True)
            peaks[name] = Peak(*(at(a, b) for a, b in pairs))
        return Step(
            at(self.weights, other.weights),
            at(self.optimizer, other.optimizer),
            at(self.saved, other.saved),
            peaks,
        )


def run_step(config: PreTrainedConfig, layers: int, period: int, setup: Setup) -> Step:
    with _quiet():
        try:
            with torch.device("meta"):
                model = _build(config, layers, setup)
            with FakeTensorMode(allow_non_fake_inputs=True):
                _make_fake(model)
                return _measure(model, period, setup)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise NotImplementedError(
                f"config: a {config.model_type} model cannot be run without data "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error


def _build(config: PreTrainedConfig, layers: int, setup: Setup) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    # Other positions take the same memory, and some ask for the data.
    config.rope_parameters = {**(getattr(config, "rope_parameters", None) or {}), "rope_type": "default"}
    config.use_cache = False
    dtype = torch.bfloat16 if setup.quantize else setup.dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=plain_attention())
    model.train()
    if setup.quantize:
        _make_like_4_bit(model)
    # FlashAttention on CUDA saves what SF-Attn does; the CPU's sdpa more where heads share keys.
    own = setup.pattern == "full" and setup.device == "cuda"
    model = prepare(
        model,
        setup.context,
        pattern=SFPattern(setup.context) if own else setup.pattern,
        rope=None,
        lora_rank=setup.lora_rank,
        target_modules=setup.target_modules,
        train_embeddings_and_norms=setup.train_embeddings_and_norms,
    )
    if setup.trained_dtype is not None:
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(setup.trained_dtype)
    base = base_model(model)
    if setup.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    if setup.chunk_tokens is not None:
        use_chunked_loss(base, setup.chunk_tokens, check=False)
    return model


def _make_like_4_bit(base: Any) -> None:
    """As bitsandbytes and PEFT's preparation leave a model: linear layers that compute in bfloat16 and answer
    in their input's type, all other weights in float32."""
    linear = {module for module in _layers(base).modules() if isinstance(module, torch.nn.Linear)}
    for module in base.modules():
        if module in linear:
            module.forward = types.MethodType(_linear_of_4_bit, module)
            continue
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.float()


def _linear_of_4_bit(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def _make_fake(model: torch.nn.Module) -> None:
    """Fake tensors in place of the weights: those know a device, and so which attention kernel would run."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, old in kind.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = (old, new)
                kind[name] = made[id(old)][1]


def _measure(model: Any, period: int, setup: Setup) -> Step:
    base = base_model(model)
    weights = [*model.parameters(), *model.buffers()]
    layers = _layers(base)
    ids = torch.zeros((setup.batch_size, setup.context), dtype=torch.int64)
    autocast = torch.bfloat16 if setup.quantize else setup.autocast
    phases = None
    with MemoryWatch(weights, workspace_of(setup.device)) as watch:
        for _ in range(2 if setup.accumulate else 1):
            if phases is not None:
                phases.remove()
                watch.peaks.clear()
            phases = Phases(watch, layers)
            held = watch.live
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            del loss
            saved = phases.saved - held
    trained = [weight for weight in weights if weight.requires_grad]
    states = sum(OPTIMIZERS[setup.optimizer](w.element_size()) * w.numel() for w in trained)
    size, spare = _weight_bytes(layers, weights, setup)
    return Step(size, states, saved, _merged(watch.peaks, len(layers), period, spare))


def _layers(base: Any) -> torch.nn.ModuleList:
    count = base.config.num_hidden_layers
    for module in base.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"found no list of {count} layers in {type(base).__name__}")


def _merged(peaks: dict[Any, Peak], layers: int, period: int, spare: int) -> dict[str, Peak]:
    """The peaks that grow linearly with the layers: of the layers at both ends, and around."""

    def most(phases: list[Any]) -> Peak:
        found = [peaks[phase] for phase in phases if phase in peaks]
        if not found:
            return Peak()
        top = max(found, key=lambda peak: peak.total)
        return Peak(top.total + spare, top.gradients, top.workspace)

    first, last = range(min(period, layers)), range(max(0, layers - period), layers)
    return {
        "forward": most([("forward", i) for i in last]),
        "loss": peaks["loss"],
        "backward of the last": most([("backward", i) for i in last]),
        "backward of the first": most([("backward", i) for i in first]),
        "end": peaks.get("end", Peak()),
    }


def _weight_bytes(layers: Any, weights: list[torch.Tensor], setup: Setup) -> tuple[float, int]:
    """Bytes of all weights, and of the largest one that is unpacked for its use where they have 4 bits."""
    sizes = {weight.untyped_storage()._cdata: tensor_bytes(weight) for weight in weights}
    total: float = sum(sizes.values())
    if not setup.quantize:
        return total, 0
    packed = [
        module.weight
        for module in layers.modules()
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
    ]
    total -= sum(tensor_bytes(weight) - weight.numel() * _BYTES_OF_4_BIT for weight in packed)
    return total, max(tensor_bytes(weight) for weight in packed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is said about models is not said about those that are only asked for their size."""
    loggers = [logging.getLogger(name) for name in ("sinklora", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
