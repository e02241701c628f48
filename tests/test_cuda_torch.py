"""The torch operators and the package's words about CUDA, as far as they show without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_support import PATTERN, by_rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sinklora
from sinklora import _C, SFPattern, cuda, torch_h2o, torch_memory, torch_ops
from sinklora.hf.full import kernel_takes
from sinklora.settings import settings_text

BUILD = _C.build_info()
ALL_OPS = (
    "sf_attention",
    "sf_attention_backward",
    "causal_attention",
    "attention_scores",
    "h2o_decode",
    "h2o_select",
)


@pytest.fixture
def fake() -> Any:
    """Tensors that say they are on cuda:0 and have no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def test_operators_are_registered_for_cuda_or_refuse_it() -> None:
    for name in ALL_OPS:
        for key in ("CPU", "CUDA", "MPS", "XPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sinklora::{name}", key), (name, key)
    assert ("cuda" in cuda.DEVICE_TYPES) == BUILD["cuda"]
    assert ("cuda" in torch_ops.REFUSED_DEVICES) != BUILD["cuda"]
    assert {"mps", "xpu"} <= set(torch_ops.REFUSED_DEVICES)


def test_outputs_lie_on_the_querys_device(fake: Any) -> None:
    query, key = on_cuda(2, 4, 19, 16, dtype=torch.bfloat16), on_cuda(2, 2, 19, 16, dtype=torch.bfloat16)
    settings = settings_text(*PATTERN.settings, 0.25)
    output, lse = torch.ops.sinklora.sf_attention(query, key, key, settings)
    assert (output.shape, output.dtype, by_rows(output)) == (query.shape, query.dtype, True)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
    grads = torch.ops.sinklora.sf_attention_backward(output, query, key, key, output, lse, settings)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
    attended, attended_lse = torch_h2o.causal_attention(query, key, key)
    scores = torch_h2o.attention_scores(query, key, score_window=4)
    assert scores.shape == key.shape[:3]
    slots = on_cuda(2, 2, 19, dtype=torch.int32)
    rows = on_cuda(2, 4, dtype=torch.int32)
    stepped = torch_h2o.h2o_decode(
        *(on_cuda(2, 4, 1, 16), *(on_cuda(2, 2, 1, 16) for _ in range(2))),
        *(key, key, scores, slots, on_cuda(2, 2, dtype=torch.int32), rows),
    )
    kept = torch_h2o.h2o_select(key, key, scores, slots, rows, num_sinks=1, capacity=6)
    assert kept[0].shape == (2, 2, 6, 16)
    made = (output, lse, *grads, attended, attended_lse, scores, stepped, *kept)
    assert {str(tensor.device) for tensor in made} == {"cuda:0"}


def test_mixed_devices_are_refused_by_name(fake: Any) -> None:
    query, key = on_cuda(1, 2, 5, 8), torch.empty(1, 2, 5, 8)
    with pytest.raises(ValueError, match="key: expected query's device cuda:0, got cpu"):
        sinklora.sf_attention(query, key, query, SFPattern(3))
    with pytest.raises(ValueError, match="value: expected query's device cuda:0, got cpu"):
        torch_h2o.causal_attention(query, query, key)
    mask = torch.empty(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="padding_mask: expected query's device cuda:0, got cpu"):
        sinklora.sf_attention(query, query, query, SFPattern(3), padding_mask=mask)


def test_scratch_memory_is_of_the_querys_device(fake: Any) -> None:
    memory = torch_memory.allocator(on_cuda(1))(100)
    assert (str(memory.device), memory.dtype, tuple(memory.shape)) == ("cuda:0", torch.uint8, (100,))
    assert torch_memory.allocator(torch.empty(1)) is torch_memory.allocate


def test_the_refusal_says_how_to_build(fake: Any) -> None:
    query = on_cuda(1, 2, 5, 8)
    with pytest.raises(NotImplementedError) as caught:
        torch_ops._forward_elsewhere(query, query, query, "")
    if BUILD["cuda"]:
        assert "computes on CPU and CUDA tensors only, got device cuda:0" in str(caught.value)
    else:
        expected = (
            f"computes on CPU tensors only (built without CUDA: {BUILD['cuda_absent']}; SINKLORA_CUDA=1"
        )
        assert expected in str(caught.value)


@pytest.mark.parametrize("checks", ["0", "1"])
def test_values_are_checked_on_request(monkeypatch: pytest.MonkeyPatch, checks: str) -> None:
    asked: list[int] = []
    monkeypatch.setenv("SINKLORA_CHECK", checks)
    monkeypatch.setattr(_C, "check_cu_seqlens", lambda starts, n: asked.append(n))
    with FakeTensorMode():
        torch_ops._check_starts(on_cuda(3, dtype=torch.int32), 19)
    torch_ops._check_starts(torch.zeros(3, dtype=torch.int32), 19)  # the kernel checks those
    torch_ops._check_starts(None, 19)
    assert asked == ([19] if checks == "1" else [])


# ---- which devices the code runs on ----


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ((), (8, 0), False),
        (((8, 0),), (8, 0), True),
        (((8, 0),), (8, 9), True),  # binary code of the same major version
        (((8, 6),), (8, 0), False),
        (((8, 0),), (9, 0), True),  # PTX
        (((9, 0),), (8, 0), False),
        (((8, 0), (12, 0)), (9, 0), False),  # the newest's PTX is too new
        (((8, 0), (12, 0)), (12, 1), True),
        (((8, 6), (9, 0)), (8, 9), True),
    ],
)
def test_covers(
    monkeypatch: pytest.MonkeyPatch, archs: Any, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(cuda, "ARCHS", archs)
    assert cuda.covers(capability) is expected


def test_what_info_says(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {**BUILD, "cuda": True, "cuda_toolkit": "13.0", "cuda_absent": None}
    devices = (("NVIDIA A100", (8, 0)), ("Tesla T4", (7, 5)))
    monkeypatch.setattr(cuda, "_BUILD", build)
    monkeypatch.setattr(cuda, "ARCHS", ((8, 0), (9, 0)))
    monkeypatch.setattr(_C, "cuda_state", lambda: {"driver": 13020, "devices": devices, "problem": None})
    info = sinklora.info()
    assert info["cuda_build"] == "CUDA 13.0 for 8.0, 9.0 and later (PTX)"
    assert info["cuda_driver"] == "CUDA 13.2"
    assert info["gpus"] == ("NVIDIA A100 (8.0)", "Tesla T4 (7.5, not built for)")
    assert info["path"].endswith("; CUDA kernels for tensors on a GPU")
    state = {"driver": 0, "devices": (), "problem": "no NVIDIA driver is installed"}
    monkeypatch.setattr(_C, "cuda_state", lambda: state)
    info = sinklora.info()
    assert info["cuda_driver"] == "none"
    assert info["gpus"] == ("none: no NVIDIA driver is installed",)
    assert "GPU" not in info["path"]
    monkeypatch.setattr(cuda, "_BUILD", {**build, "cuda": False, "cuda_absent": "no nvcc"})
    assert sinklora.info()["cuda_build"] == "not built in: no nvcc"
    json.dumps(info)


def test_the_kernel_takes_what_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_BUILD", {**BUILD, "cuda": True})
    monkeypatch.setattr(cuda, "ARCHS", ((8, 0),))
    monkeypatch.setattr(cuda, "_covered", {})
    capabilities = [(8, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    with FakeTensorMode():
        for index, expected in enumerate((True, False)):
            query = torch.empty(1, 2, 5, 8, device=f"cuda:{index}")
            assert kernel_takes(query, query, query) is expected
        monkeypatch.setattr(cuda, "_BUILD", {**BUILD, "cuda": False})
        assert not kernel_takes(query, query, query)
    query = torch.empty(1, 2, 5, 8)
    assert kernel_takes(query, query, query)
    assert not kernel_takes(*(query.to("meta"),) * 3)


def test_importing_starts_no_driver() -> None:
    """Nor does any call on the CPU: a process may fork after it and use CUDA in the child."""
    code = """
import numpy as np, sinklora
from sinklora import _C
def asked(): raise SystemExit("the driver was asked")
_C.cuda_state = asked
x = np.ones((1, 4, 8, 8), "f4")
sinklora.sf_attention(x, x, x, sinklora.SFPattern(4))
sinklora.set_num_threads(2)
import torch
from sinklora import torch_ops, hf
sinklora.sf_attention(torch.ones(1, 4, 8, 8), *[torch.ones(1, 4, 8, 8)] * 2, sinklora.SFPattern(4))
"""
    command = [sys.executable, "-P", "-c", code]
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
