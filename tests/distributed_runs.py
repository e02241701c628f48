"""What every process of tests/test_distributed.py's launch runs: several short trainings, one after another.

python -m torch.distributed.run --nproc_per_node 2 tests/distributed_runs.py ROOT
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import training_support as support
from torch.distributed.tensor import DTensor

from sinklora.training.continued import FinetuneRun
from sinklora.training.trainer import LongTrainer, NonFiniteLossError

RANK = int(os.environ.get("RANK", "0"))
# Four rows a step, as the runs in one process that they are compared with.
SHARED: dict[str, Any] = {"steps": 4, "save_every": 2, "accumulate": 2, "eval_share": 0.2}


def run(root: Path, name: str, **changes: Any) -> Any:
    """One training into root/name; its trainer."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate has left it there for the next
    return FinetuneRun(support.settings(root, root / name, **{**SHARED, **changes})).run()


def forget_the_end(finished: Path, name: Path) -> None:
    """A folder as the run in `finished` had left it when it was killed after its second step."""
    if RANK == 0:
        shutil.copytree(finished / "checkpoints", name / "checkpoints")
        shutil.rmtree(name / "checkpoints" / "checkpoint-4")
    torch.distributed.barrier()


@contextlib.contextmanager
def bad_loss_in_one() -> Iterator[None]:
    """The second process's loss becomes NaN in the third step."""
    plain = LongTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        return loss * float("nan") if RANK == 1 and self.state.global_step == 2 else loss

    LongTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        LongTrainer.compute_loss = plain  # type: ignore[method-assign]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    run(root, "ddp-lora")
    sharded = run(root, "fsdp2-lora", sharding="fsdp2").model.parameters()
    seen["sharded"] = all(isinstance(parameter, DTensor) for parameter in sharded)
    run(root, "fsdp2-tied", sharding="fsdp2", model=str(root / "tied"))
    run(root, "fsdp2-full", sharding="fsdp2", full_finetuning=True, gradient_checkpointing=True)
    forget_the_end(root / "one-full", root / "one-to-fsdp2")
    run(root, "one-to-fsdp2", sharding="fsdp2", full_finetuning=True, resume=True)
    forget_the_end(root / "fsdp2-lora", root / "fsdp2-to-ddp")
    run(root, "fsdp2-to-ddp", resume=True)
    run(root, "dry", sharding="fsdp2", dry_run=True)
    try:
        with bad_loss_in_one():
            run(root, "nan")
    except NonFiniteLossError as error:
        seen["nan"] = str(error)
    (root / f"seen-{RANK}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
