"""The operator from Python: torch's machinery around it, NumPy and DLPack, threads, forks, imports."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, assert_close, assert_same_bits
from producers import Producer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sinklora
from sinklora import _C, SFPattern, sf_attention, torch_ops

PATTERN = SFPattern(5, num_sink_tokens=2)


def make(
    rng: torch.Generator,
    *,
    batch: int = 2,
    tokens: int = 19,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> list[Tensor]:
    shapes = [(batch, heads, tokens, 16) for heads in (4, 2, 2)]
    return [torch.randn(s, generator=rng).to(dtype).requires_grad_(grad) for s in shapes]


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    grad = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    return torch.autograd.grad(output, tensors, grad)


def by_rows(tensor: Tensor) -> bool:
    """Does the (B, H, N, D) tensor lie in memory as (B, N, H, D)?"""
    return tensor.transpose(1, 2).is_contiguous()


# ---- values; the kernels' own tests go deeper ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_accuracy(torch_rng: torch.Generator, cpu_level: str, dtype: torch.dtype, causal: bool) -> None:
    query, key, value = make(torch_rng, batch=1, dtype=dtype)
    grad = torch.randn(query.shape, generator=torch_rng).to(dtype)
    pattern = SFPattern(5, 2, 0.5, 2, causal)
    options: list[dict[str, Any]] = [
        {},
        {"scale": 0.7},
        {"cu_seqlens": torch.tensor([0, 3, 3, 19], dtype=torch.int32)},
        {"padding_mask": torch.rand(1, 19, generator=torch_rng) > 0.4},
        {"position_ids": torch.tensor([[3, 4, 5, *range(9), *range(7)]])},
    ]
    for option in options:
        assert_accurate(query, key, value, pattern, grad, **option)


def test_the_output_and_gradients_lie_by_rows(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, grad=True)
    output, lse = sf_attention(*tensors, PATTERN, return_lse=True)
    assert by_rows(output)
    assert all(by_rows(grad) for grad in gradients(output, tensors))
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 4, 19)
    assert not lse.requires_grad


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (1, 0), (2, 1)])
def test_empty_and_single(torch_rng: torch.Generator, batch: int, tokens: int) -> None:
    tensors = make(torch_rng, batch=batch, tokens=tokens, grad=True)
    output = sf_attention(*tensors, PATTERN)
    assert output.shape == tensors[0].shape
    for grad, tensor in zip(gradients(output, tensors), tensors, strict=True):
        assert grad.shape == tensor.shape
    if tokens == 1:
        assert_close(output, tensors[2].repeat_interleave(2, 1), 0)


def test_strided_views_are_read_in_place(torch_rng: torch.Generator) -> None:
    """As a fused projection has them: rows of 3 * H * D, keys of every second head, a time-reversed value."""
    fused = torch.randn(2, 19, 3, 4, 16, generator=torch_rng)
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(2))
    views = [query, key[:, ::2], value[:, 1::2]]
    dense = [x.contiguous() for x in views]
    for tensors in (views, dense):
        for tensor in tensors:
            tensor.requires_grad_()
    outputs = [sf_attention(*tensors, PATTERN) for tensors in (views, dense)]
    assert_same_bits(*outputs)
    for a, b in zip(gradients(outputs[0], views), gradients(outputs[1], dense), strict=True):
        assert_same_bits(a, b)


def test_a_last_dimension_that_is_not_contiguous_is_copied(torch_rng: torch.Generator) -> None:
    dense = make(torch_rng)
    wide = [x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in dense]
    assert wide[0].stride(-1) != 1
    expected = sf_attention(*dense, PATTERN)
    output = sf_attention(*wide, PATTERN)
    assert_same_bits(output, expected)
    for grad, tensor in zip(gradients(output, wide), wide, strict=True):
        assert grad.shape == tensor.shape
    numpy = sf_attention(*(x.detach().numpy() for x in wide), PATTERN)
    assert_same_bits(torch.from_numpy(numpy), expected)
    seqlens = torch.tensor([[0, 1], [7, 1], [19, 1]], dtype=torch.int32)[:, 0]
    first = [x[:1] for x in dense]
    assert_same_bits(
        sf_attention(*first, PATTERN, cu_seqlens=seqlens),
        sf_attention(*first, PATTERN, cu_seqlens=seqlens.contiguous()),
    )


# ---- torch ----


def op_args(tensors: list[Tensor], **given: Tensor) -> tuple[Any, ...]:
    sequences = [given.get(name) for name in ("cu_seqlens", "padding_mask", "position_ids")]
    return (*tensors, *sequences, *PATTERN.settings, 0.25)


def test_opcheck(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, batch=1)
    for given in (
        {},
        {"cu_seqlens": torch.tensor([0, 7, 19], dtype=torch.int32)},
        {"padding_mask": torch.rand(1, 19, generator=torch_rng) > 0.3},
        {"position_ids": torch.arange(19)[None] % 8},
    ):
        args = op_args(tensors, **given)
        torch.library.opcheck(torch.ops.sinklora.sf_attention.default, args)
        output, lse = torch.ops.sinklora.sf_attention(*args)
        back = (torch.ones_like(output), *tensors, output, lse, *args[3:])
        torch.library.opcheck(torch.ops.sinklora.sf_attention_backward.default, back)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("same", [False, True], ids=["three tensors", "one tensor"])
def test_compile(torch_rng: torch.Generator, same: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    tensors = make(torch_rng, grad=True)
    if same:
        tensors = [tensors[0]] * 3
    leaves = tensors[:1] if same else tensors
    positions = torch.arange(19)[None] % 8

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packed, _ = torch_ops.sf_attention(query, key, value, PATTERN, position_ids=positions)
        return packed + sf_attention(query, key, value, PATTERN, scale=0.5).transpose(1, 2).transpose(1, 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, output = function(*tensors), compiled(*tensors)
    assert_same_bits(output, expected)
    assert output.stride() == expected.stride()
    for a, b in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        assert_same_bits(a, b)
    with torch.no_grad():
        assert_same_bits(compiled(*tensors), expected)


@pytest.mark.slow
def test_compile_with_inductor(torch_rng: torch.Generator) -> None:
    torch._dynamo.reset()
    tensors = make(torch_rng, grad=True)
    function = lambda q, k, v: (sf_attention(q * 2, k, v, PATTERN) + 1).relu()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    expected, output = function(*tensors), compiled(*tensors)
    assert_close(output, expected, 1e-6)
    for a, b in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(torch_rng: torch.Generator, reentrant: bool) -> None:
    tensors = make(torch_rng, grad=True)
    function = lambda *x: sf_attention(*x, PATTERN)  # noqa: E731
    expected = gradients(function(*tensors), tensors)
    output = checkpoint(function, *tensors, use_reentrant=reentrant)
    grad = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    output.backward(grad)
    for tensor, want in zip(tensors, expected, strict=True):
        assert_same_bits(tensor.grad, want)


def test_everything_saved_goes_through_the_hooks(torch_rng: torch.Generator) -> None:
    """Offloading and checkpointing replace saved tensors; what is kept aside would escape them."""
    tensors = make(torch_rng, grad=True)
    expected = gradients(sf_attention(*tensors, PATTERN), tensors)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    mask = torch.ones(2, 19, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = sf_attention(*tensors, PATTERN, padding_mask=mask)
    assert len(packed) == 6  # query, key, value, output, lse, padding_mask
    for a, b in zip(gradients(output, tensors), expected, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("needs", [[0], [1], [2], [0, 2]])
def test_gradients_of_some_inputs(torch_rng: torch.Generator, needs: list[int]) -> None:
    tensors = make(torch_rng, grad=True)
    expected = gradients(sf_attention(*tensors, PATTERN), tensors)
    mixed = [x if i in needs else x.detach() for i, x in enumerate(tensors)]
    output = sf_attention(*mixed, PATTERN)
    for i, grad in zip(needs, gradients(output, [mixed[i] for i in needs]), strict=True):
        assert_same_bits(grad, expected[i])


def test_expanded_gradients_are_accepted(torch_rng: torch.Generator) -> None:
    """sum() sends back one number with strides of zero."""
    tensors = make(torch_rng, grad=True)
    output = sf_attention(*tensors, PATTERN)
    expected = torch.autograd.grad(output, tensors, torch.ones_like(output), retain_graph=True)
    for a, b in zip(torch.autograd.grad(output.sum(), tensors), expected, strict=True):
        assert_same_bits(a, b)


def test_differentiating_twice_raises(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, grad=True)
    for weight in (torch.ones(()), torch.ones((), requires_grad=True)):
        output = sf_attention(query, key, value, PATTERN)
        (grad,) = torch.autograd.grad((output * weight).sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (grad.sum() + query.sum()).backward()


def test_lse_is_not_differentiable(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, grad=True)
    _, lse = sf_attention(*tensors, PATTERN, return_lse=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()


def test_no_graph_without_need(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, grad=True)
    with torch.no_grad():
        assert not sf_attention(*tensors, PATTERN).requires_grad
    with torch.inference_mode():
        assert sf_attention(*tensors, PATTERN).is_inference()
    assert sf_attention(*(x.detach() for x in tensors), PATTERN).grad_fn is None


def test_dispatch_keys_are_resolved(torch_rng: torch.Generator) -> None:
    """Negative views, zero tensors and vmap levels hold no plain memory: the dispatcher makes them right."""
    query, key, value = make(torch_rng)
    expected = sf_attention(query, key, value, PATTERN)
    assert_same_bits(sf_attention(torch._neg_view(-query), key, value, PATTERN), expected)
    zero = torch._efficientzerotensor(query.shape)
    assert_same_bits(sf_attention(zero, key, value, PATTERN), sf_attention(query * 0, key, value, PATTERN))
    stacked = [torch.stack([x, x + 1]) for x in (query, key, value)]
    mapped = torch.vmap(lambda *x: sf_attention(*x, PATTERN))(*stacked)
    assert_same_bits(mapped[1], sf_attention(*(x[1] for x in stacked), PATTERN))


def test_meta_tensors_give_shapes(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng)
    output, lse = sf_attention(*(x.to("meta") for x in tensors), PATTERN, return_lse=True)
    expected = sf_attention(*tensors, PATTERN)
    assert output.is_meta
    assert (output.shape, output.stride(), output.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
    assert lse.shape == expected.shape[:3]


def test_subclasses_and_parameters(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng)
    parameters = [torch.nn.Parameter(x) for x in tensors]
    output = sf_attention(*parameters, PATTERN)
    assert_same_bits(output, sf_attention(*tensors, PATTERN))
    output.sum().backward()
    assert all(x.grad is not None for x in parameters)


# ---- NumPy and DLPack ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numpy_and_dlpack_equal_torch(torch_rng: torch.Generator, dtype: torch.dtype) -> None:
    tensors = make(torch_rng, dtype=dtype)
    mask = torch.rand(2, 19, generator=torch_rng) > 0.3
    expected = sf_attention(*tensors, PATTERN, scale=0.5, padding_mask=mask, return_lse=True)
    arrays = [x.numpy() for x in tensors]
    for given in (arrays, [Producer(x) for x in arrays], [Producer(x, legacy=True) for x in arrays]):
        output, lse = sf_attention(*given, PATTERN, scale=0.5, padding_mask=mask.numpy(), return_lse=True)
        assert isinstance(output, np.ndarray)
        assert output.dtype == arrays[0].dtype
        assert output.transpose(0, 2, 1, 3).flags.c_contiguous
        assert_same_bits(torch.from_numpy(output), expected[0])
        assert_same_bits(torch.from_numpy(lse), expected[1])
    assert hasattr(output, "__dlpack__")


def test_numpy_reads_views_and_read_only_arrays(torch_rng: torch.Generator) -> None:
    arrays = [x.numpy() for x in make(torch_rng)]
    expected = sf_attention(*arrays, PATTERN)
    for array in arrays:
        array.flags.writeable = False
    assert (sf_attention(*arrays, PATTERN) == expected).all()
    reversed_twice = [np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1] for x in arrays]
    assert (sf_attention(*reversed_twice, PATTERN) == expected).all()


def test_bfloat16_producers_are_told_where_to_go(torch_rng: torch.Generator) -> None:
    tensor = make(torch_rng, dtype=torch.bfloat16)[0]

    class Wrapped:
        dtype = "bfloat16"

        def __dlpack_device__(self) -> Any:
            return tensor.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> Any:
            return tensor.__dlpack__(**options)

    with pytest.raises(NotImplementedError, match="query: bfloat16 is computed on torch tensors only"):
        sf_attention(Wrapped(), Wrapped(), Wrapped(), PATTERN)


# ---- threads and processes ----


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


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
@pytest.mark.parametrize("case", ["numpy ours", "torch ours", "torch theirs", "numpy none"])
def test_fork(case: str) -> None:
    """A child computes after its parent did, with our threads or with torch's, whose pool is dead there."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, *case.split()],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


# ---- the module ----


def in_fresh_python(code: str, warnings: str = "error") -> str:
    env = {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-W", warnings, "-c", code]
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
    assert info["cuda"] is False
    assert info["cpu_level"] in info["path"]
    text = str(info)
    assert "\ncpu_levels" in text
    assert "not installed" not in text.split("torch")[1].splitlines()[0]
    json.dumps(info)
