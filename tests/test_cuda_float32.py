"""The float32 CUDA kernels on the emulator: accuracy, sequences, what a row may not see, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from accuracy import NAMES, Result, Yardstick, assert_close, assert_same_bits, assert_within_rule, exact
from cases import SHAPES, Case, Inputs, case
from test_attention_backward import POISONED, affected
from test_attention_forward import LAYOUTS
from test_causal_forward import causal, dense, inputs, random_mask
from test_cuda_h2o_score import SIZES
from test_h2o_score import assert_accurate, naive
from torch import Tensor

from sinklora import SFPattern

F32 = torch.float32


def compute(given: Inputs, pattern: SFPattern, **options: Any) -> Result:
    query, key, value, grad = given
    output, lse = emulated.forward(query, key, value, pattern, **options)
    assert output is not None
    gradients = emulated.backward(query, key, value, pattern, grad, output, lse, **options)
    return Result(output, *gradients, lse)


def assert_rule(actual: Result, given: Inputs, pattern: SFPattern, **options: Any) -> None:
    arguments = (given.query, given.key, given.value, pattern, given.grad)
    assert_within_rule(actual, exact(*arguments, **options), Yardstick(*arguments, **options))


def assert_equal(actual: Result, expected: Result, where: str = "") -> None:
    for name in (*NAMES, "lse"):
        assert_same_bits(getattr(actual, name), getattr(expected, name), where + name)


# A tile of keys that ends one after the first query: all but one pair of them is seen.
EDGE = case((1, 2, 1, 200, 16), 190, sinks=0, fraction=0.5, shift=2)


@pytest.mark.parametrize("shape", (*SHAPES, EDGE), ids=str)
def test_shapes_keep_the_accuracy_rule(shape: Case, torch_rng: torch.Generator) -> None:
    given = shape.inputs(F32, torch_rng)
    assert_rule(compute(given, shape.pattern, **shape.options), given, shape.pattern, **shape.options)


LONG = (
    case((1, 2, 1, 1100, 8), 100, fraction=0.5),
    case((1, 2, 2, 1100, 8), 40, sinks=1, fraction=0.5, causal=False),
    case((2, 1, 1, 1100, 8), 2000, sinks=64),
)


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.race_only
def test_gradients_of_sinks_that_many_queries_see(shape: Case, torch_rng: torch.Generator) -> None:
    """Their sums are cut into windows of queries."""
    given = shape.inputs(F32, torch_rng)
    assert_rule(compute(given, shape.pattern), given, shape.pattern)


def test_a_negative_scale_and_none_at_all(torch_rng: torch.Generator) -> None:
    shape = case((1, 4, 2, 70, 24), 20)
    given = shape.inputs(F32, torch_rng)
    assert_rule(compute(given, shape.pattern, scale=-3.0), given, shape.pattern, scale=-3.0)
    got = compute(given, shape.pattern, scale=0.0)
    want = exact(given.query, given.key, given.value, shape.pattern, given.grad, scale=0.0)
    for name in (*NAMES, "lse"):
        assert_close(getattr(got, name), getattr(want, name), 1e-5, 2e-5, name)


# ---- sequences ----


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def rows(*texts: str) -> Tensor:
    return torch.tensor([[c == "1" for c in text] for text in texts])


def packed(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


# Of the long ones some have several windows, and meet in one.
MANY = (8, 700, 520, 30, 0, 600)
SEQUENCES: dict[str, tuple[dict[str, Tensor], list[list[Tensor]]]] = {
    "packed": (
        {"cu_seqlens": offsets(0, 7, 0, 64, 1, 28, 0)},
        [list(torch.arange(100).split([7, 64, 1, 28]))],
    ),
    "long": ({"cu_seqlens": offsets(*MANY)}, [list(torch.arange(1858).split([8, 700, 520, 30, 600]))]),
    "padded": (
        {"padding_mask": (mask := rows("0" * 30 + "1" * 70, "1" * 61 + "0" * 39, "0110" * 25, "0" * 100))},
        [[row.nonzero()[:, 0]] for row in mask],
    ),
    "holes": ({"padding_mask": rows("10" * 550)}, [[torch.arange(0, 1100, 2)]]),
    "positions": (
        {"position_ids": torch.stack([packed(1, 40, 3, 56), packed(100)])},
        [list(torch.arange(100).split([1, 40, 3, 56])), [torch.arange(100)]],
    ),
}
PATTERNS = {"causal": SFPattern(24, 4, 0.5), "both ways": SFPattern(30, 2, 0.5, causal=False)}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(("options", "places"), SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.race_only
def test_sequences_equal_each_alone(
    options: dict[str, Tensor], places: list[list[Tensor]], pattern: SFPattern, torch_rng: torch.Generator
) -> None:
    tokens = 1 + max((int(x.max()) for row in places for x in row if len(x)), default=0)
    tensor = next(iter(options.values()))
    tokens = tensor.shape[1] if "padding_mask" in options else tokens
    shape = case((len(places), 2, 1, tokens, 8), 1)
    given = shape.inputs(F32, torch_rng)
    if "padding_mask" in options:  # what stands there has no effect
        for x in given:
            x.masked_fill_(~tensor[:, None, :, None], torch.nan)
    whole = compute(given, pattern, **options)
    for b, row in enumerate(places):
        for at in row:
            alone = Inputs(*(x[b : b + 1, :, at] for x in given))
            part = Result(*(None if x is None else x[b : b + 1, ..., at, :] for x in whole[:-1]), None)
            part = part._replace(lse=whole.lse[b : b + 1, :, at])  # type: ignore[index]
            assert_equal(part, compute(alone, pattern), f"row {b}, token {at[:1].tolist()}: ")
            if len(at):
                assert_rule(part, alone, pattern)
    if "padding_mask" in options:
        padding = ~tensor[:, None, :].expand(-1, 2, -1)
        assert whole.lse is not None and whole.lse[padding].eq(-torch.inf).all()
        assert not whole.output[padding].any() and not whole.grad_query[padding].any()
        assert not whole.grad_key[padding[:, :1]].any() and not whole.grad_value[padding[:, :1]].any()


# ---- the poison oracle ----


@pytest.mark.parametrize("shape", POISONED, ids=str)
@pytest.mark.race_only
def test_no_bit_leaks_from_what_a_row_may_not_see(shape: Case, torch_rng: torch.Generator) -> None:
    given = shape.inputs(F32, torch_rng)
    clean = compute(given, shape.pattern)
    group = shape.pattern.group_size
    for token in (0, group - 1, group + 1, shape.tokens - 1):
        for place, name in enumerate(given._fields):
            for poison in (1e4, 3e38):
                changed = [x.clone() for x in given]
                head = token % changed[place].shape[1]
                changed[place][:, head, token] = poison
                result = compute(Inputs(*changed), shape.pattern)
                queries, keys = affected(shape, name, head, token)
                where = f"{name} of head {head}, token {token} = {poison:g}: "
                for what, touched in zip(NAMES, (queries, queries, keys, keys), strict=True):
                    kept, before = (getattr(r, what)[0][~touched] for r in (result, clean))
                    assert_same_bits(kept, before, where + what)


# ---- the same numbers elsewhere in memory, and any order of threads ----


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda f: f.__name__)
def test_layouts(layout: Callable[[Tensor], Tensor], torch_rng: torch.Generator) -> None:
    shape = case((2, 4, 2, 65, 24), 20)
    given = shape.inputs(F32, torch_rng)
    want = compute(given, shape.pattern)
    views = Inputs(*map(layout, given))
    assert_equal(compute(views, shape.pattern), want)
    arguments = (*views[:3], shape.pattern, views.grad, layout(want.output), want.lse)
    gradients = tuple(layout(torch.full_like(x, torch.nan)) for x in given[:3])
    emulated.backward(*arguments, gradients=gradients)
    assert_equal(Result(want.output, *gradients, want.lse), want)


@pytest.mark.race_only
def test_every_order_of_threads_gives_the_same_bits(torch_rng: torch.Generator) -> None:
    shape = case((1, 4, 2, 600, 16), 100, sinks=2)
    given = shape.inputs(F32, torch_rng)
    want = compute(given, shape.pattern)
    want_scores = emulated.score(given.query, given.key, causal(given.query, given.key, None)[1])
    try:
        for seed in (2, 3, 4):
            emulated.seed(seed)
            assert_equal(compute(given, shape.pattern), want, f"seed {seed}: ")
            scores = emulated.score(given.query, given.key, causal(given.query, given.key, None)[1])
            assert_same_bits(scores, want_scores, f"seed {seed}: scores")
    finally:
        emulated.seed(1)


@pytest.mark.parametrize("dim", (32, 64, 96, 128, 192, 256))
def test_shared_memory_has_no_bank_conflicts(dim: int, torch_rng: torch.Generator) -> None:
    shape = case((1, 2, 1, 130, dim), 100, sinks=2, fraction=0.5)
    given = shape.inputs(F32, torch_rng)
    query, key, value, grad = given
    output, lse = emulated.forward(query, key, value, shape.pattern)
    assert output is not None and not emulated.library().conflicts()
    emulated.backward(query, key, value, shape.pattern, grad, output, lse)
    assert not emulated.library().conflicts()
    emulated.score(query, key, lse)
    assert not emulated.library().conflicts()


# ---- keys before the first query ----


@pytest.mark.parametrize("kind", ("none", "left", "right", "holes"))
@pytest.mark.parametrize(
    "size", ((2, 4, 2, 33, 130, 16), (1, 2, 1, 70, 200, 40), (1, 2, 2, 1, 65, 8)), ids=str
)
def test_past_keys(size: tuple[int, ...], kind: str, torch_rng: torch.Generator) -> None:
    query, key, value = inputs(size, F32, torch_rng)
    mask = random_mask(size[0], size[4], kind, torch_rng)
    want, want_lse = dense(query, key, value, mask)
    pattern = SFPattern(size[4], 0, 0.0)
    output, lse = emulated.forward(query, key, value, pattern, padding_mask=mask)
    assert_close(output, want, 1e-5, 1e-5, "output")
    assert_close(lse, want_lse, 2e-5, 2e-5, "lse")
    assert_same_bits(emulated.forward(query, key, None, pattern, padding_mask=mask)[1], lse, "lse alone")


# ---- scores of a prompt ----


@pytest.mark.parametrize("kind", ("none", "left", "holes"))
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_scores_match_the_definition(size: tuple[int, ...], kind: str, torch_rng: torch.Generator) -> None:
    query, key, _ = inputs(size, F32, torch_rng)
    mask = random_mask(size[0], size[4], kind, torch_rng)
    lse = causal(query, key, None, mask)[1]
    for window in (0, 1, 40, 10**9):
        want = naive(query, key, mask, window)
        got = emulated.score(query, key, lse, mask, window=window)
        assert_accurate(got, want, f"window {window}: ")
        mean = emulated.score(query, key, lse, mask, window=window, mean=True)
        assert_accurate(mean, want / (size[1] // size[2]), f"window {window}, mean: ")


def test_scores_in_parts_and_chunks_see_nothing_else(torch_rng: torch.Generator) -> None:
    query, key, _ = inputs((2, 2, 1, 1100, 1100, 8), F32, torch_rng)
    lse = causal(query, key, None)[1]
    got = emulated.score(query, key, lse)
    assert_accurate(got, naive(query, key, None))
    assert_same_bits(emulated.score(query[1:], key[1:], lse[1:]), got[1:])
    key[:, :, 700:] = torch.nan
    lse[:, :, 700:] = torch.nan
    alone = emulated.score(query[:, :, :700], key[:, :, :700], lse[:, :, :700].contiguous())
    mask = torch.zeros(2, 1100, dtype=torch.bool)
    mask[:, :700] = True
    assert_same_bits(emulated.score(query, key, lse, mask)[:, :, :700], alone)
