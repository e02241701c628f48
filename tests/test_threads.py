"""Numbers of threads, many callers at once, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from accuracy import assert_same_bits
from attention_support import PATTERN, gradients, make

import sinklora
from sinklora import _C, sf_attention, torch_ops


def test_set_num_threads() -> None:
    default = sinklora.get_num_threads()
    assert default == torch.get_num_threads()
    try:
        sinklora.set_num_threads(3)
        assert sinklora.get_num_threads() == 3
        assert sinklora.info()["num_threads"] == 3
    finally:
        sinklora.set_num_threads(None)
    assert sinklora.get_num_threads() == default


def test_the_number_of_threads_reaches_the_kernel(
    torch_rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward, backward = _C.attention_forward, _C.attention_backward

    class Spy:
        def attention_forward(self, *args: Any) -> None:
            seen.append(args[-2])
            forward(*args)

        def attention_backward(self, *args: Any) -> None:
            seen.append(args[-2])
            backward(*args)

    monkeypatch.setattr(torch_ops, "_C", Spy())
    tensors = make(torch_rng, grad=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        gradients(sf_attention(*tensors, PATTERN), tensors)
        sinklora.set_num_threads(5)
        gradients(sf_attention(*tensors, PATTERN), tensors)
    finally:
        torch.set_num_threads(before)
        sinklora.set_num_threads(None)
    assert seen == [2, 2, 5, 5]


def test_same_bits_for_every_number_of_threads(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, tokens=150, grad=True)
    results = []
    try:
        for n in (1, 2, 3, 8):
            sinklora.set_num_threads(n)
            output = sf_attention(*tensors, PATTERN)
            results.append((output, *gradients(output, tensors)))
    finally:
        sinklora.set_num_threads(None)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_many_python_threads_at_once(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, tokens=64, grad=True)
    output = sf_attention(*tensors, PATTERN)
    expected = (output, *gradients(output, tensors))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                mine = [x.detach().clone().requires_grad_() for x in tensors]
                result = sf_attention(*mine, PATTERN)
                for a, b in zip((result, *gradients(result, mine)), expected, strict=True):
                    assert_same_bits(a, b)
        except BaseException as error:
            failures.append(error)

    try:
        sinklora.set_num_threads(3)
        workers = [threading.Thread(target=work) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    finally:
        sinklora.set_num_threads(None)
    assert not any(worker.is_alive() for worker in workers)
    assert not failures, failures[0]


FORK = """
import os, sys, signal
import numpy as np
use_torch, first = sys.argv[1] == "torch", sys.argv[2]
import sinklora
if use_torch:
    import torch
    torch.set_num_threads(2)
sinklora.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((1, 4, 300, 32)).astype("f4")
def compute():
    y = torch.from_numpy(x) if use_torch else x
    return np.asarray(sinklora.sf_attention(y, y, y, sinklora.SFPattern(64)))
if first == "ours":
    before = compute()
elif first == "theirs":
    (torch.ones(2000, 2000) @ torch.ones(2000, 2000)).sum()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    after = compute()
    os._exit(0 if first != "ours" or (after == before).all() else 3)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
compute()
sys.exit(0 if status == 0 else 100 + abs(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("case", ["numpy ours", "torch ours", "torch theirs", "numpy none"])
def test_fork(case: str) -> None:
    """A child computes after its parent did, with our threads or with torch's, whose pool is dead there."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FORK, *case.split()],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
