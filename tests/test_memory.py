"""The memory estimate against tensors that are really there, and against what the system gave the process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_support import tiny
from transformers import LlamaConfig, LlamaForCausalLM

import sinklora
from sinklora import SFPattern, memory_estimate
from sinklora.finetune import prepare
from sinklora.memory.attention import workspace_of
from sinklora.memory.watch import MemoryWatch
from sinklora.training.chunked_loss import use_chunked_loss

CONTEXT, LAYERS = 256, 7
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    pad_token_id=0,
)
PARTS = [
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "temporary",
    "attention_workspace",
    "total",
]


def estimate(config: Any = CONFIG, context: int = CONTEXT, **settings: Any) -> dict[str, int]:
    return memory_estimate(config, context, device="cpu", **settings)


def measured(
    *,
    batch_size: int = 1,
    lora_rank: int = 8,
    pattern: Any = None,
    gradient_checkpointing: bool = False,
    chunk_tokens: int | None = 1024,
    accumulate: bool = False,
    autocast: str | None = None,
) -> int:
    """Bytes of weights, optimizer state and the peak of a step over real tensors, all layers there."""
    model: Any = LlamaForCausalLM(CONFIG).train()
    pattern = SFPattern.from_ratio(CONTEXT, 0.25) if pattern is None else pattern
    if lora_rank:
        model = prepare(model, CONTEXT, pattern=pattern, rope=None, lora_rank=lora_rank)
    elif pattern != "full":
        sinklora.patch(model, pattern)
    base = model.get_base_model() if lora_rank else model
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    if chunk_tokens:
        use_chunked_loss(base, chunk_tokens)
    weights = [*model.parameters(), *model.buffers()]
    ids = torch.full((batch_size, CONTEXT), 5)
    with MemoryWatch(weights, workspace_of("cpu")) as watch:
        for _ in range(2 if accumulate else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            del loss
    unique = {w.untyped_storage()._cdata: w.untyped_storage().nbytes() for w in weights}
    trained = sum(w.numel() * 4 for w in weights if w.requires_grad)
    return int(watch.peaks[None].total) + sum(unique.values()) + 2 * trained


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 2},
        {"pattern": "full"},
        {"gradient_checkpointing": True},
        {"lora_rank": 0},
        {"lora_rank": 0, "gradient_checkpointing": True, "chunk_tokens": 32},
        {"lora_rank": 0, "accumulate": True},
        {"chunk_tokens": None},
        {"chunk_tokens": 32, "autocast": "bfloat16"},
    ],
    ids=str,
)
def test_layers_that_were_not_run_are_foretold(settings: dict[str, Any]) -> None:
    """Two and three layers without memory tell what seven take with it."""
    found = estimate(**settings)
    assert list(found) == PARTS
    assert found["total"] == sum(found[part] for part in PARTS[:-1])
    assert min(found.values()) >= 0
    assert found["total"] == pytest.approx(measured(**settings), rel=0.02)


_PROGRAM = """
import gc, json, resource, sys
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
import sinklora
from sinklora.finetune import prepare
from sinklora.training.chunked_loss import use_chunked_loss

def steps(sizes, context, pattern=None, lora_rank=8, gradient_checkpointing=False):
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    pattern = pattern or sinklora.SFPattern.from_ratio(context, 0.25)
    if lora_rank:
        model = prepare(model, context, pattern=pattern, rope=None, lora_rank=lora_rank)
    elif pattern != "full":
        sinklora.patch(model, pattern)
    if gradient_checkpointing:
        base = model.get_base_model() if lora_rank else model
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    use_chunked_loss(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(5, sizes["vocab_size"], (1, context))
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

torch.set_num_threads(1)
sizes, context, cases = json.loads(sys.argv[1])
small = {**sizes, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
for case in cases:  # loads and starts what is used later
    steps(small, 64, **case)
gc.collect()
# Memory as high as the highest peak so far, which would hide a lower one.
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ballast = b"1" * max(0, peak - psutil.Process().memory_info().rss)
before = psutil.Process().memory_info().rss
peaks = []
for case in cases:
    steps(sizes, context, **case)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    gc.collect()
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux counts it")
def test_resident_memory_is_within_a_tenth() -> None:
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
    }
    # From small to large: the system tells the highest peak so far.
    cases = [{"gradient_checkpointing": True}, {"pattern": "full"}, {"lora_rank": 0}]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM, json.dumps([sizes, 1024, cases])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # Freed memory goes back to the system at once.
        env={
            **os.environ,
            "PYTHONPATH": str(Path(sinklora.__file__).parent.parent),
            "MALLOC_MMAP_THRESHOLD_": "524288",
            "MALLOC_TRIM_THRESHOLD_": "131072",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    found = [estimate(LlamaConfig(**sizes), 1024, **case)["total"] for case in cases]
    assert found == sorted(found)
    assert found == pytest.approx(peaks, rel=0.1)


# ---- what changes what ----


def test_parts_follow_the_settings() -> None:
    whole, lora = estimate(lora_rank=0), estimate()
    weights = sum(p.numel() * 4 for p in LlamaForCausalLM(CONFIG).parameters())
    assert whole["weights"] == pytest.approx(weights, rel=1e-3)  # and the buffers of the positions
    assert whole["optimizer"] == 2 * weights
    assert lora["optimizer"] < whole["optimizer"] / 3
    assert estimate(lora_rank=0, optimizer="adamw_8bit")["optimizer"] == weights / 2
    assert estimate(optimizer="sgd")["optimizer"] == 0
    assert estimate(lora_rank=0, dtype="bfloat16")["weights"] == pytest.approx(weights / 2, rel=1e-3)
    assert estimate(lora_rank=0, accumulate=True)["gradients"] == weights
    assert estimate(chunk_tokens=16)["loss"] < estimate(chunk_tokens=None)["loss"] / 2
    assert estimate(gradient_checkpointing=True)["activations"] < lora["activations"] / 3
    assert estimate(train_embeddings_and_norms=False)["optimizer"] < lora["optimizer"]
    assert estimate(target_modules="all-linear")["optimizer"] > lora["optimizer"]
    mixed = {"dtype": "bfloat16", "trained_dtype": "float32", "autocast": "bfloat16"}
    assert estimate(**mixed)["optimizer"] == lora["optimizer"]
    assert estimate(**mixed)["weights"] < lora["weights"]
    assert estimate(**mixed)["activations"] < lora["activations"]


def test_four_bits() -> None:
    plain, packed = estimate(dtype="bfloat16"), estimate(quantize="4bit")
    linear = LAYERS * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3)
    unpacked = packed["weights"] - linear * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert unpacked == pytest.approx(2 * (plain["weights"] - linear * 2), rel=0.1)  # in float32, LoRA too


def test_cuda_needs_no_device() -> None:
    """FlashAttention saves what SF-Attn does; sums of the backward are float32 and as large as the query."""
    found = memory_estimate(CONFIG, CONTEXT, pattern="full", device="cuda")
    other = memory_estimate(CONFIG, CONTEXT, device="cuda")
    assert found["activations"] == other["activations"]
    query = torch.empty(2, 4, 32, 16)
    backward = torch.ops.sinklora.sf_attention_backward.default
    if not sinklora.info()["gpus"]:
        arguments = (query, query, query, query, query, query[..., 0], "", None, None, None)
        assert workspace_of("cuda")(backward, arguments) == 2 * 4 * 32 * (16 + 1) * 4


def test_the_kernels_say_what_they_take() -> None:
    asked: list[int] = []
    torch.manual_seed(0)
    query = torch.randn(1, 4, 512, 64, requires_grad=True)
    from sinklora import torch_ops

    def spying(like: torch.Tensor) -> Any:
        def allocate(num_bytes: int) -> torch.Tensor:
            asked.append(num_bytes)
            return torch.empty(num_bytes, dtype=torch.uint8)

        return allocate

    with pytest.MonkeyPatch.context() as patch, MemoryWatch([], workspace_of("cpu")) as watch:
        patch.setattr(torch_ops, "allocator", spying)
        sinklora.sf_attention(query, query, query, SFPattern(128)).sum().backward()
    assert len(asked) == 2
    assert watch.peaks[None].workspace in asked


def test_tensors_that_are_gone_do_not_count() -> None:
    with MemoryWatch([], lambda operator, args: 0) as watch:
        kept = torch.zeros(1000)
        view = kept[10:]
        for _ in range(3):
            torch.zeros(5000)
        assert watch.live == 4000
        del kept
        assert watch.live == 4000
        del view
        assert watch.live == 0
    assert watch.peaks[None].total == 24000


# ---- models and folders ----


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPTNeoX", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
        ("Gemma3Text", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 4}),
        ("Mistral", {"sliding_window": 64}),
    ],
)
def test_other_architectures(name: str, changes: dict[str, Any]) -> None:
    sizes = {
        k: v for k, v in CONFIG.to_dict().items() if k.startswith(("num_", "hidden_size", "inter", "vocab"))
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, "num_hidden_layers": 8, **changes})
    settings: dict[str, Any] = {"pattern": "full", "dtype": "bfloat16"}
    less = estimate(config, **settings)["total"]
    config.num_hidden_layers = 16
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:8] * 2
    assert 1.3 * less < estimate(config, **settings)["total"] < 2 * less


def test_stretched_positions_and_models_and_folders(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(**{**CONFIG.to_dict(), "rope_parameters": rope})
    assert estimate(config) == estimate()
    assert config.rope_parameters["rope_type"] == "dynamic"
    CONFIG.save_pretrained(tmp_path)
    assert estimate(tmp_path) == estimate()
    model = tiny()
    assert estimate(model, 64) == estimate(model.config, 64)


def test_few_layers_are_run_as_they_are() -> None:
    totals = []
    for layers in (1, 2, 3, 4):
        config = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": layers})
        totals.append(estimate(config)["total"])
    steps = [b - a for a, b in itertools.pairwise(totals)]
    assert steps == pytest.approx([steps[0]] * 3, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"context": 1}, ValueError, "context: expected at least 2, got 1"),
        ({"context": 2.5}, TypeError, "context: expected an integer"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"lora_rank": -1}, ValueError, "lora_rank"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens"),
        ({"dtype": "int8"}, ValueError, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"autocast": "int8"}, ValueError, "autocast: expected one of"),
        ({"optimizer": "lion"}, ValueError, "optimizer: expected one of adamw, adamw_8bit, sgd, got 'lion'"),
        ({"quantize": "8bit"}, ValueError, "quantize"),
        ({"quantize": "4bit", "lora_rank": 0}, ValueError, "quantize"),
        ({"device": "tpu"}, ValueError, "device"),
        ({"pattern": "s2"}, TypeError, "pattern"),
        ({"config": 3}, TypeError, "config: expected a config, a model or a folder, got int"),
        ({"config": "no/such/folder"}, ValueError, "config: cannot open no/such/folder"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", "\\(")):
        memory_estimate(**{"config": CONFIG, "context": 64, "device": "cpu", **settings})
