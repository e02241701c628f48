"""The CUDA forward on the emulator: accuracy, sequences, what a row may not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from accuracy import assert_close, assert_same_bits, exact, plain
from cases import SHAPES, Case, case
from test_causal_forward import dense, random_mask

from sinklora import SFPattern, torch_ops

DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_the_definition(shape: Case, dtype: torch.dtype, torch_rng: torch.Generator) -> None:
    query, key, value, grad = shape.inputs(dtype, torch_rng)
    output, lse = emulated.forward(query, key, value, shape.pattern, **shape.options)
    want = exact(query, key, value, shape.pattern, grad, **shape.options)
    assert output is not None
    assert_close(output, want.output, 2e-2 if dtype == torch.bfloat16 else 3e-3, name="output")
    assert_close(lse, want.lse, 2e-5, 2e-5, name="lse")


def _sequences() -> list[dict[str, torch.Tensor]]:
    def mask(*rows: str) -> torch.Tensor:
        return torch.tensor([[c == "1" for c in row] for row in rows])

    left, right, holes = "0" * 30 + "1" * 70, "1" * 61 + "0" * 39, "0110" * 25
    ids = torch.cat([torch.arange(n) for n in (1, 40, 3, 56)])
    return [
        {"cu_seqlens": torch.tensor([0, 0, 7, 7, 71, 72, 100, 100], dtype=torch.int32)},
        {"padding_mask": mask(left, right, holes, "0" * 100, "1" * 100)},
        {"position_ids": ids[None]},
        {"position_ids": torch.stack([ids, torch.arange(100), torch.zeros(100, dtype=torch.int64)])},
    ]


@pytest.mark.parametrize("sequences", _sequences(), ids=lambda x: next(iter(x)))
def test_forward_keeps_sequences_apart(sequences: dict[str, Any], torch_rng: torch.Generator) -> None:
    tensor = next(iter(sequences.values()))
    batch = tensor.shape[0] if tensor.dim() == 2 else 1
    shape = case((batch, 4, 2, 100, 32), 24)
    query, key, value, _ = shape.inputs(torch.bfloat16, torch_rng)
    output, lse = emulated.forward(query, key, value, shape.pattern, **sequences)
    want, want_lse = torch_ops.sf_attention(
        query.float(), key.float(), value.float(), shape.pattern, **sequences
    )
    assert output is not None
    assert_close(output, want, 2e-2, name="output")
    assert_close(lse, want_lse, 2e-5, 2e-5, name="lse")


# ---- the rule, over many tiles ----

# Steady tiles of every kind: causal, past the sinks, in the sinks, seen both ways; and of every head size.
LONG = (
    case((1, 2, 1, 700, 64), 1000, sinks=3, fraction=0.0),
    case((1, 2, 2, 700, 128), 450, sinks=4, fraction=0.5),
    case((1, 1, 1, 600, 32), 70, sinks=400, fraction=0.0),
    case((1, 2, 1, 500, 96), 300, fraction=0.5, causal=False),
    case((1, 1, 1, 400, 192), 400),
    case((1, 1, 1, 330, 256), 250, sinks=70),
    case((1, 1, 1, 400, 72), 300),
)


def assert_forward_within_rule(
    output: torch.Tensor | None, lse: torch.Tensor, inputs: Any, pattern: SFPattern, **options: Any
) -> None:
    query, key, value, grad = inputs
    want = exact(query, key, value, pattern, grad, **options)
    error = (plain(query, key, value, pattern, grad, **options).output.double() - want.output).abs().max()
    assert output is not None
    assert_close(output, want.output, 2 * float(error) + 1e-5 * max(1, query.shape[-1] / 128), name="output")
    assert_close(lse, want.lse, 2e-5, 2e-5, name="lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_many_tiles_are_within_the_rule(shape: Case, dtype: torch.dtype, torch_rng: torch.Generator) -> None:
    inputs = shape.inputs(dtype, torch_rng)
    output, lse = emulated.forward(*inputs[:3], shape.pattern, **shape.options)
    assert_forward_within_rule(output, lse, inputs, shape.pattern, **shape.options)


@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grow", [1.0, -1.0], ids=["growing", "shrinking"])
def test_scores_that_outgrow_their_maximum(
    grow: float, dtype: torch.dtype, scale: float | None, torch_rng: torch.Generator
) -> None:
    """Some rows' scores reach hundreds, tile by tile: their tiles are computed again, the others' are not."""
    shape = case((1, 2, 1, 640, 64), 1000)
    query, key, value, grad = shape.inputs(torch.float32, torch_rng)
    ramp = torch.linspace(0, 1, 640) if grow > 0 else torch.linspace(1, 0, 640)
    key = key * 0.2 + ramp[:, None] * torch.sign(torch.randn(64, generator=torch_rng))
    query[:, :, ::3] = 3 * torch.sign(key[0, 0, -1])
    inputs = [x.to(dtype) for x in (query, key, value, grad)]
    output, lse = emulated.forward(*inputs[:3], shape.pattern, scale=scale)
    assert_forward_within_rule(
        output, lse, inputs, shape.pattern, **({} if scale is None else {"scale": scale})
    )


# ---- what a row may not see, bit for bit ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.race_only
def test_a_row_sees_nothing_else(causal: bool, torch_rng: torch.Generator) -> None:
    """1e4 in a key, a value or a query changes no bit of the rows that may not see it."""
    shape = case((1, 2, 1, 400, 64), 330, sinks=5, fraction=0.5, causal=causal)
    query, key, value, _ = shape.inputs(torch.float16, torch_rng)
    output, lse = emulated.forward(query, key, value, shape.pattern)
    allowed = torch.from_numpy(shape.pattern.mask(2, 400))
    for at in (2, 70, 130, 257, 399):
        for name in ("key", "value", "query"):
            poisoned = {"query": query.clone(), "key": key.clone(), "value": value.clone()}
            poisoned[name][:, :, at] = 1e4
            got, got_lse = emulated.forward(**poisoned, pattern=shape.pattern)
            blind = ~allowed[:, :, at] if name != "query" else (torch.arange(400) != at).expand(2, -1)
            assert output is not None and got is not None
            assert_same_bits(got[0][blind], output[0][blind], f"{name} {at}: output")
            assert_same_bits(got_lse[0][blind], lse[0][blind], f"{name} {at}: lse")
            assert not torch.equal(got[0][~blind], output[0][~blind])


@pytest.mark.parametrize("sequences", _sequences()[:3], ids=lambda x: next(iter(x)))
def test_other_sequences_and_padding_may_be_anything(
    sequences: dict[str, Any], torch_rng: torch.Generator
) -> None:
    kind, tensor = next(iter(sequences.items()))
    batch = tensor.shape[0] if kind == "padding_mask" else 1
    shape = case((batch, 2, 1, 100, 32), 24)
    query, key, value, _ = shape.inputs(torch.bfloat16, torch_rng)
    output, lse = emulated.forward(query, key, value, shape.pattern, **sequences)
    if kind == "padding_mask":
        gone = ~tensor[:, None, :, None]
    else:  # the longest sequence
        start, end = (7, 71) if kind == "cu_seqlens" else (44, 100)
        gone = torch.ones(1, 1, 100, 1, dtype=torch.bool)
        gone[:, :, start:end] = False
    spoilt = [x.masked_fill(gone, torch.nan) for x in (query, key, value)]
    got, got_lse = emulated.forward(*spoilt, shape.pattern, **sequences)
    assert output is not None and got is not None
    kept = ~gone[..., 0].expand(-1, 2, -1)
    assert_same_bits(got[kept], output[kept])
    assert_same_bits(got_lse[kept], lse[kept])
    if kind == "padding_mask":
        assert torch.equal(got[~kept], torch.zeros_like(got[~kept]))
        assert got_lse[~kept].eq(-torch.inf).all()


@pytest.mark.parametrize("start", ["past the end", "negative", "falling"])
def test_nonsense_in_cu_seqlens_stays_inside(start: str, torch_rng: torch.Generator) -> None:
    """The results say nothing, but no access leaves the tensors (their guards would report it)."""
    shape = case((1, 2, 1, 70, 32), 24)
    query, key, value, _ = shape.inputs(torch.bfloat16, torch_rng)
    values = {"past the end": [0, 9, 2**30], "negative": [-5, -7, 70], "falling": [0, 60, 20, 70]}[start]
    emulated.forward(query, key, value, shape.pattern, cu_seqlens=torch.tensor(values, dtype=torch.int32))


# ---- past keys, lse alone, views ----


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("sizes", [(1, 9), (33, 130), (140, 449), (5, 700)], ids=str)
def test_queries_after_past_keys(sizes: tuple[int, int], padding: str, torch_rng: torch.Generator) -> None:
    queries, keys = sizes
    query, key, value = (
        torch.randn(2, h, n, 64, generator=torch_rng).to(torch.bfloat16)
        for h, n in ((4, queries), (2, keys), (2, keys))
    )
    mask = random_mask(2, keys, padding, torch_rng)
    want, want_lse = dense(query, key, value, mask)
    options = {} if mask is None else {"padding_mask": mask}
    pattern = SFPattern(2**40, num_sink_tokens=0)
    output, lse = emulated.forward(query, key, value, pattern, **options)
    assert output is not None
    assert_close(output, want, 2e-2, 2e-2, name="output")
    assert_close(lse, want_lse, 2e-5, 2e-5, name="lse")
    nothing, alone = emulated.forward(query, key, None, pattern, **options)
    assert nothing is None
    assert_close(alone, want_lse, 2e-5, 2e-5, name="lse alone")


def test_views_of_any_stride_and_alignment(torch_rng: torch.Generator) -> None:
    shape = case((2, 4, 2, 150, 40), 64)
    inputs = shape.inputs(torch.float16, torch_rng)[:3]
    output, lse = emulated.forward(*inputs, shape.pattern)
    odd, gaps, turned = [], [], []
    for x in inputs:
        room = torch.full((*x.shape[:3], 43), torch.nan, dtype=x.dtype)
        room[..., 1:41] = x
        odd.append(room[..., 1:41])
        wide = torch.full((*x.shape[:2], 2 * x.shape[2], 48), torch.nan, dtype=x.dtype)
        wide[:, :, ::2, :40] = x
        gaps.append(wide[:, :, ::2, :40])
        turned.append(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert output is not None
    for views in (odd, gaps, turned):
        got, got_lse = emulated.forward(*views, shape.pattern)
        assert got is not None
        assert_same_bits(got, output)
        assert_same_bits(got_lse, lse)


@pytest.mark.race_only
def test_strides_beyond_32_bits(tmp_path: Path, torch_rng: torch.Generator) -> None:
    """Two tokens in a sparse file, 2**31 elements apart; then two heads."""
    query, key, value = (torch.randn(1, 2, 2, 16, generator=torch_rng).half() for _ in range(3))
    pattern = SFPattern(2, num_sink_tokens=1)
    output, lse = emulated.forward(query, key, value, pattern)
    far = 2**31
    size = 2 * far + 2**16
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(size)
    memory = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.float16)
    for strides in ((2 * far, 1024, far + 8, 1), (2 * far, far, 1024, 1)):
        spread = memory.as_strided(key.shape, strides)
        spread.copy_(key)
        got, got_lse = emulated.forward(query, spread, value, pattern)
        assert output is not None and got is not None
        assert_same_bits(got, output)
        assert_same_bits(got_lse, lse)


@pytest.mark.parametrize("shape", LONG[:2], ids=str)
def test_the_order_of_blocks_and_threads_changes_no_bit(shape: Case, torch_rng: torch.Generator) -> None:
    query, key, value, _ = shape.inputs(torch.bfloat16, torch_rng)
    results = []
    for number in (1, 2, 77):
        emulated.seed(number)
        results.append(emulated.forward(query, key, value, shape.pattern))
    for output, lse in results[1:]:
        assert output is not None and results[0][0] is not None
        assert_same_bits(output, results[0][0])
        assert_same_bits(lse, results[0][1])


def test_random_small_calls(torch_rng: torch.Generator) -> None:
    def draw(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=torch_rng))]

    for _ in range(24):
        heads = draw(1, 2, 3, 4)
        sizes = (draw(1, 2), heads, draw(1, heads), draw(1, 17, 64, 129, 200), draw(8, 32, 40, 64, 128))
        shape = case(
            sizes,
            draw(1, 5, 64, 100, 1000),
            sinks=draw(0, 1, 4, 64, 150),
            fraction=draw(0.0, 0.5, 1.0),
            shift=draw(None, 0, 1),
            causal=draw(True, True, False),
        )
        dtype = draw(*DTYPES)
        query, key, value, grad = shape.inputs(dtype, torch_rng)
        output, lse = emulated.forward(query, key, value, shape.pattern)
        want = exact(query, key, value, shape.pattern, grad)
        assert output is not None
        assert_close(output, want.output, 2e-2 if dtype == torch.bfloat16 else 3e-3, name=f"{shape}: output")
        assert_close(lse, want.lse, 2e-5, 2e-5, name=f"{shape}: lse")


@pytest.mark.parametrize("scale", (1e6, -1e10, 1e30))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=str)
def test_forward_takes_the_largest_scales(dtype: torch.dtype, scale: float) -> None:
    """The rounding of a score may be more than exp2 takes: the largest weight of a row is 1 all the same."""
    shape = case((1, 2, 1, 300, 32), 256)
    rng = torch.Generator().manual_seed(0)  # other numbers may hold scores too close for float32 to order
    query, key, value, grad = shape.inputs(dtype, rng)
    output, lse = emulated.forward(query, key, value, shape.pattern, scale=scale)
    want = exact(query, key, value, shape.pattern, grad, scale=scale)
    assert output is not None
    assert_close(output, want.output, 5e-2, name="output")
    assert_close(lse, want.lse, 2e-5, 2e-5, name="lse")
