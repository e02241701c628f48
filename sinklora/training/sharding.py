"""A model, its gradients and its optimiser spread over several devices: how a run asks for it, and
checkpoints that do not know of it.

FSDP2 is a setting of transformers' Trainer, ZeRO one of DeepSpeed, whose files are in sinklora/configs.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger("sinklora")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


def sharding_arguments(sharding: str) -> dict[str, Any]:
    """What TrainingArguments take for one of settings.SHARDINGS.

    Raises ValueError where it cannot be had: a single process, or DeepSpeed that is not installed.
    """
    if sharding == "none":
        return {}
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(
            f"sharding: {sharding} needs several processes, got one; start it as "
            "torchrun --nproc_per_node DEVICES -m sinklora ..."
        )
    if sharding == "fsdp2":
        # All processes read the weights: the checks before the training run the model. Layers are found by
        # the model's own list of what is not to be split.
        config = {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "FULL_STATE_DICT",
        }
        return {"fsdp": True, "fsdp_config": config}
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"sharding: {sharding} needs DeepSpeed; run: pip install deepspeed")
    return {"deepspeed": str(CONFIGS / f"{sharding}.json")}


def read_weights_everywhere() -> None:
    """Undoes one of accelerate's settings for FSDP: the checks before the training need the weights in every
    process."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
        logger.warning("fsdp_cpu_ram_efficient_loading: switched off; every process reads the weights")
        os.environ[name] = "false"


class WholeCheckpoints(_Base):
    """Mixin, before a Trainer: under FSDP2 too, a checkpoint has the files of a run in one process, and
    either can go on with the other's.

    adapter_model.safetensors or model.safetensors, and optimizer.pt; the tensors in them are whole. The main
    process holds all of them at once while it saves, but for an adapter only what is trained.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._shard_on_cpu()
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError("sharding: expected FSDP2 (fsdp_version: 2), got FSDP of the first version")
        if self.args.bf16 or self.args.fp16:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # accelerate's own policy would add gradients up, and round the loss, in 16 bits too.
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32
            )

    def _shard_on_cpu(self) -> None:
        """accelerate passes over FSDP, without a word, where there is no GPU; torch does not."""
        from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

        state, plugin = self.accelerator.state, self.args.fsdp_plugin_args
        in_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if state.distributed_type != DistributedType.MULTI_CPU or (plugin is None and not in_launcher):
            return
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(plugin or {}))
        self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        keep = bool(self.args.should_save)
        state = {name: _whole(value, keep) for name, value in _to_save(self.model).items()}
        if keep:
            self._save(str(output_dir or self.args.output_dir), state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        keep = bool(self.args.should_save)
        state = self.optimizer.state_dict()
        state["state"] = {
            number: {name: _whole(value, keep) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        if keep:
            torch.save(state, os.path.join(output_dir, OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self.is_fsdp_enabled and resume_from_checkpoint is not None:
            # The weights go in while the model is whole, as in one process.
            self.is_fsdp_enabled = False
            try:
                super()._load_from_checkpoint(resume_from_checkpoint)
            finally:
                self.is_fsdp_enabled = True
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:  # else it is done
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        read = torch.load(
            os.path.join(checkpoint, OPTIMIZER), map_location="cpu", weights_only=True, mmap=True
        )
        assert self.optimizer is not None and self.lr_scheduler is not None
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        for number, values in read["state"].items():
            for name, value in values.items():
                values[name] = _like(value, parameters[number])
        self.optimizer.load_state_dict(read)
        scheduler = torch.load(os.path.join(checkpoint, SCHEDULER), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)


def _to_save(model: Any) -> dict[str, Any]:
    """The state of the parts that are saved: of a PEFT model what is trained, of others everything."""
    state: dict[str, Any] = model.state_dict()
    if not hasattr(model, "peft_config"):
        return state
    # Tied weights under both names, as PEFT saves them.
    trained = {name for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def _whole(value: Any, keep: bool) -> Any:
    """A sharded tensor's whole, on the CPU; all processes are to call it. keep: False drops it again."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().cpu() if keep else None


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """This process's part of a whole tensor, where it belongs to a sharded parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if (
        not isinstance(parameter, DTensor)
        or not isinstance(value, torch.Tensor)
        or value.shape != parameter.shape
    ):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
