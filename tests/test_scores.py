"""sinklora.attention_scores: exact column sums, for every kind of array, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_close, assert_same_bits
from producers import Producer
from torch import Tensor

import sinklora
from sinklora import attention_scores, reference, torch_h2o


def make(
    rng: torch.Generator,
    num_queries: int = 19,
    num_keys: int = 19,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    query = torch.randn(batch, heads[0], num_queries, 16, generator=rng)
    key = torch.randn(batch, heads[1], num_keys, 16, generator=rng)
    return query.to(dtype), key.to(dtype)


def assert_scores(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """SPEC's rule: within 2e-5 (1 + A) of float64."""
    scores = attention_scores(query, key, **options)
    assert scores.dtype == torch.float32
    assert_close(scores, reference.attention_scores(query, key, **options), 2e-5, 2e-5)
    return scores


def test_by_hand() -> None:
    """Query 0 sees key 0; queries 1 and 2 of zeros share their attention equally."""
    query = torch.zeros(1, 2, 3, 8)
    scores = attention_scores(query, query[:, :1])
    assert_close(scores, [[[2 * (1 + 1 / 2 + 1 / 3), 2 * (1 / 2 + 1 / 3), 2 / 3]]], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(torch_rng: torch.Generator, cpu_level: str, dtype: torch.dtype) -> None:
    query, key = make(torch_rng, 150, 150, dtype=dtype)
    padding = torch.rand(2, 150, generator=torch_rng) > 0.3
    options: list[dict[str, Any]] = [
        {},
        {"scale": 0.9},
        {"score_window": 7},
        {"padding_mask": padding},
        {"padding_mask": padding, "score_window": 7, "group_reduction": "mean"},
    ]
    for option in options:
        assert_scores(query, key, **option)
        assert_scores(query[:, :, -70:], key, **option)
        assert_scores(query[:, :, -3:], key, **option)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_grouped_queries(torch_rng: torch.Generator, group: int) -> None:
    query, key = make(torch_rng, heads=(2 * group, 2))
    summed = assert_scores(query, key)
    assert_same_bits(assert_scores(query, key, group_reduction="mean"), summed / group)
    # All that every query gives away arrives somewhere.
    assert_close(summed.sum(-1), torch.full((2, 2), group * 19.0), 1e-4)


def test_the_lse_may_be_given(torch_rng: torch.Generator) -> None:
    query, key = make(torch_rng)
    mask = torch.rand(2, 19, generator=torch_rng) > 0.3
    _, lse = torch_h2o.causal_attention(query, key, key, padding_mask=mask)
    scores = assert_scores(query, key, lse=lse, padding_mask=mask)
    assert_close(attention_scores(query, key, padding_mask=mask), scores, 1e-5)
    strided = torch.stack([lse, lse], -1)[..., 0]
    assert_same_bits(attention_scores(query, key, strided, padding_mask=mask), scores)
    # It is used: another one gives other scores.
    assert_close(attention_scores(query, key, lse + 1, padding_mask=mask), scores / np.e, 1e-4)


def test_padding_has_no_effect(torch_rng: torch.Generator) -> None:
    query, key = make(torch_rng)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :5] = mask[1, 12:] = False
    scores = attention_scores(query, key, padding_mask=mask)
    for tensor in (query, key):
        tensor.transpose(1, 2)[~mask] = float("nan")
    assert_same_bits(attention_scores(query, key, padding_mask=mask), scores)
    assert (scores.transpose(1, 2)[~mask] == 0).all()
    alone = attention_scores(query[:1, :, 5:], key[:1, :, 5:])
    assert_same_bits(scores[:1, :, 5:], alone)
    nothing = attention_scores(query, key, padding_mask=torch.zeros(2, 19, dtype=torch.bool))
    assert (nothing == 0).all()


def test_the_window_counts_kept_queries(torch_rng: torch.Generator) -> None:
    query, key = make(torch_rng)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[:, 16:] = False
    scores = assert_scores(query, key, padding_mask=mask, score_window=2)
    assert_close(scores.sum(-1), torch.full((2, 2), 4.0), 1e-5)
    for window in (19, 10**9):
        assert_same_bits(attention_scores(query, key, score_window=window), attention_scores(query, key))


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(0, 5, 5), (1, 0, 0), (2, 0, 3), (1, 1, 1), (1, 1, 9)]
)
def test_empty_and_single(torch_rng: torch.Generator, batch: int, queries: int, keys: int) -> None:
    query, key = make(torch_rng, queries, keys, batch=batch)
    assert assert_scores(query, key).shape == (batch, 2, keys)


def test_threads_do_not_change_bits(torch_rng: torch.Generator) -> None:
    query, key = make(torch_rng, 200, 260)
    try:
        results = []
        for threads in (1, 2, 3):
            sinklora.set_num_threads(threads)
            results.append(attention_scores(query, key))
    finally:
        sinklora.set_num_threads(None)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_strided_views_are_read(torch_rng: torch.Generator) -> None:
    query, key = make(torch_rng)
    expected = attention_scores(query, key)
    by_rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert_same_bits(attention_scores(*by_rows), expected)
    by_columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key)]
    assert by_columns[0].stride(-1) != 1
    assert_same_bits(attention_scores(*by_columns), expected)
    numpy = attention_scores(*(x.numpy() for x in by_columns))
    assert_same_bits(torch.from_numpy(numpy), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numpy_and_dlpack_equal_torch(torch_rng: torch.Generator, dtype: torch.dtype) -> None:
    query, key = make(torch_rng, 9, 19, dtype=dtype)
    mask = torch.rand(2, 19, generator=torch_rng) > 0.3
    lse = torch.randn(2, 4, 9, generator=torch_rng) + 5
    options: list[dict[str, Any]] = [
        {"padding_mask": mask.numpy(), "score_window": 3},
        {"lse": lse.numpy(), "scale": 0.5, "group_reduction": "mean"},
    ]
    for option in options:
        as_torch = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in option.items()}
        expected = attention_scores(query, key, **as_torch)
        arrays = [query.numpy(), key.numpy()]
        for given in (arrays, [Producer(x) for x in arrays], [Producer(x, legacy=True) for x in arrays]):
            scores = attention_scores(*given, **option)
            assert isinstance(scores, np.ndarray)
            assert_same_bits(torch.from_numpy(scores), expected)


def test_scores_are_detached(torch_rng: torch.Generator) -> None:
    query, key = (x.requires_grad_() for x in make(torch_rng))
    assert not attention_scores(query, key).requires_grad
    with torch.inference_mode():
        assert attention_scores(query, key).is_inference()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(torch_rng: torch.Generator, dynamic: bool) -> None:
    torch._dynamo.reset()
    query, key = make(torch_rng, 9, 19)
    function = lambda q, k: attention_scores(q * 2, k, score_window=4) + 1  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for needs in (False, True):
        assert_same_bits(compiled(query.requires_grad_(needs), key), function(query, key))


def good(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "query": rng.standard_normal((2, 4, 5, 16), dtype=np.float32),
        "key": rng.standard_normal((2, 2, 7, 16), dtype=np.float32),
    }


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": np.zeros((2, 4, 5), np.float32)}, ValueError, "query: expected 4 dimensions"),
    ({"key": np.zeros((2, 7, 16), np.float32)}, ValueError, "key: expected 4 dimensions"),
    ({"key": np.zeros((2, 3, 7, 16), np.float32)}, ValueError, "key: "),
    ({"key": np.zeros((1, 2, 7, 16), np.float32)}, ValueError, "key: "),
    ({"key": np.zeros((2, 2, 4, 16), np.float32)}, ValueError, "key: "),
    ({"key": np.zeros((2, 2, 7, 24), np.float32)}, ValueError, "key: "),
    ({"key": np.zeros((2, 2, 7, 16), np.float16)}, TypeError, "key: "),
    ({"query": np.zeros((2, 4, 5, 16))}, TypeError, "query: .*float64"),
    ({"lse": np.zeros((2, 4, 7), np.float32)}, ValueError, "lse: "),
    ({"lse": np.zeros((2, 4, 5), np.float64)}, TypeError, "lse: "),
    ({"lse": np.zeros((2, 4, 5, 1), np.float32)}, ValueError, "lse: "),
    ({"padding_mask": np.ones((2, 5), bool)}, ValueError, "padding_mask: "),
    ({"padding_mask": np.ones((2, 7), np.int64)}, TypeError, "padding_mask: "),
    (
        {"score_window": 0},
        ValueError,
        "score_window: expected an integer >= 1, or None for all queries, got 0",
    ),
    ({"score_window": -3}, ValueError, "score_window: expected"),
    ({"score_window": 2**63}, ValueError, "score_window: expected"),
    ({"score_window": 1.5}, TypeError, "score_window: expected an integer"),
    ({"score_window": True}, TypeError, "score_window: expected an integer"),
    ({"group_reduction": "max"}, ValueError, 'group_reduction: expected "sum" or "mean", got \'max\''),
    ({"group_reduction": None}, ValueError, "group_reduction: expected"),
    ({"scale": "1"}, TypeError, "scale: expected a number"),
    ({"scale": float("nan")}, ValueError, "scale: "),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_refuses(
    rng: np.random.Generator, change: dict[str, Any], error: type[Exception], message: str, kind: str
) -> None:
    given = good(rng) | change
    if kind == "torch":
        given = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    with pytest.raises(error, match=message):
        attention_scores(given.pop("query"), given.pop("key"), **given)


def test_refuses_other_and_mixed_kinds(rng: np.random.Generator) -> None:
    query, key = good(rng).values()
    tensor = torch.from_numpy(query)
    with pytest.raises(TypeError, match="key: expected a NumPy array, as query is"):
        attention_scores(query, torch.from_numpy(key))
    with pytest.raises(TypeError, match="key: expected a torch tensor, got <class 'numpy"):
        attention_scores(tensor, key)
    with pytest.raises(TypeError, match="lse: expected a torch tensor"):
        attention_scores(tensor, torch.from_numpy(key), np.zeros((2, 4, 5), np.float32))
    with pytest.raises(TypeError, match="query: expected a torch tensor, a NumPy array or"):
        attention_scores([1.0], key)
    with pytest.raises((ValueError, NotImplementedError), match="key: "):
        attention_scores(tensor.to("meta"), torch.from_numpy(key))
