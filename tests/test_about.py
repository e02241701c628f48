"""What importing brings, the public names, sinklora.info, and an unusable SINKLORA_CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import sinklora
from sinklora import _C


def in_fresh_python(code: str, warnings: str = "error") -> str:
    env = {"PYTHONPATH": ":".join(sys.path)}
    # -P: the package that is tested, not the source tree that this may run in.
    command = [sys.executable, "-P", "-W", warnings, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout


def test_import_brings_neither_torch_nor_transformers() -> None:
    code = """
import json, sys
import numpy as np
import sinklora
x = np.ones((1, 4, 8, 8), "f4")
pattern = sinklora.SFPattern(4)
sinklora.sf_attention(x, x, x, pattern)
sinklora.reference.sf_attention(x, x, x, pattern)
pattern.mask(4, 8); str(sinklora.info()); sinklora.get_num_threads()
print(json.dumps([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules]))
"""
    assert json.loads(in_fresh_python(code)) == []


def test_torch_may_come_later_and_under_compile_first() -> None:
    code = """
import sinklora
import torch
x = torch.ones(1, 4, 8, 8, requires_grad=True)
pattern = sinklora.SFPattern(4)
f = lambda q: sinklora.sf_attention(q, q, q, pattern)
torch.compile(f, fullgraph=True, backend="aot_eager")(x).sum().backward()
print(f(x).shape)
"""
    assert "[1, 4, 8, 8]" in in_fresh_python(code, "ignore")


def test_public_names() -> None:
    for name in ("sf_attention", "SFPattern", "info", "set_num_threads", "get_num_threads", "reference"):
        assert name in sinklora.__all__
        assert getattr(sinklora, name) is not None
    assert set(sinklora.__all__) <= set(dir(sinklora))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sinklora.nothing  # noqa: B018


def test_info() -> None:
    info = sinklora.info()
    assert info["sinklora"] == sinklora.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_level"] in info["cpu_levels"] == _C.cpu_levels()
    build, state = _C.build_info(), _C.cuda_state()
    assert info["cuda"] is build["cuda"]
    if build["cuda"]:
        assert build["cuda_toolkit"] in info["cuda_build"]
        assert len(info["gpus"]) == max(1, len(state["devices"]))
        assert state["devices"] or str(state["problem"]) in info["gpus"][0]
    else:
        assert info["cuda_build"] == f"not built in: {build['cuda_absent']}"
        assert info["gpus"] == ()
    assert info["cpu_level"] in info["path"]
    text = str(info)
    assert "\ncpu_levels" in text
    assert "not installed" not in text.split("torch")[1].splitlines()[0]
    json.dumps(info)


def test_an_unknown_cpu_level_imports_and_says_so_at_the_first_call() -> None:
    code = """
import numpy, sinklora
x = numpy.ones((1, 1, 4, 8), "f4")
for call in (sinklora.info, lambda: sinklora.sf_attention(x, x, x, sinklora.SFPattern(4))):
    try:
        call()
    except ValueError as error:
        print(error)
sinklora._C.select_cpu_level("portable")
print(sinklora.info()["cpu_level"], sinklora.sf_attention(x, x, x, sinklora.SFPattern(4)).sum())
"""
    env = {"SINKLORA_CPU": "mmx", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1]
    assert "SINKLORA_CPU" in lines[0]
    assert "portable" in lines[0]
    assert "mmx" in lines[0]
    assert lines[2] == "portable 32.0"


def test_an_unknown_thread_pool_says_so_at_the_first_call() -> None:
    code = """
import numpy as np, sinklora
x = np.zeros((1, 1, 4, 8), np.float32)
for call in (sinklora.info, lambda: sinklora.sf_attention(x, x, x, sinklora.SFPattern(4))):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    env = {"SINKLORA_THREADS": "mine", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ['SINKLORA_THREADS: expected openmp or own, got "mine"'] * 2
