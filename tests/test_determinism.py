"""The same inputs give the same bits: every run, every number of threads, every batch around a row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import NAMES, Result, assert_same_bits, kernel
from cases import DTYPES, Case, case

import sinklora

SHAPES = (
    case((2, 4, 2, 130, 32), 32),
    case((1, 4, 1, 257, 16), 64, sinks=70, fraction=0.5),
    case((1, 2, 2, 129, 16), 1000, sinks=1, causal=False),
    case((1, 1, 1, 600, 8), 500, sinks=3, fraction=1.0),
)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    yield
    sinklora.set_num_threads(None)


def assert_same(got: Result, want: Result, where: str) -> None:
    for name in (*NAMES, "lse"):
        assert_same_bits(getattr(got, name), getattr(want, name), f"{where}: {name}")


@every_shape
@every_dtype
def test_threads_and_runs(
    shape: Case, dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    query, key, value, grad = shape.inputs(dtype, torch_rng)
    sinklora.set_num_threads(1)
    want = kernel(query, key, value, shape.pattern, grad)
    for threads in (1, 2, 3, 5, 2):
        sinklora.set_num_threads(threads)
        assert_same(kernel(query, key, value, shape.pattern, grad), want, f"{threads} threads")


@every_dtype
def test_a_batch_row_equals_itself_alone(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    shape = case((3, 4, 2, 77, 24), 20, sinks=5)
    query, key, value, grad = shape.inputs(dtype, torch_rng)
    together = kernel(query, key, value, shape.pattern, grad)
    for row in range(shape.batch):
        only = slice(row, row + 1)
        alone = kernel(query[only], key[only], value[only], shape.pattern, grad[only])
        assert_same(Result(*(x[only] for x in together)), alone, f"row {row}")


@every_dtype
def test_a_key_head_equals_itself_alone(
    dtype: torch.dtype, cpu_level: str, torch_rng: torch.Generator
) -> None:
    shape = case((1, 6, 3, 77, 16), 20, fraction=0.0)
    query, key, value, grad = shape.inputs(dtype, torch_rng)
    together = kernel(query, key, value, shape.pattern, grad)
    for head in range(shape.kv_heads):
        q, k = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        alone = kernel(query[:, q], key[:, k], value[:, k], shape.pattern, grad[:, q])
        for name in (*NAMES, "lse"):
            heads = k if name in ("grad_key", "grad_value") else q
            assert_same_bits(getattr(together, name)[:, heads], getattr(alone, name), f"head {head}: {name}")


def test_later_tokens_change_no_bit_of_earlier_rows(cpu_level: str, torch_rng: torch.Generator) -> None:
    """Causality as a language model sees it: a prefix's output does not depend on what follows."""
    shape = case((1, 4, 2, 130, 16), 32)
    query, key, value, _ = shape.inputs(torch.float32, torch_rng)
    whole = sinklora.sf_attention(query, key, value, shape.pattern)
    for tokens in (1, 31, 32, 33, 64, 100):
        prefix = sinklora.sf_attention(
            query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens], shape.pattern
        )
        assert_same_bits(prefix, whole[:, :, :tokens], f"{tokens} tokens")
