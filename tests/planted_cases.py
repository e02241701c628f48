"""Small inputs that take every operation's kernels through all their branches, for errors planted in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import emulated
import torch
from cases import case
from emulated import call, empty_rows, pattern_struct
from emulation import Emulator
from torch import Tensor

from sinklora import SFPattern, torch_ops

Case = tuple[dict[str, Any], list[Tensor]]  # arguments, and those of them that are written


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def _odd_strides(tensor: Tensor) -> Tensor:
    """The same values in rows that are not aligned to 16 bytes."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)
    wide[..., 1:] = tensor
    return wide[..., 1:]


# ---- SF-Attn


def _attention(
    dtype: torch.dtype, dim: int
) -> Iterator[tuple[tuple[Tensor, ...], SFPattern, dict[str, Any]]]:
    """query, key, value; pattern; what else. Groups cut by tiles, long full ranges, every way to tell
    sequences apart, scores so large that a maximum moves."""
    long = (1, 2, 1, 300, dim)
    sizes: tuple[tuple[tuple[int, int, int, int, int], dict[str, Any], dict[str, Any]], ...] = (
        ((1, 4, 2, 150, dim), {"group_size": 50, "fraction": 0.5, "sinks": 70}, {}),
        (long, {"group_size": 300}, {}),
        (long, {"group_size": 300, "causal": False}, {"scale": 4.0}),
        (long, {"group_size": 300, "causal": False}, {"scale": -4.0}),
        (
            (3, 2, 2, 90, dim - 8),
            {"group_size": 30},
            {"padding_mask": _mask("0" * 20 + "1" * 70, "011" * 30, "0" * 90)},
        ),
        (
            (1, 2, 1, 100, dim),
            {"group_size": 40},
            {"cu_seqlens": torch.tensor([0, 0, 7, 71, 100], dtype=torch.int32)},
        ),
        (
            (1, 2, 1, 100, dim),
            {"group_size": 40},
            {"position_ids": torch.cat([torch.arange(30), torch.arange(70)])[None]},
        ),
    )
    for i, (size, pattern, extra) in enumerate(sizes):
        shape = case(size, **pattern)
        query, key, value, _ = shape.inputs(dtype, torch.Generator().manual_seed(i))
        if i == 2:
            key[:, :, 200:] *= 3  # later keys weigh far more
        yield (query, key, value), shape.pattern, extra
    yield tuple(map(_odd_strides, (query, key, value))), shape.pattern, {}


def _forward(dtype: torch.dtype, dim: int) -> Iterator[Case]:
    for i, ((query, key, value), pattern, extra) in enumerate(_attention(dtype, dim)):
        output, lse = empty_rows(query), torch.full(query.shape[:3], torch.nan)
        arguments = {"query": query, "key": key, "lse": lse, "pattern": pattern_struct(pattern)}
        arguments |= {"scale": query.shape[3] ** -0.5, **extra}
        yield {**arguments, "value": value, "output": output}, [output, lse]
        if i < 2:
            lse = torch.full_like(lse, torch.nan)
            yield {**arguments, "lse": lse}, [lse]


def _backward(dtype: torch.dtype, dim: int) -> Iterator[Case]:
    for (query, key, value), pattern, extra in _attention(dtype, dim):
        output, lse = torch_ops.sf_attention(query, key, value, pattern, **extra)
        grads = [empty_rows(x) for x in (query, key, value)]
        names = ("grad_query", "grad_key", "grad_value")
        arguments = {"query": query, "key": key, "value": value, "output": output, "lse": lse.contiguous()}
        arguments |= {"grad_output": _random(*query.shape, dtype=dtype), "pattern": pattern_struct(pattern)}
        arguments |= {"scale": query.shape[3] ** -0.5, **extra}
        yield {**arguments, **dict(zip(names, grads, strict=True))}, grads


# ---- the cache


def _score(dtype: torch.dtype, dim: int) -> Iterator[Case]:
    full = SFPattern(1 << 20, 0, 0.0)
    for heads, queries, keys, extra in (
        (4, 200, 330, {}),
        (2, 90, 90, {"window": 13, "mean": True}),
        (2, 90, 90, {"padding_mask": _mask("0" * 33 + "1" * 57, "1" * 50 + "0" * 40)}),
    ):
        query = _random(2, heads, queries, dim, dtype=dtype)
        key = _random(2, 2, keys, dim, dtype=dtype, seed=2)
        scores, lse = torch.full((2, 2, keys), torch.nan), torch.full((2, heads, queries), 8.0)
        if queries == keys and "padding_mask" not in extra:
            lse = torch_ops.sf_attention(query, key, key, full)[1].contiguous()
        arguments = {"query": query, "key": key, "lse": lse, "scores": scores, "scale": dim**-0.5, **extra}
        yield arguments, [scores]


def _cache(slots: int, used: int, budget: int) -> dict[str, Tensor]:
    """What a cache keeps beside keys and values: 2 rows, 2 heads; slot `used` is free."""
    positions = torch.full((2, 2, slots), -1, dtype=torch.int32)
    order = torch.randperm(used + 20, generator=torch.Generator().manual_seed(3))[:used].sort().values
    positions[:, :, :used] = order.to(torch.int32)
    scores = _random(2, 2, slots, seed=4).abs()
    scores[:, :, 10:30] = 0.25  # ties
    seen = int(positions.max()) + 1
    rows = torch.tensor([[seen, used, budget, 9]] * 2, dtype=torch.int32)
    free = torch.full((2, 2), used, dtype=torch.int32)
    return {"positions": positions, "scores": scores, "rows": rows, "free_slot": free}


def _decode(dtype: torch.dtype, dim: int) -> Iterator[Case]:
    def tensors(queries: int, slots: int, heads: int = 4) -> dict[str, Tensor]:
        query = _random(2, heads, queries, dim, dtype=dtype)
        return {
            "query": query,
            "key": _random(2, 2, slots, dim, dtype=dtype, seed=2),
            "value": _random(2, 2, slots, dim, dtype=dtype, seed=3),
            "output": empty_rows(query),
            "lse": torch.full((2, heads, queries), torch.nan),
        }

    # 40 rows of a head are more than the factors that a block has at a time.
    for queries, slots, heads in ((1, 700, 4), (3, 150, 4), (5, 100, 16)):
        given = tensors(queries, slots, heads)
        yield {**given, "scale": 0.2}, [given["output"], given["lse"]]
        scores = _random(2, 2, slots)
        mask = _random(2, slots, seed=5) > -1
        given = tensors(queries, slots, heads)
        yield (
            {**given, "scale": 0.2, "scores": scores, "padding_mask": mask},
            [given["output"], given["lse"], scores],
        )
    for used, budget in ((600, 600), (40, 50)):
        given, state = tensors(1, 640), _cache(640, used, budget)
        new = {name: _random(2, 2, 1, dim, dtype=dtype, seed=7) for name in ("new_key", "new_value")}
        arguments = {
            **given,
            **state,
            **new,
            "new_mask": torch.tensor([[True], [False]]),
            "scale": 0.2,
            "n_sink": 4,
        }
        yield arguments, [given["output"], given["key"], given["value"], *state.values()]


def _select(dtype: torch.dtype, dim: int) -> Iterator[Case]:
    for slots, used, budget in ((700, 650, 333), (90, 80, 300), (2300, 2100, 2300)):
        state = _cache(slots, used, budget)
        key, value = (_random(2, 2, slots, dim, dtype=dtype, seed=s) for s in (2, 3))
        n = max(budget, 90)
        out = {
            "key_out": torch.zeros(2, 2, n, dim, dtype=dtype),
            "value_out": torch.zeros(2, 2, n, dim, dtype=dtype),
            "scores_out": torch.full((2, 2, n), torch.nan),
            "positions_out": torch.zeros(2, 2, n, dtype=torch.int32),
        }
        given = {"key": key, "value": value, **{k: state[k] for k in ("scores", "positions", "rows")}}
        yield {**given, **out, "n_sink": 4}, [*out.values(), state["rows"]]
    state = _cache(700, 650, 333)
    key, value = (_random(2, 2, 700, dim, dtype=dtype, seed=s) for s in (2, 3))
    given = {"key": key, "value": value, "scores": state["scores"], "positions": state["positions"]}
    arguments = {**given, **{f"{k}_out": x for k, x in given.items()}, "rows": state["rows"], "n_sink": 4}
    yield arguments, [key[:, :, :333], value[:, :, :333], *state.values()]


_CASES: dict[str, Callable[[torch.dtype, int], Iterator[Case]]] = {
    "attention_forward": _forward,
    "attention_backward": _backward,
    "h2o_score": _score,
    "h2o_decode": _decode,
    "h2o_select": _select,
}


def run(emulator: Emulator, operation: str, dtype: torch.dtype, dim: int) -> Iterator[list[Tensor]]:
    """Runs the cases one by one, on a device with many multiprocessors and, where that is computed in another
    way, on one with few; yields what each wrote."""
    for processors in (4, 1) if operation == "attention_backward" else (4,):
        emulator.device(processors)
        for arguments, written in _CASES[operation](dtype, dim):
            call(operation, emulator=emulator, **arguments)
            yield written


@cache
def has(operation: str, dtype: torch.dtype) -> bool:
    """Does this tree's CUDA compute the operation in this dtype?"""
    try:
        next(run(emulated.library(), operation, dtype, 64))
    except NotImplementedError:
        return False
    return True
