"""The dense float64 reference: arithmetic written out, packing by hand, the leak of the roll form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accuracy import assert_close

from sinklora import SFPattern, reference

PATTERN = SFPattern(4, num_sink_tokens=1, shifted_fraction=0.5)


def make(rng: np.random.Generator, tokens: int = 8, batch: int = 1) -> list[np.ndarray]:
    return [rng.standard_normal((batch, heads, tokens, 8)) for heads in (4, 2, 2)]


def test_one_row_written_out(rng: np.random.Generator) -> None:
    """Query 5 of the shifted head 3 sees keys 0 (sink), 2, 3, 4, 5 of key/value head 1."""
    query, key, value = make(rng)
    output, lse = reference.sf_attention(query, key, value, PATTERN, return_lse=True)
    seen = [0, 2, 3, 4, 5]
    weights = [math.exp(float(query[0, 3, 5] @ key[0, 1, j]) / math.sqrt(8)) for j in seen]
    expected = sum(w * value[0, 1, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
    assert_close(output[0, 3, 5], expected, 1e-12)
    assert abs(lse[0, 3, 5] - math.log(sum(weights))) < 1e-12


def test_numpy_and_torch_agree_and_are_float64(rng: np.random.Generator) -> None:
    arrays = [x.astype(np.float32) for x in make(rng)]
    ours = reference.sf_attention(*arrays, PATTERN, scale=0.3)
    theirs = reference.sf_attention(*map(torch.from_numpy, arrays), PATTERN, scale=0.3)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == np.float64
    assert theirs.dtype == torch.float64
    assert_close(ours, theirs, 1e-12)


def test_gradients_are_those_of_finite_differences(rng: np.random.Generator) -> None:
    tensors = [torch.from_numpy(x).requires_grad_() for x in make(rng, 6)]
    mask = torch.tensor([[True, False, True, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.sf_attention(q, k, v, PATTERN, padding_mask=mask), tensors, fast_mode=True
    )


def test_packing_is_separate_runs(rng: np.random.Generator) -> None:
    query, key, value = make(rng, 11)
    cu_seqlens = np.array([0, 4, 4, 11], dtype=np.int32)
    position_ids = np.array([[5, 6, 7, 9, 0, 1, 2, 3, 4, 8, 9]])  # a forward jump starts no sequence
    packed = reference.sf_attention(query, key, value, PATTERN, cu_seqlens=cu_seqlens)
    by_position = reference.sf_attention(query, key, value, PATTERN, position_ids=position_ids)
    for lo, hi in ((0, 4), (4, 11)):
        alone = reference.sf_attention(*(x[:, :, lo:hi] for x in (query, key, value)), PATTERN)
        assert_close(packed[:, :, lo:hi], alone, 1e-12)
        assert_close(by_position[:, :, lo:hi], alone, 1e-12)


def test_padding_is_packing_the_kept_tokens(rng: np.random.Generator) -> None:
    query, key, value = make(rng, 9, batch=2)
    mask = np.array([[0, 1, 1, 0, 1, 1, 1, 1, 0], [0] * 9], dtype=bool)
    for array in (query, key, value):
        array.swapaxes(1, 2)[~mask] = np.nan
    output, lse = reference.sf_attention(query, key, value, PATTERN, padding_mask=mask, return_lse=True)
    kept = reference.sf_attention(*(x[:1][:, :, mask[0]] for x in (query, key, value)), PATTERN)
    assert_close(output[:1][:, :, mask[0]], kept, 1e-12)
    assert (output.swapaxes(1, 2)[~mask] == 0).all()
    assert (lse.swapaxes(1, 2)[~mask] == -np.inf).all()


def test_the_roll_form_leaks_the_future(rng: np.random.Generator) -> None:
    """The literal roll lets the first tokens of a shifted head see the last ones; the definition does not."""
    pattern = SFPattern.s2(4)
    query, key, value = make(rng)
    poisoned = value.copy()
    poisoned[:, :, 7] = 1e4  # the last token
    for roll, leaks in ((False, []), (True, [0, 1])):
        clean = reference.sf_attention(query, key, value, pattern, roll=roll)
        dirty = reference.sf_attention(query, key, poisoned, pattern, roll=roll)
        changed = (clean != dirty).any(axis=(0, 3))
        assert not changed[:2, :7].any()  # unshifted heads
        for head in (2, 3):
            assert np.flatnonzero(changed[head, :7]).tolist() == leaks


def test_the_roll_form_is_the_published_one(rng: np.random.Generator) -> None:
    """As LongLoRA's code: roll by half a group, attend causally inside each group, roll back."""
    query, key, value = (torch.from_numpy(x) for x in make(rng, 12))
    pattern = SFPattern.s2(4)
    key4, value4 = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        split = [x.reshape(1, 2, 3, 4, 8) for x in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*split, is_causal=True).reshape(1, 2, 12, 8)

    plain = grouped(query[:, :2], key4[:, :2], value4[:, :2])
    rolled = grouped(*(x[:, 2:].roll(-2, 2) for x in (query, key4, value4))).roll(2, 2)
    ours = reference.sf_attention(query, key, value, pattern, roll=True)
    assert_close(ours, torch.cat([plain, rolled], 1), 1e-12)


def test_refuses(rng: np.random.Generator) -> None:
    query, key, value = make(rng, 6)
    with pytest.raises(ValueError, match="multiple of group_size 4 tokens, got 6"):
        reference.sf_attention(query, key, value, PATTERN, roll=True)
    with pytest.raises(TypeError, match="pattern: expected an SFPattern"):
        reference.sf_attention(query, key, value, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="key: expected"):
        reference.sf_attention(query, key[:, :, :5], value[:, :, :5], PATTERN)
    with pytest.raises(ValueError, match="at most one"):
        reference.sf_attention(
            query, key, value, PATTERN, cu_seqlens=np.array([0, 6]), padding_mask=np.ones((1, 6), bool)
        )
