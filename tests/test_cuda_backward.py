"""The CUDA backward on the emulator, in both forms: accuracy, sequences, sinks, what a row may not see."""

from __future__ import annotations

import zlib
from typing import Any

import emulated
import pytest
import torch
from accuracy import NAMES, Result, Yardstick, assert_same_bits, assert_within_rule, exact
from cases import SHAPES, Case, case
from test_attention_backward import affected
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
# Multiprocessors of the device: a block owns a group where its groups give each two blocks.
FORMS = {"owner": 1, "apart": 10**6}
GRADIENTS = NAMES[1:]


def run(
    query: Tensor, key: Tensor, value: Tensor, pattern: Any, grad: Tensor, form: str = "apart", **options: Any
) -> Result:
    output, lse = emulated.forward(query, key, value, pattern, **options)
    assert output is not None
    grads = emulated.backward(
        query, key, value, pattern, grad, output, lse, processors=FORMS[form], **options
    )
    return Result(output, *grads, lse)


def check_rule(shape: Case, dtype: torch.dtype, forms: tuple[str, ...] = tuple(FORMS)) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(str(shape).encode()))
    query, key, value, grad = shape.inputs(dtype, generator)
    want = exact(query, key, value, shape.pattern, grad, **shape.options)
    yardstick = Yardstick(query, key, value, shape.pattern, grad, **shape.options)
    for form in forms:
        actual = run(query, key, value, shape.pattern, grad, form, **shape.options)
        assert_within_rule(actual, want, yardstick, where=f"{form} ")


# Groups smaller than a tile of keys are never owned.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_rule(shape: Case, dtype: torch.dtype) -> None:
    check_rule(shape, dtype, tuple(FORMS) if shape.pattern.group_size >= 32 else ("apart",))


LARGER = (
    # Every head size that is instantiated, and one that is padded.
    *(case((1, 4, 2, 150, dim), 64, fraction=0.5) for dim in (32, 64, 88, 96, 128, 192, 256)),
    case((1, 4, 2, 150, 192), 64, fraction=0.5, causal=False),
    case((1, 2, 2, 100, 256), 32, fraction=0.5),
    # A head of keys that is shared by shifted and unshifted heads, alone and beside others.
    case((1, 8, 2, 200, 16), 64, fraction=0.125),
    case((1, 3, 1, 200, 16), 64, fraction=0.5),
    # Both ways; sink queries and none.
    case((2, 2, 1, 300, 32), 100, fraction=0.5, causal=False),
    case((2, 2, 2, 300, 32), 100, sinks=0, fraction=0.5, causal=False),
    # The first and the last shifted group; shifts that are no multiple of a tile.
    *(case((1, 2, 2, n, 16), 100, fraction=0.5, shift=s) for n, s in ((260, 1), (199, 99), (101, 100))),
    # Chunks of queries for the sinks' sums; more sinks than a tile; in the owner form half a group of them.
    case((1, 2, 1, 700, 16), 64, fraction=0.5),
    case((1, 2, 1, 700, 16), 64, sinks=70, fraction=0.5),
    case((1, 2, 1, 1100, 16), 64, sinks=130, fraction=0.5),
    case((1, 2, 1, 600, 16), 200, sinks=100, fraction=0.5),
    # Sinks beyond the first group, whose block has a tile of them that none of its queries sees.
    case((1, 2, 1, 300, 16), 128, sinks=70, fraction=1.0, shift=3),
)


@pytest.mark.parametrize("shape", LARGER, ids=str)
@pytest.mark.race_only
def test_accuracy_rule_in_both_forms(shape: Case) -> None:
    check_rule(shape, torch.bfloat16)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("sinks", (0, 1, 3, 31, 63, 64, 65, 127, 128, 129, 299, 300, 301))
def test_sinks_of_every_size(sinks: int, causal: bool) -> None:
    check_rule(case((1, 2, 1, 300, 16), 128, sinks, 0.5, causal=causal), torch.float16)


def launched(shape: Case, form: str) -> int:
    inputs = shape.inputs(torch.bfloat16, torch.Generator().manual_seed(0))
    emulator = emulated.library()
    run(*inputs[:3], shape.pattern, inputs.grad, form)
    return int(emulator.statistics().launches)


def test_a_block_owns_a_group_where_that_fills_the_device() -> None:
    """Kernels: delta, tiles (one that owns, or one for keys and one for queries, or all three), sinks."""
    plain = case((1, 4, 2, 200, 16), 64, fraction=0.5)
    mixed = case((1, 8, 2, 200, 16), 64, fraction=0.125)
    assert (launched(plain, "owner"), launched(plain, "apart")) == (3, 4)
    assert (launched(mixed, "owner"), launched(mixed, "apart")) == (5, 4)
    for never in (
        case((1, 4, 2, 200, 16), 32),  # smaller than a tile
        case((1, 4, 2, 200, 16), 64, sinks=100),  # more sums of sinks than of dQ
        case((1, 4, 2, 200, 16), 64, causal=False),  # sink queries see the keys of all groups
    ):
        assert launched(never, "owner") == 4, never


# ---- sequences ----


def _sequences() -> list[dict[str, Tensor]]:
    def mask(*rows: str) -> Tensor:
        return torch.tensor([[c == "1" for c in row] for row in rows])

    left, right, holes = "0" * 30 + "1" * 170, "1" * 131 + "0" * 69, "0110" * 50
    ids = torch.cat([torch.arange(n) for n in (1, 90, 3, 106)])
    return [
        {"cu_seqlens": torch.tensor([0, 0, 7, 7, 141, 142, 200, 200], dtype=torch.int32)},
        {"padding_mask": mask(left, right, holes, "0" * 200, "1" * 200)},
        {"position_ids": ids[None]},
        {"position_ids": torch.stack([torch.arange(200), ids // 3])},  # many sequences of one token
    ]


@pytest.mark.parametrize(("form", "causal"), (("owner", True), ("apart", True), ("apart", False)))
@pytest.mark.parametrize("sequences", _sequences(), ids=lambda x: next(iter(x)))
def test_sequences_stay_apart(sequences: dict[str, Any], form: str, causal: bool) -> None:
    tensor = next(iter(sequences.values()))
    batch = tensor.shape[0] if tensor.dim() == 2 else 1
    shape = case((batch, 4, 2, 200, 32), 64, fraction=0.5, causal=causal)
    query, key, value, grad = shape.inputs(torch.bfloat16, torch.Generator().manual_seed(3))
    actual = run(query, key, value, shape.pattern, grad, form, **sequences)
    want = exact(query, key, value, shape.pattern, grad, **sequences)
    assert_within_rule(actual, want, Yardstick(query, key, value, shape.pattern, grad, **sequences))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ("cu_seqlens", "padding_mask", "position_ids"))
def test_sequences_of_several_chunks(kind: str, form: str) -> None:
    """Sums of sinks: chunks of sequences that begin anywhere, one beside the other."""
    starts = torch.tensor([0, 3, 263, 264, 600, 600, 900])
    ids = torch.arange(900) - starts[torch.bucketize(torch.arange(900), starts, right=True) - 1]
    sequences: dict[str, Any] = {
        "cu_seqlens": {"cu_seqlens": starts.int()},
        "padding_mask": {"padding_mask": torch.stack([ids % 7 != 3, torch.arange(900) > 200])},
        "position_ids": {"position_ids": ids[None]},
    }[kind]
    shape = case((2 if kind == "padding_mask" else 1, 2, 1, 900, 16), 130, fraction=0.5)
    query, key, value, grad = shape.inputs(torch.bfloat16, torch.Generator().manual_seed(5))
    actual = run(query, key, value, shape.pattern, grad, form, **sequences)
    want = exact(query, key, value, shape.pattern, grad, **sequences)
    assert_within_rule(actual, want, Yardstick(query, key, value, shape.pattern, grad, **sequences))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_padding_has_an_effect(form: str, torch_rng: torch.Generator) -> None:
    shape = case((2, 4, 2, 200, 16), 64, fraction=0.5)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :30] = False
    mask[1, 40:140:3] = False
    inputs = shape.inputs(torch.float16, torch_rng)
    clean = run(*inputs[:3], shape.pattern, inputs.grad, form, padding_mask=mask)
    padded = ~mask[:, None, :, None]
    dirty = [x.masked_fill(padded, torch.nan) for x in inputs]
    output = clean.output.masked_fill(padded, torch.nan)
    grads = emulated.backward(
        *dirty[:3],
        shape.pattern,
        dirty[3],
        output,
        clean.lse,
        processors=FORMS[form],
        padding_mask=mask,
    )
    for name, grad in zip(GRADIENTS, grads, strict=True):
        assert_same_bits(grad, getattr(clean, name), name)
        assert (grad.masked_select(padded) == 0).all(), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("starts", ([5, -3, 900, 100, 200], [0, 0, 0, 0, 0], [2**31 - 1, -(2**31), 7, 7, 50]))
def test_nonsense_in_cu_seqlens_touches_nothing_outside(starts: list[int], form: str) -> None:
    """The emulator reports accesses outside of the tensors; what the gradients are nobody says."""
    shape = case((1, 4, 2, 200, 16), 64, fraction=0.5)
    query, key, value, grad = shape.inputs(torch.bfloat16, torch.Generator().manual_seed(0))
    run(query, key, value, shape.pattern, grad, form, cu_seqlens=torch.tensor(starts, dtype=torch.int32))


# ---- what may not matter ----


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_in_every_order_of_blocks_and_threads(form: str, torch_rng: torch.Generator) -> None:
    shape = case((1, 4, 2, 300, 32), 64, sinks=20, fraction=0.5)
    inputs = shape.inputs(torch.bfloat16, torch_rng)
    emulator = emulated.library()
    first = None
    try:
        for seed in (1, 2, 77):
            emulator.seed(seed)
            result = run(*inputs[:3], shape.pattern, inputs.grad, form)
            first = first or result
            for name in GRADIENTS:
                assert_same_bits(getattr(result, name), getattr(first, name), f"seed {seed}: {name}")
    finally:
        emulator.seed(1)


@pytest.mark.parametrize("form", FORMS)
def test_views_that_are_not_aligned(form: str, torch_rng: torch.Generator) -> None:
    """Inputs and gradients at odd addresses and strides, the gradient of the output expanded."""
    shape = case((2, 4, 2, 130, 24), 64, fraction=0.5)
    query, key, value, grad = shape.inputs(torch.bfloat16, torch_rng)
    grad = grad[:1].expand(2, -1, -1, -1)
    plain = run(query, key, value, shape.pattern, grad.contiguous(), form)

    def odd(x: Tensor) -> Tensor:
        rows = torch.full((x.shape[0], x.shape[2], x.shape[1], 27), torch.nan, dtype=x.dtype)
        return rows.transpose(1, 2)[..., 1:25]

    views = [odd(x).copy_(x) for x in (query, key, value, plain.output)]
    into = [odd(x) for x in (query, key, value)]
    assert plain.lse is not None
    emulated.backward(
        *views[:3],
        shape.pattern,
        grad,
        views[3],
        plain.lse,
        gradients=into,
        processors=FORMS[form],
    )
    for name, got in zip(GRADIENTS, into, strict=True):
        assert_same_bits(got, getattr(plain, name), name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", (0.0, -0.25, 1e-42, -0.0))
def test_scales(scale: float, form: str, torch_rng: torch.Generator) -> None:
    shape = case((1, 4, 2, 150, 16), 64, fraction=0.5)
    query, key, value, grad = shape.inputs(torch.float16, torch_rng)
    actual = run(query, key, value, shape.pattern, grad, form, scale=scale)
    # The yardstick takes a scale of 0 for none: scaled queries say the same.
    scaled = query * 0 if abs(scale) < 1e-30 else query
    options = {"scale": scale} if scaled is query else {}
    want = exact(scaled, key, value, shape.pattern, grad, **options)
    if scaled is not query:
        assert (actual.grad_query == 0).all() and (actual.grad_key == 0).all()
        want = want._replace(grad_query=actual.grad_query, grad_key=actual.grad_key)
    assert_within_rule(actual, want, Yardstick(scaled, key, value, shape.pattern, grad, **options))


POISONED = (
    case((1, 4, 2, 150, 16), 64, sinks=2),
    case((1, 2, 2, 130, 24), 80, sinks=0, fraction=0.5),
    case((1, 2, 1, 140, 16), 70, sinks=0, fraction=0.5, causal=False),
    case((1, 2, 1, 150, 16), 20, sinks=1, fraction=0.5, causal=False),
    case((1, 2, 1, 150, 8), 120, sinks=1, fraction=0.5),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", POISONED, ids=str)
@pytest.mark.race_only
def test_no_bit_of_a_gradient_leaks(shape: Case, form: str, torch_rng: torch.Generator) -> None:
    inputs = shape.inputs(torch.bfloat16, torch_rng)
    clean = run(*inputs[:3], shape.pattern, inputs.grad, form)
    group = shape.pattern.group_size
    for token in (0, group - 1, group + 1, shape.tokens - 1):
        for place, name in enumerate(inputs._fields):
            changed = [x.clone() for x in inputs]
            head = token % changed[place].shape[1]
            changed[place][:, head, token] = 3e38 if token % 2 else 1e4
            result = run(*changed[:3], shape.pattern, changed[3], form)
            queries, keys = affected(shape, name, head, token)
            where = f"{name} of head {head}, token {token}: "
            assert_same_bits(result.output[0][~queries], clean.output[0][~queries], where + "output")
            for gradient in GRADIENTS:
                rows = queries if gradient == "grad_query" else keys
                got, want = getattr(result, gradient)[0][~rows], getattr(clean, gradient)[0][~rows]
                assert_same_bits(got, want, where + gradient)


@pytest.mark.parametrize("dim", (32, 64, 96, 128, 192, 256))
def test_no_bank_conflicts(dim: int, torch_rng: torch.Generator) -> None:
    shape = case((1, 2, 1, 150, dim), 64, fraction=0.5)
    inputs = shape.inputs(torch.bfloat16, torch_rng)
    for form in FORMS:
        run(*inputs[:3], shape.pattern, inputs.grad, form)
        counts = emulated.library().statistics()
        assert counts.ldmatrix_wavefronts == counts.ldmatrix
        assert counts.copy_wavefronts == counts.copy_ideal
