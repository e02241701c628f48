"""One step and one selection by hand, for torch and NumPy, and what they refuse without a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_close, assert_same_bits
from simulation_support import BUDGET, RECENT, SEEN, USED, assert_unchanged, cache, copies, make

from sinklora import h2o_ops, torch_h2o

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
    ("query", lambda x: x.numpy(), TypeError),
    ("query", lambda x: None, TypeError),
    ("new_key", lambda x: x.half(), TypeError),
    ("new_key", lambda x: x.tolist(), TypeError),
    ("new_key", lambda x: x[:1], ValueError),
    ("new_value", lambda x: x[..., :8], ValueError),
    ("new_value", lambda x: None, TypeError),
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
    ("num_sinks", lambda x: 2**63, ValueError),
    ("num_sinks", lambda x: 1.5, TypeError),
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
    arrays = {name: x.numpy() for name, x in buffers.items()}
    for bad, error in ((-1, ValueError), (2**63, ValueError), (5.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match="capacity"):
            torch_h2o.h2o_select(**buffers, num_sinks=0, capacity=bad)  # type: ignore[arg-type]
        with pytest.raises(error, match="capacity"):
            h2o_ops.select(**arrays, num_sinks=0, capacity=bad)  # type: ignore[arg-type]
        with pytest.raises(error, match="num_sinks"):
            torch_h2o.h2o_select(**buffers, num_sinks=bad, capacity=5)  # type: ignore[arg-type]
    assert_unchanged(buffers, before)


def test_numpy_refuses(rng: np.random.Generator) -> None:
    array = rng.standard_normal((1, 2, 4, 16))
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        h2o_ops.causal_attention(array[0], array, array)
    with pytest.raises(TypeError, match="float64"):
        h2o_ops.causal_attention(array, array, array)
