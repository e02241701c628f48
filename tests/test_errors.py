"""The table of bad input: each has its exception class, names the argument, what was expected and what came.

Outputs stay as they were. Once at the kernel's door for both directions, once at the public operator's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sinklora
from sinklora import _C, SFPattern, torch_ops

B, H, HKV, N, D = 1, 4, 2, 6, 8
PATTERN = SFPattern(3, 1)

Case = tuple[dict[str, Any], type[Exception], str]


def inputs() -> dict[str, Any]:
    make = np.random.default_rng(0).standard_normal
    return {
        "query": make((B, H, N, D)).astype(np.float32),
        "key": make((B, HKV, N, D)).astype(np.float32),
        "value": make((B, HKV, N, D)).astype(np.float32),
    }


def cast(name: str, dtype: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda a: a[name].astype(dtype)


def shape(name: str, *size: int) -> Callable[[dict[str, Any]], Any]:
    return lambda a: np.zeros(size, a[name].dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# What replaces the arguments (a value, or a function of the good arguments), the class, the message.
BOTH: dict[str, Case] = {
    "float64": (
        {"query": cast("query", np.float64)},
        TypeError,
        "query: expected dtype float32, .*got float64",
    ),
    "integers": ({"query": cast("query", np.int32)}, TypeError, "query: expected dtype .*got int32"),
    "key dtype": ({"key": cast("key", np.float16)}, TypeError, "key: expected dtype float32, got float16"),
    "value dtype": ({"value": cast("value", np.float64)}, TypeError, "value: .*float32, got float64"),
    "query rank": ({"query": shape("query", H, N, D)}, ValueError, r"query: expected 4 dim.*\(4, 6, 8\)"),
    "key rank": ({"key": shape("key", HKV, N, D)}, ValueError, "key: expected "),
    "value rank": ({"value": shape("value", 1, B, HKV, N, D)}, ValueError, "value: expected shape "),
    "key batch": ({"key": shape("key", 2, HKV, N, D)}, ValueError, r"key: expected shape \(1, 2, 6, 8\)"),
    "key length": ({"key": shape("key", B, HKV, 5, D)}, ValueError, r"key: .*got \(1, 2, 5, 8\)"),
    "key dim": ({"key": shape("key", B, HKV, N, 16)}, ValueError, "key: expected shape"),
    "heads": (
        {"key": shape("key", B, 3, N, D), "value": shape("value", B, 3, N, D)},
        ValueError,
        "key: expected a number of heads that divides the query's 4, got 3",
    ),
    "no heads": (
        {"key": shape("key", B, 0, N, D), "value": shape("value", B, 0, N, D)},
        ValueError,
        "key: .*got 0",
    ),
    "value shape": ({"value": shape("value", B, 4, N, D)}, ValueError, "value: expected shape"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale: expected a finite float32 number, got .*nan"),
    "scale inf": ({"scale": float("-inf")}, ValueError, "scale: .*-inf"),
    "scale large": ({"scale": 1e39}, ValueError, "scale: .*1e\\+39"),
    "scale huge": ({"scale": 10**400}, ValueError, "scale: "),
    "scale text": ({"scale": "0.1"}, TypeError, "scale: expected a number.*got <class 'str'>"),
    "scale bool": ({"scale": True}, TypeError, "scale: expected a number.*got <class 'bool'>"),
    "cu both": (
        {"cu_seqlens": ints(0, N), "padding_mask": np.ones((B, N), bool)},
        ValueError,
        "cu_seqlens: expected at most one of .*got 2",
    ),
    "cu dtype": ({"cu_seqlens": np.array([0, N])}, TypeError, "cu_seqlens: expected dtype int32, got int64"),
    "cu rank": ({"cu_seqlens": ints(0, N)[None]}, ValueError, "cu_seqlens: expected one dimension"),
    "cu short": ({"cu_seqlens": ints(0)}, ValueError, r"cu_seqlens: .*at least 2 .*\(1,\)"),
    "cu empty": ({"cu_seqlens": ints()}, ValueError, "cu_seqlens: expected one dimension"),
    "cu start": ({"cu_seqlens": ints(1, N)}, ValueError, "cu_seqlens: expected to start with 0, got 1"),
    "cu end": ({"cu_seqlens": ints(0, 5)}, ValueError, "cu_seqlens: expected to end with .* 6, got 5"),
    "cu past end": ({"cu_seqlens": ints(0, 9)}, ValueError, "cu_seqlens: .* 6, got 9"),
    "cu order": (
        {"cu_seqlens": ints(0, 4, 3, N)},
        ValueError,
        "cu_seqlens: .*non-decreasing.*3 after 4 at 2",
    ),
    "cu negative": ({"cu_seqlens": ints(0, -3, N)}, ValueError, "cu_seqlens: .*-3 after 0"),
    "mask dtype": ({"padding_mask": np.ones((B, N), np.uint8)}, TypeError, "padding_mask: .*bool, got uint8"),
    "mask int64": ({"padding_mask": np.ones((B, N), int)}, TypeError, "padding_mask: .*bool, got int64"),
    "mask shape": ({"padding_mask": np.ones((B, N + 1), bool)}, ValueError, r"padding_mask: .*\(1, 7\)"),
    "mask rank": ({"padding_mask": np.ones(N, bool)}, ValueError, "padding_mask: expected shape"),
    "mask batch": ({"padding_mask": np.ones((2, N), bool)}, ValueError, "padding_mask: expected shape"),
}

BATCHED = {name: (lambda a, n=name: np.repeat(a[n], 2, 0)) for name in ("query", "key", "value")}
BOTH["cu batch"] = (
    {**BATCHED, "cu_seqlens": ints(0, N)},
    ValueError,
    "cu_seqlens: expected a batch of 1 .*2",
)

for _dim in (1, 4, 7, 12, 264):
    BOTH[f"head_dim {_dim}"] = (
        {n: shape(n, B, H if n == "query" else HKV, N, _dim) for n in ("query", "key", "value")},
        NotImplementedError,
        f"query: head_dim must be a multiple of 8 from 8 to 256, got {_dim}",
    )

# Only where the caller brings the outputs and every setting.
KERNEL: dict[str, Case] = {
    "stride": (
        {"query": lambda a: np.zeros((B, H, N, 2 * D), np.float32)[..., ::2]},
        ValueError,
        "query: .*stride 2",
    ),
    "output dtype": ({"output": np.zeros((B, H, N, D), np.float16)}, TypeError, "output: .*got float16"),
    "output shape": ({"output": np.zeros((B, H, D, N), np.float32)}, ValueError, "output: expected shape"),
    "lse dtype": ({"lse": np.zeros((B, H, N))}, TypeError, "lse: expected dtype float32, got float64"),
    "lse shape": ({"lse": np.zeros((B, H, N, 1), np.float32)}, ValueError, "lse: expected shape"),
    "lse stride": ({"lse": np.zeros((B, N, H), np.float32).swapaxes(1, 2)}, ValueError, "lse: .*contiguous"),
    "group_size": ({"group_size": 0}, ValueError, "group_size: expected an integer >= 1, got 0"),
    "group_size kind": ({"group_size": 3.0}, TypeError, "group_size: expected an integer"),
    "shift": ({"shift": 4}, ValueError, r"shift: expected 0 <= shift <= group_size \(3\), got 4"),
    "sinks": ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: .*-1"),
    "sinks huge": ({"num_sink_tokens": 2**64}, ValueError, "num_sink_tokens: .*64 bits"),
    "fraction": ({"shifted_fraction": 1.5}, ValueError, "shifted_fraction: .*1.5"),
    "causal": ({"causal": 1}, TypeError, "causal: expected a bool"),
    "threads 0": ({"num_threads": 0}, ValueError, "num_threads: expected an integer from 1 to 1024, got 0"),
    "threads many": ({"num_threads": 1025}, ValueError, "num_threads: .*1025"),
    "threads huge": ({"num_threads": 2**100}, ValueError, "num_threads"),
    "threads kind": ({"num_threads": 1.0}, TypeError, "num_threads: expected an integer"),
    "positions dtype": (
        {"position_ids": ints(*range(N))[None]},
        TypeError,
        "position_ids: .*int64, got int32",
    ),
    "positions shape": ({"position_ids": np.arange(N)}, ValueError, "position_ids: expected shape"),
    "positions batch": ({"position_ids": np.zeros((2, N), int)}, ValueError, "position_ids: expected shape"),
    "positions and mask": (
        {"position_ids": np.zeros((B, N), int), "padding_mask": np.ones((B, N), bool)},
        ValueError,
        "padding_mask: expected at most one of .*got 2",
    ),
}

GRADIENT: dict[str, Case] = {
    "grad_output dtype": ({"grad_output": np.zeros((B, H, N, D))}, TypeError, "grad_output: .*got float64"),
    "grad_output shape": ({"grad_output": np.zeros((B, H, D, N), "f4")}, ValueError, "grad_output: "),
    "grad_output none": ({"grad_output": None}, TypeError, "grad_output: expected an array, got None"),
    "grad_query": ({"grad_query": np.zeros((B, HKV, N, D), "f4")}, ValueError, "grad_query: expected shape"),
    "grad_key": ({"grad_key": np.zeros((B, H, N, D), "f4")}, ValueError, "grad_key: expected shape"),
    "grad_value": ({"grad_value": np.zeros((B, HKV, N, D), "f2")}, TypeError, "grad_value: .*got float16"),
    "read-only": (
        {"grad_key": np.broadcast_to(np.float32(7), (B, HKV, N, D))},
        BufferError,
        "grad_key: .*writ",
    ),
}


def replaced(good: dict[str, Any], bad: dict[str, Any]) -> dict[str, Any]:
    return {**good, **{name: x(good) if callable(x) else x for name, x in bad.items()}}


def call_kernel(backward: bool, bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good = inputs()
    written = {"output": np.full((B, H, N, D), 7, "f4"), "lse": np.full((B, H, N), 7, "f4")}
    settings = dict(
        zip(
            ("group_size", "shift", "num_sink_tokens", "shifted_fraction", "causal"),
            PATTERN.settings,
            strict=True,
        )
    )
    rest = {"cu_seqlens": None, "padding_mask": None, "position_ids": None, **settings}
    rest |= {"scale": 0.5, "num_threads": 1, "allocate": lambda n: np.empty(n, np.uint8)}
    args = {**good, **written, **rest}
    if backward:
        grads = {f"grad_{name}": np.full_like(good[name], 7) for name in good}
        args = {"grad_output": good["query"], **good, **written, **grads, **rest}
        written = grads
    before = {name: array.copy() for name, array in written.items()}
    function = _C.attention_backward if backward else _C.attention_forward
    with pytest.raises(error, match=message):
        function(*replaced(args, bad).values())
    for name, array in written.items():
        assert (array == before[name]).all(), f"{name} was written to"


@pytest.mark.parametrize("name", [*BOTH, *KERNEL])
def test_kernel_forward(name: str) -> None:
    call_kernel(False, *{**BOTH, **KERNEL}[name])


@pytest.mark.parametrize("name", [*BOTH, *KERNEL, *GRADIENT])
def test_kernel_backward(name: str) -> None:
    call_kernel(True, *{**BOTH, **KERNEL, **GRADIENT}[name])


@pytest.mark.parametrize("kind", ["numpy", "torch", "torch, gradients", "dlpack"])
@pytest.mark.parametrize("name", BOTH)
def test_operator(name: str, kind: str) -> None:
    bad, error, message = BOTH[name]
    args = replaced(inputs(), bad)
    if kind == "dlpack":
        from producers import Producer

        args = {n: Producer(x) if isinstance(x, np.ndarray) and n in inputs() else x for n, x in args.items()}
    elif kind != "numpy":
        args = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in args.items()}
    if "gradients" in kind and args["query"].is_floating_point():
        args["query"].requires_grad_()
    with pytest.raises(error, match=message):
        sinklora.sf_attention(pattern=PATTERN, **args)


def torch_inputs() -> dict[str, Any]:
    return {name: torch.from_numpy(x) for name, x in inputs().items()}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"query": [[1.0]]}, TypeError, "query: expected a torch tensor, a NumPy array or .*list"),
        ({"query": 3.0}, TypeError, "query: expected a torch tensor, a NumPy array"),
        ({"query": None}, TypeError, "query: expected a torch tensor"),
        ({"key": inputs()["key"]}, TypeError, "key: expected a torch tensor, as query is, got .*ndarray"),
        ({"value": None}, TypeError, "value: expected a torch tensor"),
        ({"query": inputs()["query"]}, TypeError, "key: expected a NumPy array, as query is, got .*Tensor"),
        ({"padding_mask": np.ones((B, N), bool)}, TypeError, "padding_mask: expected a torch tensor"),
        ({"cu_seqlens": [0, N]}, TypeError, "cu_seqlens: expected a torch tensor, .*list"),
        ({"pattern": 3}, TypeError, "pattern: expected an SFPattern, got <class 'int'>"),
        ({"pattern": {"group_size": 3}}, TypeError, "pattern: expected an SFPattern"),
        (
            {"query": lambda a: a["query"].to("meta")},
            ValueError,
            "key: expected query's device meta, got cpu",
        ),
        ({"key": lambda a: a["key"].to("meta")}, ValueError, "key: expected query's device cpu, got meta"),
        (
            {"padding_mask": torch.ones(B, N, dtype=torch.bool, device="meta")},
            ValueError,
            "padding_mask: expected query's device cpu, got meta",
        ),
        ({"query": lambda a: a["query"][0, 0, 0, 0]}, ValueError, r"query: expected 4 dim.*got shape \(\)"),
        ({"key": lambda a: a["key"][0, 0, 0, 0]}, ValueError, "key: "),
    ],
)
def test_operator_kinds_and_devices(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sinklora.sf_attention(**replaced({**torch_inputs(), "pattern": PATTERN}, bad))


def test_masked_arrays_are_refused() -> None:
    """Their mask would be ignored without a word."""
    args = inputs()
    with pytest.raises(TypeError, match="value: expected a plain NumPy array, got a masked one"):
        sinklora.sf_attention(args["query"], args["key"], np.ma.array(args["value"]), PATTERN)


def test_autocast_casts_nothing() -> None:
    args = torch_inputs()
    args["key"] = args["key"].bfloat16()
    with torch.autocast("cpu"), pytest.raises(TypeError, match="key: expected dtype float32, got bfloat16"):
        sinklora.sf_attention(pattern=PATTERN, **args)


@pytest.mark.parametrize("positions", [torch.zeros(B, N, dtype=torch.int32), torch.zeros(B, N + 1).long()])
def test_torch_position_ids(positions: torch.Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="position_ids: expected"):
        torch_ops.sf_attention(pattern=PATTERN, **torch_inputs(), position_ids=positions)


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(TypeError, match="attention_forward: expected 16 positional arguments, got 1"):
        _C.attention_forward(None)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.pattern_mask(None, *PATTERN.settings), TypeError, "output: expected an array, got None"),
        (
            lambda: _C.pattern_mask(np.zeros((1, 2, 2)), *PATTERN.settings),
            TypeError,
            "output: .*bool, got float64",
        ),
        (
            lambda: _C.pattern_mask(np.zeros((1, 2, 3), bool), *PATTERN.settings),
            ValueError,
            "output: expected shape",
        ),
        (
            lambda: _C.pattern_mask(np.zeros((2, 2), bool), *PATTERN.settings),
            ValueError,
            "output: expected shape",
        ),
        (lambda: _C.select_cpu_level("mmx"), ValueError, r"expected one of the levels .*portable.*mmx"),
        (lambda: _C.select_cpu_level(3), TypeError, "name: expected a str or None, got <class 'int'>"),
        (lambda: sinklora.set_num_threads(0), ValueError, "num_threads: expected an integer from 1 to"),
        (lambda: sinklora.set_num_threads(1.5), TypeError, "num_threads: expected an integer, got"),
        (lambda: sinklora.set_num_threads(True), TypeError, "num_threads: expected an integer, got"),
    ],
)
def test_other_functions(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
