"""The heavy-hitter cache's operations on a CUDA device, against float64 and against the CPU's kernels."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from accuracy import assert_close, assert_same_bits
from cases import DTYPES
from device_support import Repeats, moved
from h2o_support import USED, attend
from test_causal_forward import SIZES, TOLERANCE, dense
from test_causal_forward import inputs as causal_inputs
from test_h2o_score import naive, random_mask
from test_h2o_select import Entries
from torch import Tensor

from sinklora import torch_h2o

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
every_mask = pytest.mark.parametrize("kind", ("none", "left", "right", "holes"))
RUNS = 1000


def generator_of(name: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(name).encode()))


# ---- prompts ----


@every_size
@every_dtype
@every_mask
def test_causal_attention_and_its_scores(
    size: tuple[int, ...], dtype: torch.dtype, kind: str, cuda: torch.device
) -> None:
    rng = generator_of((size, kind))
    query, key, value = causal_inputs(size, dtype, rng)
    mask = random_mask(size[0], size[4], kind, rng)
    if mask is not None:  # padding may hold anything
        for x in (key, value):
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
    there = moved((query, key, value), cuda)
    padding = moved(mask, cuda)
    output, lse = torch_h2o.causal_attention(*there, padding_mask=padding)
    want, want_lse = dense(query, key, value, mask)
    assert_close(output, want, TOLERANCE[dtype], name="output")
    assert_close(lse, want_lse, 2e-5, 2e-5, name="lse")
    for window in (None, 1, 16):
        scores = torch_h2o.attention_scores(
            *(there[0], there[1], lse), score_window=window, padding_mask=padding
        )
        assert_close(scores, naive(query, key, mask, window or 0), 2e-5, 2e-5, f"scores, window {window}")
    alone = torch_h2o.attention_scores(there[0], there[1], padding_mask=padding)
    assert_close(alone, naive(query, key, mask), 2e-5, 2e-5, "scores with an lse of their own")


@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_group_reduction(reduction: str, cuda: torch.device) -> None:
    query, key, _ = causal_inputs((2, 8, 2, 130, 130, 64), torch.bfloat16, generator_of(reduction))
    scores = torch_h2o.attention_scores(*moved((query, key), cuda), group_reduction=reduction)
    assert_close(scores, naive(query, key, None) / (4 if reduction == "mean" else 1), 2e-5, 2e-5)


# ---- steps ----


class Cache:
    """A cache's buffers at their budget, or ``spare`` entries below it, with a free slot in the middle."""

    def __init__(self, slots: int, dim: int, dtype: torch.dtype, heads: int, spare: int = 0) -> None:
        rng = generator_of((slots, dim, dtype, heads))
        self.rng, self.heads, self.dim, self.dtype = rng, heads, dim, dtype
        key, value = (torch.randn(2, 2, slots, dim, generator=rng).to(dtype) for _ in range(2))
        used = slots - 1 - spare
        positions = torch.full((2, 2, slots), -1, dtype=torch.int32)
        free = used // 2
        positions[:, :, :free] = torch.arange(free)
        positions[:, :, free + 1 : used + 1] = torch.arange(free, used)
        scores = torch.rand(2, 2, slots, generator=rng).where(positions >= 0, 0.0)
        for x in (key, value):
            x.masked_fill_((positions < 0)[..., None], float("nan"))
        free_slot = torch.full((2, 2), free, dtype=torch.int32)
        recent = max(1, slots // 3)
        rows = torch.tensor([[used, used, slots - 1, recent]] * 2, dtype=torch.int32)
        self.state = [key, value, scores, positions, free_slot, rows]

    def token(self) -> list[Tensor]:
        return [torch.randn(2, n, 1, self.dim, generator=self.rng).to(self.dtype) for n in (self.heads, 2, 2)]


@pytest.mark.parametrize("heads", (2, 8, 16))
@pytest.mark.parametrize(("slots", "dim"), ((2, 8), (9, 40), (65, 64), (300, 128), (1025, 96), (4097, 256)))
@every_dtype
def test_steps_follow_the_cpus(
    slots: int, dim: int, heads: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    """The same tokens into both: the same entries leave, outputs and scores are as close as dtypes allow."""
    here = Cache(slots, dim, dtype, heads, spare=min(3, slots // 4))
    state = [x.clone() for x in moved(here.state, cuda)]
    mask = torch.tensor([[True], [False]])
    for step in range(12):
        token = here.token()
        new_mask = mask if step in (2, 5) else None
        want = torch_h2o.h2o_decode(*token, *here.state, new_mask=new_mask, num_sinks=1)
        got = torch_h2o.h2o_decode(*moved(token, cuda), *state, new_mask=moved(new_mask, cuda), num_sinks=1)
        assert_close(got, want.double(), 2 * TOLERANCE[dtype], name=f"step {step}: output")
        names = ("key", "value", "scores", "positions", "free_slot", "rows")
        for name, a, b in zip(names, moved(state, "cpu"), here.state, strict=True):
            if name == "scores":
                assert_close(a, b, 2e-5, 2e-5, f"step {step}: scores")
            else:
                assert_same_bits(a, b, f"step {step}: {name}")


@pytest.mark.parametrize("queries", (1, 3, 8))
@every_dtype
@every_mask
def test_attention_alone_over_a_cache(
    queries: int, dtype: torch.dtype, kind: str, cuda: torch.device
) -> None:
    size = (2, 8, 2, queries, 450, 64)
    rng = generator_of((queries, kind))
    query, key, value = causal_inputs(size, dtype, rng)
    mask = random_mask(2, 450, kind, rng)
    want = attend(query, key, value, scale=0.125, mask=mask)
    output, lse = torch_h2o.causal_attention(
        *moved((query, key, value), cuda), padding_mask=moved(mask, cuda)
    )
    assert_close(output, want.output, 2 * TOLERANCE[dtype], name="output")
    assert_close(lse, want.lse, 2e-5, 2e-5, name="lse")


@pytest.mark.parametrize("rows", ([-5, -5, -5, -5], [2**31 - 1] * 4, [0, 10**6, 3, 1], [7, 7, 0, 0]), ids=str)
def test_wrong_counts_touch_no_other_memory(rows: list[int], cuda: torch.device) -> None:
    here = Cache(33, 64, torch.bfloat16, 4)
    here.state[5] = torch.tensor([rows] * 2, dtype=torch.int32)
    here.state[4] = torch.tensor([[-9, 10**9], [33, 2**31 - 1]], dtype=torch.int32)
    wrong = moved(here.state, cuda)
    torch_h2o.h2o_decode(*moved(here.token(), cuda), *wrong)
    torch.cuda.synchronize(cuda)
    good = Cache(33, 64, torch.bfloat16, 4)
    token = good.token()
    state = [x.clone() for x in moved(good.state, cuda)]
    got = torch_h2o.h2o_decode(*moved(token, cuda), *state)
    want = torch_h2o.h2o_decode(*token, *good.state)
    assert_close(got, want.double(), 4e-2)


# ---- selection ----


@pytest.mark.parametrize("num_keys", (1, 7, 64, 300, 5000))
@every_dtype
def test_selection_keeps_what_the_cpu_keeps(num_keys: int, dtype: torch.dtype, cuda: torch.device) -> None:
    """Bit for bit: ties, NaN scores, unused slots and rows of different budgets included."""
    rng = np.random.default_rng(num_keys)
    entries = Entries(2, 2, num_keys, 24, dtype, rng)
    entries.mask(torch.rand(2, num_keys, generator=generator_of(num_keys)) > 0.2)
    entries.scores[0, 0, :: max(1, num_keys // 3)] = torch.nan
    budgets = [max(1, num_keys // 3), max(1, num_keys - 1)]
    for row, budget in enumerate(budgets):
        entries.rows[row, 2:] = torch.tensor([budget, max(1, budget // 2)])
    here = [entries.key, entries.value, entries.scores, entries.positions, entries.rows]
    there = [x.clone() for x in moved(here, cuda)]
    want = torch_h2o.h2o_select(*here, num_sinks=2, capacity=num_keys)
    got = torch_h2o.h2o_select(*there, num_sinks=2, capacity=num_keys)
    assert_same_bits(there[4].cpu(), here[4], "rows")
    assert_same_bits(got[3].cpu(), want[3], "positions")
    assert_same_bits(got[2].cpu(), want[2], "scores")
    for row in range(2):
        kept = int(here[4][row, USED])
        for i, name in ((0, "key"), (1, "value")):
            assert_same_bits(got[i][row, :, :kept].cpu(), want[i][row, :, :kept], name)


def test_long_selections(cuda: torch.device) -> None:
    """Random scores of a prompt of 32k tokens: torch.topk's set."""
    scores = torch.rand(1, 8, 32768, generator=generator_of("long")).to(cuda)
    positions = torch.arange(32768, dtype=torch.int32, device=cuda).expand(1, 8, -1).contiguous()
    key = torch.randn(1, 8, 32768, 64, device=cuda).bfloat16()
    rows = torch.tensor([[32768, 32768, 2048, 1]], dtype=torch.int32, device=cuda)
    _, _, _, kept = torch_h2o.h2o_select(key, key, scores, positions, rows, num_sinks=0, capacity=2048)
    best = scores[:, :, :-1].topk(2047, dim=2).indices.sort(dim=2).values
    assert torch.equal(kept[:, :, :2047].long(), best) and bool((kept[:, :, 2047] == 32767).all())


# ---- the same bits ----


@every_dtype
def test_a_thousand_runs_give_the_same_bits(dtype: torch.dtype, cuda: torch.device) -> None:
    tensors = moved(causal_inputs((2, 8, 2, 130, 300, 64), dtype, generator_of("runs")), cuda)
    here = Cache(1025, 128, dtype, 8)
    token, state = moved(here.token(), cuda), moved(here.state, cuda)
    prompts, steps, selections = Repeats(), Repeats(), Repeats()
    for _ in range(RUNS):
        output, lse = torch_h2o.causal_attention(*tensors)
        prompts.add(output, lse, torch_h2o.attention_scores(tensors[0], tensors[1], lse))
        fresh = [x.clone() for x in state]
        steps.add(torch_h2o.h2o_decode(*token, *fresh), *fresh)
        counts = state[5].clone()
        counts[:, 2], counts[:, 3] = 200, 50
        kept = torch_h2o.h2o_select(*state[:4], counts, num_sinks=1, capacity=200)
        selections.add(*kept, counts)
    assert (prompts.count(), steps.count(), selections.count()) == (0, 0, 0)
