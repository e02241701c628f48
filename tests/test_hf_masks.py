"""What the mask function hands over for each way that transformers asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_compatibility_function,
    sliding_window_causal_mask_function,
)

from sinklora.hf.masks import dense_mask, find_rows, padding_of_dense, past_mask, sinklora_mask

N = 12
PACKED = packed_sequence_compatibility_function(
    causal_mask_function,
    torch.cat([torch.arange(5), torch.arange(7)])[None],
    torch.tensor([[0] * 5 + [1] * 7]),
)


def _mask(**arguments: Any) -> torch.Tensor | None:
    given = {"batch_size": 1, "q_length": N, "kv_length": N, "device": torch.device("cpu"), **arguments}
    return sinklora_mask(**given)


def test_nothing_dense_where_queries_are_all_keys() -> None:
    assert _mask() is None
    kept = torch.ones(1, N, dtype=torch.bool)
    kept[:, :3] = False
    found = _mask(attention_mask=kept)
    assert found is not None and torch.equal(found, kept)
    packed = _mask(mask_function=PACKED, allow_is_causal_skip=False)
    assert packed is not None and packed.shape == (0,) and packed.dtype == torch.int64
    window = sliding_window_causal_mask_function(N)
    assert _mask(mask_function=window, local_size=N) is None


def test_keys_beyond_a_short_mask_are_padding() -> None:
    found = _mask(attention_mask=torch.ones(1, N - 4, dtype=torch.bool))
    assert found is not None and found.tolist() == [[True] * (N - 4) + [False] * 4]


@pytest.mark.parametrize(
    "arguments",
    [
        {"q_offset": torch.tensor(0), "allow_is_causal_skip": False},  # a static cache
        {"q_length": 4, "q_offset": N - 3},  # more queries than keys are left
        {"mask_function": sliding_window_causal_mask_function(5), "local_size": 5},
        {"mask_function": bidirectional_mask_function, "allow_is_causal_skip": False},
        {"allow_is_causal_skip": False},  # the caller combines it with another mask
    ],
)
def test_dense_elsewhere(arguments: dict[str, Any]) -> None:
    found = _mask(**arguments)
    assert found is not None and found.shape == (1, 1, arguments.get("q_length", N), N)


def test_nothing_dense_over_past_tokens() -> None:
    """A chunk after others, one token, and a static cache whose last slots are empty."""
    assert _mask(q_length=4, q_offset=N - 4) is None
    kept = torch.ones(1, N, dtype=torch.bool)
    assert _mask(q_length=4, q_offset=N - 4, attention_mask=kept) is None
    kept[:, :3] = False
    found = _mask(q_length=1, q_offset=N - 1, attention_mask=kept)
    assert found is not None and torch.equal(found, kept)
    window = sliding_window_causal_mask_function(N)
    assert _mask(q_length=4, q_offset=N - 4, mask_function=window, local_size=N) is None
    static = {"q_offset": torch.tensor(N - 5), "allow_is_causal_skip": False}
    found = _mask(q_length=1, **static)
    assert found is not None and found.tolist() == [[True] * (N - 4)]
    found = _mask(q_length=1, attention_mask=kept, **static)
    assert found is not None and torch.equal(found, kept[:, : N - 4])


def test_what_an_evicting_cache_asks_for() -> None:
    """Its keys are the new tokens, from kv_offset on; it is told of the past ones too."""
    kept = torch.ones(1, N, dtype=torch.bool)
    given = {"q_length": 4, "kv_length": 4, "q_offset": N - 4, "kv_offset": N - 4}
    assert _mask(**given) is None and _mask(**given, attention_mask=kept) is None
    kept[:, -2:] = False
    found = _mask(**given, attention_mask=kept)
    assert found is not None and torch.equal(found, kept)
    with pytest.raises(ValueError, match=r"attention_mask.*12 tokens so far.*\(1, 4\)"):
        _mask(**given, attention_mask=kept[:, -4:])


@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_past_tokens_for_sdpa(padded: bool) -> None:
    kept = torch.arange(N)[None] >= 3 if padded else None
    causal = torch.ones(N, N, dtype=torch.bool).tril()[-4:]
    expected = causal & kept if kept is not None else causal
    assert torch.equal(past_mask(kept, 4, N, torch.device("cpu"))[0, 0], expected)


def test_mask_wins_over_positions() -> None:
    positions = torch.tensor([[0] * 4 + list(range(N - 4))])  # how generate() numbers a left-padded row
    kept = torch.arange(N)[None] >= 4
    rows = find_rows(kept, N, {"position_ids": positions})
    assert rows.padding_mask is kept and rows.position_ids is None
    rows = find_rows(None, N, {"position_ids": positions})
    assert rows.padding_mask is None and rows.position_ids is not None
    assert find_rows(None, 1, {"position_ids": positions[:, :1]}).position_ids is None
    assert find_rows(None, N, {"position_ids": positions[None].expand(3, 1, N)}).position_ids is None


def test_dense_mask_of_rows() -> None:
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).bool() & causal
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    cu_seqlens = torch.tensor([0, 5, 5, N])  # an empty sequence in between
    for given in ({"position_ids": positions}, {"cu_seq_lens_q": cu_seqlens}):
        found = dense_mask(find_rows(None, N, given), N, torch.device("cpu"))
        assert found is not None and torch.equal(found[0, 0], blocks)
    plain = find_rows(None, N, {"position_ids": torch.arange(N)[None]})
    assert dense_mask(plain, N, torch.device("cpu")) is None


def test_padding_of_dense() -> None:
    causal = torch.ones(N, N, dtype=torch.bool).tril()[None, None]
    kept = torch.arange(N)[None] >= 3
    for mask in (causal & kept[:, None, None], torch.where(causal & kept[:, None, None], 0.0, float("-inf"))):
        found = padding_of_dense(mask, N)
        assert found is not None and torch.equal(found, kept)
    assert padding_of_dense(torch.where(causal, 0.5, float("-inf")), N) is None
    assert padding_of_dense(torch.where(causal, 0.0, -1.0), N) is None
    assert padding_of_dense(causal.expand(1, 8, N, N), N) is None
    window = causal & (torch.arange(N)[:, None] - torch.arange(N) < 3)
    assert padding_of_dense(window, N) is None
