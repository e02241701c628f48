"""A packed row trains a model exactly as its documents alone do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sinklora
from sinklora.data.packing import PackedRows, collate
from sinklora.data.shards import StoreWriter, TokenStore, stored

transformers = pytest.importorskip("transformers")

CONTEXT = 48
LENGTHS = (48, 31, 29, 16, 9, 5, 2, 1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, use_cache=False, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rng = np.random.default_rng(0)

    def write(folder: Path) -> StoreWriter:
        writer = StoreWriter(folder, 64, 63, masked=True)
        total = sum(LENGTHS)
        writer.append(rng.integers(0, 63, total), LENGTHS, rng.random(total) < 0.8)
        return writer

    return stored(tmp_path_factory.mktemp("store"), "t", {}, write)


def sums(model: torch.nn.Module, **inputs: torch.Tensor) -> float:
    """The losses of all labels, added."""
    count = int((inputs["labels"][:, 1:] != -100).sum())
    return float(model(**inputs).loss.detach()) * count if count else 0.0


def alone(model: torch.nn.Module, store: TokenStore) -> float:
    """The sum over documents, each in a batch of its own and without positions."""
    total = 0.0
    for index, start in enumerate(store.offsets[:-1]):
        ids = torch.from_numpy(store[index])
        mask = torch.from_numpy(np.array(store.mask[start : start + len(ids)], bool))
        total += sums(model, input_ids=ids[None], labels=torch.where(mask, ids, -100)[None])
    return total


@pytest.mark.parametrize("attention", ["sinklora", "sdpa"])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_rows_equal_documents_alone(model, store: TokenStore, attention: str, batch: int) -> None:
    rows = PackedRows(store, CONTEXT)
    assert len(rows) == 3 and rows.padding_share < 0.1
    if attention == "sinklora":
        sinklora.patch(model, sinklora.SFPattern(group_size=8, num_sink_tokens=2))
    try:
        assert model.config._attn_implementation == attention
        expected = alone(model, store)
        packed = sum(
            sums(model, **collate([rows[row] for row in range(start, min(start + batch, len(rows)))]))
            for start in range(0, len(rows), batch)
        )
        labels = sum(int((rows[row]["labels"] != -100).sum()) for row in range(len(rows)))
    finally:
        if attention == "sinklora":
            sinklora.unpatch(model)
    assert labels == rows.num_labels
    assert packed == pytest.approx(expected, rel=1e-5)


def test_without_positions_documents_would_see_each_other(model, store: TokenStore) -> None:
    """What the test above would miss if losses hardly depended on the attention."""
    rows = PackedRows(store, CONTEXT)
    batch = collate([rows[row] for row in range(len(rows))])
    del batch["position_ids"]
    assert abs(sums(model, **batch) / alone(model, store) - 1) > 1e-3
