"""A guest on the device: the caller's stream and device, no waiting, CUDA graphs, torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from accuracy import NAMES, assert_same_bits, kernel
from cases import Case, case
from device_support import moved
from torch import Tensor

import sinklora
from sinklora import torch_h2o, torch_ops
from sinklora.settings import settings_text

pytestmark = pytest.mark.gpu

SHAPE = case((2, 4, 2, 300, 64), 100)
# Long enough for the host to come back from any call that does not wait; a fraction of a second.
PAUSE = 400_000_000


def inputs(device: torch.device, shape: Case = SHAPE, seed: int = 0) -> list[Tensor]:
    """query, key, value, grad in bfloat16."""
    made = shape.inputs(torch.bfloat16, torch.Generator().manual_seed(seed))
    return list(moved(made, device))


def attend(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(kernel(*tensors[:3], SHAPE.pattern, tensors[3]))


class Step:
    """A cache on a device that stands at its budget, and a token for it."""

    def __init__(self, device: torch.device, slots: int = 65) -> None:
        rng = torch.Generator().manual_seed(2)
        sizes = ((2, 4, 1), (2, 2, 1), (2, 2, 1), (2, 2, slots), (2, 2, slots))
        made = [torch.randn(*size, 64, generator=rng).bfloat16() for size in sizes]
        scores, positions = torch.rand(2, 2, slots, generator=rng), torch.arange(slots, dtype=torch.int32) - 1
        free_slot = torch.zeros(2, 2, dtype=torch.int32)
        rows = torch.tensor([[slots - 1, slots - 1, slots - 1, 8]] * 2, dtype=torch.int32)
        state = (scores, positions.expand(2, 2, -1).contiguous(), free_slot, rows)
        self.tensors = moved([*made, *state], device)

    def run(self) -> Tensor:
        return torch_h2o.h2o_decode(*self.tensors)

    def state(self) -> list[Tensor]:
        return self.tensors[3:]

    def results(self) -> tuple[Tensor, ...]:
        return (self.run(), *self.state())


def score(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    output, lse = torch_h2o.causal_attention(*tensors[:3])
    return output, lse, torch_h2o.attention_scores(tensors[0], tensors[1], lse)


def select(step: Step) -> tuple[Tensor, ...]:
    key, value, scores, positions, _, rows = step.state()
    rows[:, 2] = 20  # its budget
    return (*torch_h2o.h2o_select(key, value, scores, positions, rows, num_sinks=2, capacity=20), rows)


CALLS: dict[str, Callable[[torch.device], tuple[Tensor, ...]]] = {
    "attention": lambda device: attend(inputs(device)),
    "prompt": lambda device: score(inputs(device)),
    "step": lambda device: Step(device).results(),
    "select": lambda device: select(Step(device)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises at every synchronisation that it makes itself."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---- streams ----


@every_call
def test_the_callers_stream(call: Callable[..., tuple[Tensor, ...]], cuda: torch.device) -> None:
    want = call(cuda)
    torch.cuda.synchronize(cuda)
    stream = torch.cuda.Stream(cuda)
    with torch.cuda.stream(stream):
        got = call(cuda)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_work_waits_for_its_stream_and_the_host_does_not(cuda: torch.device) -> None:
    """Inputs that arrive late on a side stream are read late, and the call comes back at once."""
    late = inputs(cuda)
    want = attend(late)
    tensors = [torch.zeros_like(x) for x in late]
    stream, done = torch.cuda.Stream(cuda), torch.cuda.Event()
    attend(tensors)  # whatever the first call loads is loaded
    torch.cuda.synchronize(cuda)
    with torch.cuda.stream(stream), no_waiting():
        torch.cuda._sleep(PAUSE)
        for x, y in zip(tensors, late, strict=True):
            x.copy_(y)
        output, lse = torch_ops.sf_attention(*tensors[:3], SHAPE.pattern)
        done.record(stream)
        waited = done.query()
    assert not waited, "the call waited for the device"
    stream.synchronize()
    assert_same_bits(output, want[0])
    assert_same_bits(lse, want[4])


def test_a_step_does_not_wait(cuda: torch.device) -> None:
    step, other = Step(cuda), Step(cuda)
    want = other.run()
    done = torch.cuda.Event()
    torch.cuda.synchronize(cuda)
    with no_waiting():
        torch.cuda._sleep(PAUSE)
        output = step.run()
        done.record()
        waited = done.query()
    assert not waited, "the call waited for the device"
    assert_same_bits(output, want)


def test_two_streams_at_once(cuda: torch.device) -> None:
    """Workspaces of calls in flight on two streams are not shared."""
    want = [attend(inputs(cuda, seed=seed)) for seed in range(2)]
    tensors = [inputs(cuda, seed=seed) for seed in range(2)]
    streams = [torch.cuda.Stream(cuda) for _ in range(2)]
    torch.cuda.synchronize(cuda)
    got: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(attend(tensors[i]))
    torch.cuda.synchronize(cuda)
    for i in range(2):
        for result in got[i]:
            for a, b in zip(result, want[i], strict=True):
                assert_same_bits(a, b)


# ---- CUDA graphs ----


def capture(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The captured call and the tensors that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # as torch asks: once before
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_graphs_of_forward_and_backward(cuda: torch.device) -> None:
    fixed = inputs(cuda)
    settings = settings_text(*SHAPE.pattern.settings, 0.125)

    def call() -> tuple[Tensor, ...]:
        output, lse = torch.ops.sinklora.sf_attention(*fixed[:3], settings)
        grads = torch.ops.sinklora.sf_attention_backward(fixed[3], *fixed[:3], output, lse, settings)
        return output, *grads, lse

    graph, results = capture(call)
    for seed in (5, 6, 7):
        fresh = inputs(cuda, seed=seed)
        for x, y in zip(fixed, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        want = attend(fresh)
        for name, a, b in zip((*NAMES, "lse"), results, want, strict=True):
            assert_same_bits(a, b, f"replay {seed}: {name}")


def test_graphs_of_a_prompt_with_scores(cuda: torch.device) -> None:
    fixed = inputs(cuda)
    graph, results = capture(lambda: score(fixed))
    fresh = inputs(cuda, seed=8)
    for x, y in zip(fixed, fresh, strict=True):
        x.copy_(y)
    graph.replay()
    for a, b in zip(results, score(fresh), strict=True):
        assert_same_bits(a, b)


def test_graphs_of_a_step(cuda: torch.device) -> None:
    """Every replay is one more token: the cache's counts are read on the device."""
    step, other = Step(cuda), Step(cuda)
    before = [x.clone() for x in step.state()]
    graph, results = capture(lambda: (step.run(),))
    for x, y in zip(step.state(), before, strict=True):
        x.copy_(y)  # capturing ran one step
    for token in range(5):
        for a, b in zip(step.tensors[:3], other.tensors[:3], strict=True):
            a.mul_(-0.5)
            b.mul_(-0.5)
        graph.replay()
        assert_same_bits(results[0], other.run(), f"token {token}")
        for a, b in zip(step.state(), other.state(), strict=True):
            assert_same_bits(a, b, f"token {token}: the cache")


# ---- devices ----


@pytest.fixture
def second(cuda: torch.device) -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA cuda only")
    return torch.device("cuda", 1 if cuda.index in (None, 0) else 0)


@every_call
def test_a_device_that_is_not_the_current_one(
    call: Callable[..., tuple[Tensor, ...]], cuda: torch.device, second: torch.device
) -> None:
    want = moved(call(cuda), "cpu")
    current = torch.cuda.current_device()
    got = call(second)
    assert all(x.device == second for x in got) and torch.cuda.current_device() == current
    capabilities = [torch.cuda.get_device_capability(x) for x in (cuda, second)]
    if capabilities[0] == capabilities[1]:
        for a, b in zip(moved(got, "cpu"), want, strict=True):
            assert_same_bits(a, b)


def test_mixed_devices_are_refused(cuda: torch.device, second: torch.device) -> None:
    query, key, value, _ = inputs(cuda)
    with pytest.raises(ValueError, match="device"):
        sinklora.sf_attention(query, key.to(second), value, SHAPE.pattern)


# ---- torch.compile ----


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend: str, cuda: torch.device) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("inductor's launchers need a C compiler")
    torch._dynamo.reset()
    tensors = [x.requires_grad_() for x in inputs(cuda)[:3]]

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sinklora.sf_attention(query * 2, key, value, SHAPE.pattern) + 1

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    output, expected = compiled(*tensors), function(*tensors)
    assert_same_bits(output, expected)
    grad = torch.ones_like(output)
    for a, b in zip(
        torch.autograd.grad(output, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        assert_same_bits(a, b)


def test_opcheck(cuda: torch.device) -> None:
    tensors = inputs(cuda, case((1, 4, 2, 19, 16), 5))
    settings = settings_text(*SHAPE.pattern.settings, 0.25)
    torch.library.opcheck(torch.ops.sinklora.sf_attention.default, (*tensors[:3], settings))
    output, lse = torch.ops.sinklora.sf_attention(*tensors[:3], settings)
    back = (tensors[3], *tensors[:3], output, lse, settings)
    torch.library.opcheck(torch.ops.sinklora.sf_attention_backward.default, back)
    torch.library.opcheck(torch.ops.sinklora.causal_attention.default, (*tensors[:3], None, 0.25))
