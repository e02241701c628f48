"""Every architecture, patched: eval mode equals sdpa, training mode equals the pattern written densely."""

from __future__ import annotations

import pytest
import torch
from hf_support import ARCHITECTURES, ORACLE, PATTERN, VOCAB, register_oracle, restarting, tiny, tokens
from transformers import PersimmonConfig, PersimmonForCausalLM

import sinklora
from sinklora.hf.attention import sinklora_attention

N = 40  # five groups, the last of a shifted head short


def _padding(side: str) -> torch.Tensor:
    mask = torch.ones(2, N, dtype=torch.int64)
    if side == "left":
        mask[0, :11] = 0
    elif side == "right":
        mask[1, 27:] = 0
    return mask


def _loss_and_grads(model: torch.nn.Module, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_eval_equals_sdpa(architecture: str, side: str) -> None:
    model, ids, mask = tiny(architecture), tokens(2, N), _padding(side)
    inputs = {"input_ids": ids} if side == "none" else {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**inputs).logits
        sinklora.patch(model, PATTERN)
        found = model(**inputs).logits
    kept = mask.bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_eval_equals_sdpa_in_other_dtypes(dtype: torch.dtype) -> None:
    model, ids = tiny().to(dtype), tokens(2, N)
    with torch.no_grad():
        expected = model(ids).logits
        found = sinklora.patch(model, PATTERN)(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", ["whole", "left", "right", "packed", "packed batch"])
def test_training_equals_dense_pattern(architecture: str, rows: str) -> None:
    register_oracle()
    model, ids = tiny(architecture).train(), tokens(2, N)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if rows in ("left", "right"):
        mask = _padding(rows)
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    elif rows == "packed":
        inputs |= {"input_ids": ids[:1], "labels": ids[:1], "position_ids": restarting(17, 1, 22)}
    elif rows == "packed batch":
        inputs["position_ids"] = torch.cat([restarting(17, 23), restarting(30, 10)])

    model.set_attn_implementation(ORACLE)
    expected_loss, expected = _loss_and_grads(model, **inputs)
    sinklora.patch(model, PATTERN)
    loss, found = _loss_and_grads(model, **inputs)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_one_packing_for_all_rows() -> None:
    """position_ids of shape (1, N) beside a batch of 2."""
    register_oracle()
    model, ids = tiny().train(), tokens(2, N)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": restarting(17, 23), "use_cache": False}
    model.set_attn_implementation(ORACLE)
    _, expected = _loss_and_grads(model, **inputs)
    _, found = _loss_and_grads(sinklora.patch(model, PATTERN), **inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("training", [False, True])
def test_rows_equal_rows_alone(architecture: str, training: bool) -> None:
    """Padded rows and packed rows give what each sequence gives by itself."""
    model = sinklora.patch(tiny(architecture), PATTERN).train(training)
    first, second = tokens(1, 23, seed=1), tokens(1, N, seed=2)
    pad = torch.zeros(1, N - 23, dtype=torch.int64)
    with torch.no_grad():
        alone = torch.cat(
            [model(first, use_cache=False).logits, model(second, use_cache=False).logits], dim=1
        )
        left = model(
            torch.cat([torch.cat([pad, first], 1), second]),
            attention_mask=torch.cat([torch.cat([pad, pad[:, :1] + torch.ones(1, 23)], 1), torch.ones(1, N)]),
            position_ids=torch.cat([torch.cat([pad, restarting(23)], 1), restarting(N)]),
            use_cache=False,
        ).logits
        packed = model(torch.cat([first, second], 1), position_ids=restarting(23, N), use_cache=False).logits
        cu_seqlens = torch.tensor([0, 23, 23 + N], dtype=torch.int32)
        flat = model(
            torch.cat([first, second], 1),
            position_ids=restarting(23, N),
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=N,
            max_length_k=N,
            use_cache=False,
        ).logits
    torch.testing.assert_close(torch.cat([left[:1, -23:], left[1:]], 1), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(flat, alone, atol=1e-5, rtol=1e-4)


def test_flattening_collator() -> None:
    """transformers' own collator, sending cu_seq_lens only: rows must not see each other."""
    from transformers import DataCollatorWithFlattening

    model = sinklora.patch(tiny(), PATTERN).train()
    collate = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    first, other, second = tokens(17, seed=1), tokens(17, seed=3), tokens(21, seed=2)

    def last_logits(head: torch.Tensor) -> torch.Tensor:
        batch = collate([{"input_ids": head.tolist()}, {"input_ids": second.tolist()}])
        assert "position_ids" not in batch and "attention_mask" not in batch
        with torch.no_grad():
            return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, 17:]

    assert torch.equal(last_logits(first), last_logits(other))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("changed", [0, 9, 20, N - 1])
def test_no_future_token_leaks(architecture: str, changed: int) -> None:
    """Not a bit of the logits before a changed token may change, in training mode."""
    model, ids = sinklora.patch(tiny(architecture), PATTERN).train(), tokens(1, N)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("additive", [False, True])
def test_causal_4d_mask_is_taken_in_training(additive: bool) -> None:
    model, ids, padding = sinklora.patch(tiny(), PATTERN).train(), tokens(2, N), _padding("left")
    allowed = torch.ones(N, N, dtype=torch.bool).tril()[None, None] & padding[:, None, None].bool()
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min) if additive else allowed
    with torch.no_grad():
        expected = model(ids, attention_mask=padding, use_cache=False).logits
        found = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(found[padding.bool()], expected[padding.bool()])


def test_4d_mask_in_eval_is_sdpa() -> None:
    model, ids = tiny(), tokens(2, N)
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(5)) < 0.5
    mask |= torch.eye(N, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        found = sinklora.patch(model, PATTERN)(ids, attention_mask=mask).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", ["left", "packed", "cu_seq_lens"])
def test_eval_by_sdpa_keeps_rows_apart(rows: str) -> None:
    """float64 is not our kernels': what they do for padded and packed rows is asked of SDPA by a mask."""
    ids, inputs, kept = tokens(1, N), {}, torch.ones(1, N, dtype=torch.bool)
    if rows == "left":
        kept = _padding("left")[:1].bool()
        inputs["attention_mask"] = kept
    elif rows == "packed":
        inputs["position_ids"] = restarting(17, 23)
    else:
        inputs["position_ids"] = restarting(17, 23)  # for the rotary embedding; cu_seq_lens win
        inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = torch.tensor([0, 5, 17, N], dtype=torch.int32)
    with torch.no_grad():
        expected = sinklora.patch(tiny(), PATTERN)(ids, use_cache=False, **inputs).logits
        found = sinklora.patch(tiny().double(), PATTERN)(ids, use_cache=False, **inputs).logits
    torch.testing.assert_close(found[kept], expected[kept].double(), atol=1e-5, rtol=1e-4)


def test_packed_rows_need_position_ids_in_the_attention() -> None:
    """Persimmon's layers keep position_ids to themselves: its packed rows cannot be told apart."""
    config = PersimmonConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8
    )
    model, ids = sinklora.patch(PersimmonForCausalLM(config), PATTERN), tokens(1, N)
    for training in (False, True):
        model.train(training)(ids, use_cache=False)
        with pytest.raises(NotImplementedError, match="position_ids"):
            model(ids, position_ids=restarting(17, 23), use_cache=False)


def test_sliding_window_in_eval_is_sdpa() -> None:
    model, ids = tiny("Mistral", sliding_window=7), tokens(2, N)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = sinklora.patch(model, PATTERN)(ids, use_cache=False).logits
    assert torch.equal(found, expected)


def test_eval_attention_sf_is_training_attention() -> None:
    model, ids = tiny(), tokens(2, N)
    sinklora.patch(model, PATTERN, eval_attention="sf")
    with torch.no_grad():
        in_eval = model(ids).logits
        assert torch.equal(in_eval, model.train()(ids).logits)
        sinklora.patch(model.eval(), PATTERN, eval_attention="full")
        assert not torch.equal(in_eval, model(ids).logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch, n", [(0, N), (2, 0)])
def test_empty_input(training: bool, batch: int, n: int) -> None:
    """transformers itself cannot reshape an empty batch, so this calls the attention function."""
    module = sinklora.patch(tiny(), PATTERN).model.layers[0].self_attn.train(training)
    query, key = torch.empty(batch, 8, n, 8), torch.empty(batch, 2, n, 8)
    positions = torch.arange(n)[None]
    output, weights = sinklora_attention(module, query, key, key, None, position_ids=positions)
    assert output.shape == (batch, n, 8, 8) and weights is None
