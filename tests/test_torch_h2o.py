"""The cache's operators under torch's machinery, for NumPy, and what they refuse without a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_close, assert_same_bits
from simulation_support import BUDGET, RECENT, SEEN, USED, make
from torch import Tensor
from torch.autograd import forward_ad

from sinklora import h2o_ops, reference, torch_h2o

OPS = torch.ops.sinklora
BUFFERS = ("key", "value", "scores", "positions", "free_slot", "rows")


def cache(rng: torch.Generator, *, used: int = 6, budget: int = 6, batch: int = 2) -> dict[str, Tensor]:
    """A cache of 2 heads and 8 slots whose rows hold positions 0, 1, 2, ... in the first slots."""
    positions = torch.full((batch, 2, 8), -1, dtype=torch.int32)
    positions[:, :, :used] = torch.arange(used)
    scores = torch.rand(batch, 2, 8, generator=rng)
    return {
        "key": torch.randn(batch, 2, 8, 16, generator=rng),
        "value": torch.randn(batch, 2, 8, 16, generator=rng),
        "scores": scores,
        "positions": positions,
        "free_slot": torch.full((batch, 2), used, dtype=torch.int32),
        "rows": torch.tensor([[used, used, budget, 2]], dtype=torch.int32).repeat(batch, 1),
    }


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_unchanged(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor, name)


# ---- torch's machinery ----


def test_opcheck(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, 19, batch=2)
    mask = torch.rand(2, 19, generator=torch_rng) > 0.3
    for queries in (query, query[:, :, -3:]):
        for padding in (None, mask):
            torch.library.opcheck(OPS.causal_attention.default, (queries, key, value, padding, 0.25))
            _, lse = OPS.causal_attention(queries, key, value, padding, 0.25)
            for given in (None, lse):
                args = (queries, key, given, padding, 4, True, 0.25)
                torch.library.opcheck(OPS.attention_scores.default, args)
    step = make(torch_rng, 1, batch=2)
    new_mask = torch.tensor([[True], [False]])
    for kept in (None, new_mask):
        args = (*step, *cache(torch_rng).values(), kept, 1, False, 0.25)
        torch.library.opcheck(OPS.h2o_decode.default, args)
    full = cache(torch_rng, used=8, budget=5)
    full.pop("free_slot")
    torch.library.opcheck(OPS.h2o_select.default, (*full.values(), 1, 5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(torch_rng: torch.Generator, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        output, lse = torch_h2o.causal_attention(query * 2, key, value)
        last, _ = torch_h2o.causal_attention(query[:, :, -1:], key, value, scale=0.5)
        return output + last, torch_h2o.attention_scores(query * 2, key, lse)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors = make(torch_rng, 19)
    for actual, expected in zip(compiled(*tensors), function(*tensors), strict=True):
        assert_same_bits(actual, expected)
        assert actual.stride() == expected.stride()


def test_compile_a_step(torch_rng: torch.Generator) -> None:
    """A compiled step writes the caller's buffers."""
    torch._dynamo.reset()
    function = lambda *x: torch_h2o.h2o_decode(*x, num_sinks=1) + 1  # noqa: E731
    step, buffers = make(torch_rng, 1, batch=2), cache(torch_rng)
    expected_buffers = copies(buffers)
    expected = function(*step, *expected_buffers.values())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*step, *buffers.values()), expected)
    assert_unchanged(buffers, expected_buffers)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_raises(torch_rng: torch.Generator, compiled: bool) -> None:
    """Gradients that are not computed must not come out as none at all."""
    torch._dynamo.reset()
    query, key, value = (x.requires_grad_() for x in make(torch_rng, 19))
    attend = lambda q, k, v: torch_h2o.causal_attention(q * 1, k, v)[0] * 2  # noqa: E731
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = attend(query, key, value)
        assert not expected.requires_grad
    for tensors in ((query, key, value), (query.detach(), key, value.detach())):
        output = attend(*tensors)
        assert_same_bits(output, expected)
        with pytest.raises(RuntimeError, match="computes no gradients, got a backward through it"):
            output.sum().backward()
    output, lse = torch_h2o.causal_attention(query, key, value)
    assert output.requires_grad and not lse.requires_grad
    step = [x.requires_grad_() for x in make(torch_rng, 1, batch=2)]
    output = torch_h2o.h2o_decode(*step, **cache(torch_rng))
    with pytest.raises(RuntimeError, match="computes no gradients"):
        output.sum().backward()
    assert not any(x.requires_grad for x in torch_h2o.h2o_select(**selectable(torch_rng, key)))


def selectable(rng: torch.Generator, key: Tensor) -> dict[str, Any]:
    full = cache(rng, used=8, budget=5, batch=1)
    full.pop("free_slot")
    full["key"] = full["key"] + key[:, :, :8]
    return {**full, "num_sinks": 1, "capacity": 6}


def test_forward_mode_raises(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, 19)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(RuntimeError, match="forward"):
            torch_h2o.causal_attention(dual, key, value)


def test_meta_tensors_give_shapes(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, 19)
    output, lse = torch_h2o.causal_attention(*(x.to("meta") for x in tensors))
    expected, expected_lse = torch_h2o.causal_attention(*tensors)
    assert (output.shape, output.stride(), output.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
    assert lse.shape == expected_lse.shape
    step, buffers = make(torch_rng, 1, batch=2), cache(torch_rng)
    output = torch_h2o.h2o_decode(
        *(x.to("meta") for x in step), **{name: x.to("meta") for name, x in buffers.items()}
    )
    assert output.shape == (2, 4, 1, 16)


# ---- attention ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_queries", [0, 1, 2, 8, 9, 30])
def test_causal_attention(
    torch_rng: torch.Generator, cpu_level: str, num_queries: int, dtype: torch.dtype
) -> None:
    query, key, value = make(torch_rng, 30, batch=2, dtype=dtype)
    query = query[:, :, 30 - num_queries :]
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    mask = torch.rand(2, 30, generator=torch_rng) > 0.3
    for padding in (None, mask):
        output, lse = torch_h2o.causal_attention(query, key, value, padding_mask=padding)
        expected, expected_lse = reference.causal_attention(query, key, value, padding_mask=padding)
        assert output.transpose(1, 2).is_contiguous()
        assert_close(output, expected, atol)
        assert_close(lse, expected_lse, 2e-5, 2e-5)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "decode"),
    [(1, 1, True), (1, 50, True), (2, 2, False), (2, 3, True), (8, 8, False), (8, 9, True), (9, 10, False)],
)
def test_shapes_choose_the_kernel(num_queries: int, num_keys: int, decode: bool) -> None:
    assert h2o_ops.is_decode(num_queries, num_keys) is decode
    assert not h2o_ops.is_decode(0, 0)


@pytest.mark.parametrize("num_queries", [1, 4, 20])
def test_bits_depend_on_the_live_keys_alone(torch_rng: torch.Generator, num_queries: int) -> None:
    """Not on strides, on padding before or behind, on slots that others use, nor on the batch."""
    query, key, value = make(torch_rng, 40)
    query = query[:, :, -num_queries:]
    expected = torch_h2o.causal_attention(query, key, value)
    buffers = [torch.full((3, 2, 64, 16), float("nan")) for _ in range(2)]
    for buffer, tensor in zip(buffers, (key, value), strict=True):
        buffer[1, :, 24:] = tensor[0]
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[1, 24:] = True
    wide = torch.full((3, 4, num_queries, 32), float("nan"))[..., :16]
    wide[1] = query[0]
    output, lse = torch_h2o.causal_attention(wide, *buffers, padding_mask=mask)
    assert_same_bits(output[1:2], expected[0])
    assert_same_bits(lse[1:2], expected[1])


def test_only_a_last_dimension_that_is_not_contiguous_is_copied(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, 19)
    wide = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    for last in (19, 3):
        expected = torch_h2o.causal_attention(tensors[0][:, :, -last:], *tensors[1:])[0]
        output = torch_h2o.causal_attention(wide[0][:, :, -last:], *wide[1:])[0]
        assert_same_bits(output, expected)
    step = make(torch_rng, 1, batch=2)
    buffers = cache(torch_rng)
    expected_buffers = copies(buffers)
    expected = torch_h2o.h2o_decode(*step, **expected_buffers)
    spread = [torch.stack([x, x], -1)[..., 0] for x in step]
    assert spread[0].stride(-1) == 2
    assert_same_bits(torch_h2o.h2o_decode(*spread, **buffers), expected)
    assert_unchanged(buffers, expected_buffers)
    # What is written cannot be a copy.
    buffers["key"] = buffers["key"].transpose(2, 3).contiguous().transpose(2, 3)
    before = copies(buffers)
    with pytest.raises(ValueError, match="key: "):
        torch_h2o.h2o_decode(*step, **buffers)
    assert_unchanged(buffers, before)


# ---- a step and a selection by hand ----


def test_a_step_by_hand(torch_rng: torch.Generator) -> None:
    query, new_key, new_value = make(torch_rng, 1, batch=2)
    buffers = cache(torch_rng, used=5, budget=6)
    buffers["scores"][:, :, :5] = torch.tensor([3.0, 9, 0, 5, 7])
    query = query * 0  # every slot gets an equal share
    mask = torch.tensor([[True], [False]])
    before = copies(buffers)
    output = torch_h2o.h2o_decode(query, new_key, new_value, **buffers, new_mask=mask)
    mean = torch.cat([before["value"][0, :, :5], new_value[0]], 1).mean(1)
    assert_close(output[0, :, 0], mean.repeat_interleave(2, 0), 1e-6)
    assert (output[1] == 0).all()
    for name, tensor in buffers.items():
        assert_same_bits(tensor[1], before[name][1], name)
    # 6 entries are the budget: nothing is evicted, the next token takes the next slot.
    assert buffers["rows"][0].tolist() == [6, 6, 6, 2]
    assert buffers["free_slot"][0].tolist() == [6, 6]
    third = 2 / 6
    assert_close(buffers["scores"][0, 0, :6], [x + third for x in (3, 9, 0, 5, 7, 0)], 1e-6)
    assert_same_bits(buffers["key"][0, :, 5], new_key[0, :, 0])

    torch_h2o.h2o_decode(query, new_key, new_value, **buffers, new_mask=mask, num_sinks=3)
    # Positions 0 to 2 are sinks, 5 and 6 recent: of 3 and 4 the smaller score goes.
    assert buffers["positions"][0, 0].tolist() == [0, 1, 2, -1, 4, 5, 6, -1]
    assert buffers["rows"][0].tolist() == [7, 6, 6, 2]
    assert buffers["free_slot"][0].tolist() == [3, 3]
    assert buffers["scores"][0, 0, 3] == 0
    torch_h2o.h2o_decode(query, new_key, new_value, **buffers, new_mask=mask)
    # 7 stands in slot 3; 6 and 7 are recent, and of the rest 2 and 5 have received the same: the newer goes.
    assert buffers["positions"][0, 0].tolist() == [0, 1, 2, 7, 4, -1, 6, -1]


def test_a_mean_step_adds_the_share_of_a_head(torch_rng: torch.Generator) -> None:
    step = make(torch_rng, 1, batch=2)
    summed = cache(torch_rng)
    summed["scores"][:, :, 6] = 0  # where the new token goes
    averaged, before = copies(summed), summed["scores"].clone()
    torch_h2o.h2o_decode(*step, **summed)
    torch_h2o.h2o_decode(*step, **averaged, mean=True)
    live = (summed["positions"] >= 0) & (averaged["positions"] >= 0)
    gained = (summed["scores"] - before)[live], (averaged["scores"] - before)[live]
    assert_close(gained[1], gained[0] / 2, 1e-6)


def test_a_selection_by_hand(torch_rng: torch.Generator) -> None:
    buffers = cache(torch_rng, used=7, budget=5)
    buffers.pop("free_slot")
    buffers["positions"][0, 0, :7] = torch.tensor([9, 3, 4, 0, 8, 5, 7])  # as after some decoding
    buffers["scores"][0, 0, :7] = torch.tensor([0.0, 2, 1, 0, 0, 2, 2])
    key, value, scores, positions = torch_h2o.h2o_select(**buffers, num_sinks=1, capacity=6)
    # 9 and 8 are recent, 0 is a sink, and of the equals 3, 5, 7 the older stay; slots keep their order.
    assert positions[0, 0].tolist() == [9, 3, 0, 8, 5, -1]
    assert scores[0, 0].tolist() == [0, 2, 0, 0, 2, 0]
    assert buffers["rows"].tolist() == [[7, 5, 5, 2]] * 2
    for kept, given in ((key, buffers["key"]), (value, buffers["value"])):
        assert kept.shape == (2, 2, 6, 16)
        assert_same_bits(kept[0, 0, :5], given[0, 0, [0, 1, 3, 4, 5]])


def test_nan_scores_are_kept(torch_rng: torch.Generator) -> None:
    buffers = cache(torch_rng, used=7, budget=4)
    buffers.pop("free_slot")
    buffers["scores"][:, :, 3] = float("nan")
    positions = torch_h2o.h2o_select(**buffers, num_sinks=0, capacity=4)[3]
    assert (positions[:, :, :] == 3).any(-1).all()


def test_fewer_than_the_budget_are_all_kept(torch_rng: torch.Generator) -> None:
    buffers = cache(torch_rng, used=4, budget=6)
    buffers.pop("free_slot")
    buffers["positions"][1, :, 2:] = -1
    positions = torch_h2o.h2o_select(**buffers, num_sinks=0, capacity=4)[3]
    assert positions[0, 0].tolist() == [0, 1, 2, 3]
    assert positions[1, 1].tolist() == [0, 1, -1, -1]
    assert buffers["rows"][:, USED].tolist() == [4, 2]
    assert buffers["rows"][:, [SEEN, BUDGET, RECENT]].tolist() == [[4, 6, 2]] * 2


def test_empty_batches(torch_rng: torch.Generator) -> None:
    step, buffers = make(torch_rng, 1, batch=0), cache(torch_rng, batch=0)
    assert torch_h2o.h2o_decode(*step, **buffers).shape == (0, 4, 1, 16)
    buffers.pop("free_slot")
    assert torch_h2o.h2o_select(**buffers, num_sinks=0, capacity=3)[0].shape == (0, 2, 3, 16)


# ---- NumPy ----


def test_numpy_equals_torch(torch_rng: torch.Generator) -> None:
    tensors = make(torch_rng, 19)
    mask = torch.rand(1, 19, generator=torch_rng) > 0.3
    for last in (19, 3):
        query, key, value = tensors[0][:, :, -last:], *tensors[1:]
        expected = torch_h2o.causal_attention(query, key, value, padding_mask=mask, scale=0.4)
        arrays = (x.numpy() for x in (query, key, value))
        output = h2o_ops.causal_attention(*arrays, padding_mask=mask.numpy(), scale=0.4)
        for actual, want in zip(output, expected, strict=True):
            assert_same_bits(torch.from_numpy(actual), want)
    step, buffers = make(torch_rng, 1, batch=2), cache(torch_rng)
    arrays = {name: x.numpy().copy() for name, x in buffers.items()}
    new_mask = torch.tensor([[True], [False]])
    options: dict[str, Any] = {"num_sinks": 1, "mean": True, "scale": 0.4}
    expected_step = torch_h2o.h2o_decode(*step, **buffers, **options, new_mask=new_mask)
    output_step = h2o_ops.decode(*(x.numpy() for x in step), **arrays, **options, new_mask=new_mask.numpy())
    assert_same_bits(torch.from_numpy(output_step), expected_step)
    assert_unchanged({name: torch.from_numpy(x) for name, x in arrays.items()}, buffers)
    arrays.pop("free_slot")
    buffers.pop("free_slot")
    arrays["rows"][:, BUDGET] = buffers["rows"][:, BUDGET] = 4
    expected_kept = torch_h2o.h2o_select(**buffers, num_sinks=1, capacity=4)
    for actual, want in zip(h2o_ops.select(**arrays, num_sinks=1, capacity=4), expected_kept, strict=True):
        assert_same_bits(torch.from_numpy(actual), want)
    assert arrays["rows"].tolist() == buffers["rows"].tolist()


# ---- refusals ----

BAD_STEPS: list[tuple[str, Any, type[Exception]]] = [
    ("query", lambda x: x[0], ValueError),
    ("query", lambda x: x.repeat(1, 1, 2, 1), ValueError),
    ("query", lambda x: x.double(), TypeError),
    ("query", lambda x: x[:, :3], ValueError),
    ("new_key", lambda x: x.half(), TypeError),
    ("new_key", lambda x: x[:1], ValueError),
    ("new_value", lambda x: x[..., :8], ValueError),
    ("key", lambda x: x[..., :8], ValueError),
    ("key", lambda x: x.bfloat16(), TypeError),
    ("value", lambda x: x[:, :, :7], ValueError),
    ("scores", lambda x: x.double(), TypeError),
    ("scores", lambda x: x[:, :, :7], ValueError),
    ("scores", lambda x: x[:, :, ::2], ValueError),
    ("positions", lambda x: x.long(), TypeError),
    ("positions", lambda x: x[:, :, :7], ValueError),
    ("free_slot", lambda x: x[:, :1], ValueError),
    ("free_slot", lambda x: x.long(), TypeError),
    ("rows", lambda x: x[:, :3], ValueError),
    ("rows", lambda x: x[:1], ValueError),
    ("rows", lambda x: x.numpy(), TypeError),
    ("rows", lambda x: [0], TypeError),
    ("rows", lambda x: None, ValueError),
    ("new_mask", lambda x: torch.ones(2, 2, dtype=torch.bool), ValueError),
    ("new_mask", lambda x: torch.ones(2, 1), TypeError),
    ("num_sinks", lambda x: -1, ValueError),
    ("scale", lambda x: float("inf"), ValueError),
    ("scale", lambda x: "1", TypeError),
]


@pytest.mark.parametrize(("name", "change", "error"), BAD_STEPS)
def test_a_refused_step_changes_nothing(
    torch_rng: torch.Generator, name: str, change: Any, error: type[Exception]
) -> None:
    buffers = cache(torch_rng)
    before = copies(buffers)
    given = {
        **dict(zip(("query", "new_key", "new_value"), make(torch_rng, 1, batch=2), strict=True)),
        **buffers,
    }
    given[name] = change(given.get(name))
    with pytest.raises(error, match=f"{name}|last dimension"):
        torch_h2o.h2o_decode(**given)
    assert_unchanged(buffers, before)


def test_a_refused_selection_changes_nothing(torch_rng: torch.Generator) -> None:
    buffers = cache(torch_rng, used=8, budget=5)
    buffers.pop("free_slot")
    before = copies(buffers)
    with pytest.raises(ValueError, match="key_out"):
        torch_h2o.h2o_select(**buffers, num_sinks=0, capacity=4)
    with pytest.raises(ValueError, match="scores"):
        torch_h2o.h2o_select(**{**buffers, "scores": buffers["scores"][:, :, :7]}, num_sinks=0, capacity=5)
    with pytest.raises(TypeError, match="positions: expected a torch tensor"):
        torch_h2o.h2o_select(**{**buffers, "positions": None}, num_sinks=0, capacity=5)  # type: ignore[arg-type]
    assert_unchanged(buffers, before)


def test_refuses_attention(torch_rng: torch.Generator) -> None:
    query, key, value = make(torch_rng, 9)
    with pytest.raises(TypeError, match="key: expected a torch tensor, got <class 'numpy"):
        torch_h2o.causal_attention(query, key.numpy(), value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key: expected a torch tensor, got <class 'NoneType'>"):
        torch_h2o.causal_attention(query, None, value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="padding_mask: expected a torch tensor, got <class 'list'>"):
        torch_h2o.causal_attention(query, key, value, padding_mask=[True] * 9)  # type: ignore[arg-type]
    for n in (9, 3):
        with pytest.raises(ValueError, match="value: "):
            torch_h2o.causal_attention(query[:, :, -n:], key, value[:, :, :8])
        with pytest.raises(TypeError, match="value: "):
            torch_h2o.causal_attention(query[:, :, -n:], key, value.half())
        with pytest.raises(ValueError, match="padding_mask: "):
            torch_h2o.causal_attention(query[:, :, -n:], key, value, padding_mask=torch.ones(1, 8).bool())
    with pytest.raises(ValueError, match="key: "):
        torch_h2o.causal_attention(query, key[:, :, :8], value[:, :, :8])
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        torch_h2o.causal_attention(query[0], key, value)
    with pytest.raises(ValueError, match="expected query's device meta, got cpu"):
        torch_h2o.causal_attention(query.to("meta"), key, value)


def test_numpy_refuses(rng: np.random.Generator) -> None:
    array = rng.standard_normal((1, 2, 4, 16))
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        h2o_ops.causal_attention(array[0], array, array)
    with pytest.raises(TypeError, match="float64"):
        h2o_ops.causal_attention(array, array, array)
