"""What an H2O cache refuses, what it says, and that it is then as it was."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cache_support import assert_same, one_by_one, patched, prefill
from hf_support import PATTERN, restarting, tiny, tokens
from transformers import DeepseekV3Config, DynamicCache, JambaConfig, T5Config

import sinklora
from sinklora import H2OCache
from sinklora.cache import link as cache_link


def small(model: Any, **options: Any) -> H2OCache:
    return H2OCache(model.config, **{"heavy": 4, "recent": 4, **options})


# ---- models without our attention ----


def test_unpatched_model() -> None:
    model = tiny()
    cache = small(model)
    with pytest.raises(RuntimeError, match=r'needs.*"sinklora", got "sdpa".*sinklora\.patch'):
        prefill(model, cache, tokens(1, 20))
    assert cache.get_seq_length() == 0
    prefill(sinklora.patch(model, PATTERN), cache, tokens(1, 20))  # the config is the live one
    sinklora.unpatch(model)
    with pytest.raises(RuntimeError, match="sdpa"):
        prefill(model, cache, tokens(1, 1))


def test_unpatched_model_with_another_config() -> None:
    """The config says nothing, or of another model: the second layer finds the first's keys unclaimed."""
    model, other = tiny(), patched()
    cache = small(other)
    with pytest.raises(RuntimeError, match=r"keys of layer 0 reached no attention.*patch"):
        prefill(model, cache, tokens(1, 20))
    assert cache.kept_positions(0).numel() == 0
    gc.collect()
    assert not cache_link._notes  # else it would stand in the way of torch.compile from now on
    with pytest.raises(RuntimeError, match="broke off"):
        prefill(other, cache, tokens(1, 20))
    cache.reset()
    prefill(other, cache, tokens(1, 20))


def test_a_model_of_one_layer_is_found_at_the_next_forward() -> None:
    model, other = tiny(num_hidden_layers=1), patched(num_hidden_layers=1)
    cache = small(other)
    prefill(model, cache, tokens(1, 20))
    with pytest.raises(RuntimeError, match="reached no attention"):
        prefill(model, cache, tokens(1, 1))


def test_other_models() -> None:
    model = patched()
    cache = small(model)
    prefill(model, cache, tokens(2, 20))
    before = copy.deepcopy(cache)
    for other, ids, error, words in (
        (patched(num_hidden_layers=3), tokens(2, 3), ValueError, "2 layers.*got one of 3"),
        (patched(num_hidden_layers=1), tokens(2, 1), ValueError, "2 layers.*got one of 1"),
        (patched(num_key_value_heads=4), tokens(2, 1), ValueError, r"\(2, 2, tokens, 8\).*\(2, 4, 1, 8\)"),
        (patched(head_dim=16), tokens(2, 3), ValueError, r"\(2, 2, 3, 16\)"),
        (model, tokens(3, 1), ValueError, r"\(3, 2, 1, 8\).*reset"),
        (patched().bfloat16(), tokens(2, 1), TypeError, r"float32.*bfloat16"),
    ):
        with pytest.raises(error, match=words):
            prefill(other, cache, ids)
        assert_same(cache, before)
    assert torch.equal(prefill(model, cache, tokens(2, 1)), prefill(model, before, tokens(2, 1)))


@pytest.mark.parametrize("num_new", [1, 2])
def test_a_refused_first_forward_leaves_nothing(num_new: int) -> None:
    """The next may have another batch and dtype."""
    model = patched()
    cache = small(model)
    with pytest.raises(TypeError, match="float64"):
        prefill(patched().double(), cache, tokens(2, num_new))
    assert cache.memory_bytes() == 0
    prefill(model, cache, tokens(1, num_new))


@pytest.mark.parametrize(
    "config, words",
    [
        (T5Config(), "encoder-decoder"),
        (JambaConfig(), r"plain attention.*(mamba|linear)"),
        (DeepseekV3Config(), r"latent.*kv_lora_rank 512"),
    ],
    ids=["t5", "jamba", "deepseek"],
)
def test_configs_of_other_kinds(config: Any, words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        H2OCache(config, heavy=4, recent=4)


# ---- modes and arguments ----


def _training(model: Any) -> None:
    model.train()


@pytest.mark.parametrize(
    "prepare, options, error, words",
    [
        (_training, {}, RuntimeError, r"training mode.*model\.eval\(\)"),
        (
            lambda model: sinklora.patch(model, PATTERN, eval_attention="sf"),
            {},
            NotImplementedError,
            "eval_attention",
        ),
        (
            None,
            {"cu_seq_lens_q": torch.tensor([0, 5, 20], dtype=torch.int32)},
            NotImplementedError,
            "cu_seq_lens_q",
        ),
        (None, {"position_ids": restarting(5, 15)}, NotImplementedError, r"position_ids.*restart"),
        (
            None,
            {"attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)},
            NotImplementedError,
            "attention_mask.*more",
        ),
    ],
    ids=["training", "sf", "cu_seq_lens", "packed", "4D"],
)
def test_calls_that_are_refused(
    prepare: Callable[[Any], Any] | None, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = patched()
    cache, untouched = small(model), small(model)
    if prepare is not None:
        prepare(model)
    with pytest.raises(error, match=words):
        prefill(model, cache, tokens(1, 20), **options)
    assert cache.get_seq_length() == 0 and cache.memory_bytes() == 0
    sinklora.patch(model.eval(), PATTERN, eval_attention="full")
    for each in (cache, untouched):
        prefill(model, each, tokens(1, 20))
    assert_same(cache, untouched)


@pytest.mark.parametrize("additive", [False, True])
def test_a_causal_4d_mask_is_taken_at_first(additive: bool) -> None:
    model = patched()
    kept = torch.ones(2, 20, dtype=torch.bool)
    kept[0, :6] = False
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()[None, None] & kept[:, None, None]
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min) if additive else allowed
    caches = small(model), small(model)
    for cache, each in zip(caches, (kept, mask), strict=True):
        prefill(model, cache, tokens(2, 20), attention_mask=each)
    assert_same(*caches)
    with pytest.raises(NotImplementedError, match="2D padding mask"):
        prefill(model, caches[0], tokens(2, 1), attention_mask=torch.ones(2, 1, 1, 21, dtype=torch.bool))


def test_a_mask_without_the_past_is_refused() -> None:
    model = patched()
    cache = small(model)
    prefill(model, cache, tokens(1, 20))
    with pytest.raises(ValueError, match=r"attention_mask.*21 tokens so far"):
        prefill(model, cache, tokens(1, 1), attention_mask=torch.ones(1, 1))
    prefill(model, cache, tokens(1, 1), attention_mask=torch.ones(1, 21))


def test_a_mask_that_hides_taken_tokens_is_refused() -> None:
    """Scores and slots are of what came; a mask that shows padding again changes nothing."""
    model, ids = patched(), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    cache = small(model)
    prefill(model, cache, ids, attention_mask=mask)
    longer = torch.cat([mask, torch.tensor([[1], [0]])], 1)
    before, other = copy.deepcopy(cache), longer.clone()
    other[1, 3] = 0
    with pytest.raises(NotImplementedError, match=r"attention_mask.*20 in row 1.*keeps 19 of the 20"):
        prefill(model, cache, ids[:, :1], attention_mask=other)
    assert_same(cache, before)
    expected = prefill(model, cache, ids[:, :1], attention_mask=longer)
    longer[0, :5] = 1
    assert torch.equal(prefill(model, before, ids[:, :1], attention_mask=longer), expected)


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_sliding_windows_that_bite(positions: str) -> None:
    """By rank a window bites when more are kept, not when the text gets longer."""
    model = patched("Mistral", sliding_window=24)
    cache = small(model, positions=positions)
    prefill(model, cache, tokens(1, 20))
    one_by_one(model, cache, tokens(1, 4))
    if positions == "cache":
        one_by_one(model, cache, tokens(1, 40))
        with pytest.raises(NotImplementedError, match=r"sliding_window.*28 tokens.*got 24"):
            prefill(model, cache, tokens(1, 20))
    else:
        with pytest.raises(NotImplementedError, match=r"sliding_window.*25 tokens.*got 24"):
            prefill(model, cache, tokens(1, 1))


def test_a_window_of_a_later_layer_is_refused_by_the_first() -> None:
    model = patched("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    cache = small(model)
    prefill(model, cache, tokens(1, 6))
    with pytest.raises(NotImplementedError, match=r"sliding_window.*11 tokens.*got 8"):
        prefill(model, cache, tokens(1, 5))
    assert cache.get_seq_length() == 6
    prefill(model, cache, tokens(1, 2))


def test_gradients() -> None:
    """The forward works, a backward through it raises; scores are detached."""
    model = patched()
    cache = small(model)
    for ids in (tokens(1, 20), tokens(1, 1), tokens(1, 5)):
        logits = model(ids, past_key_values=cache).logits
        assert logits.requires_grad and not cache.scores(0).requires_grad
        with pytest.raises(RuntimeError, match=r"gradient|backward|inference"):
            logits.sum().backward()
    copy.deepcopy(cache)
    expected = small(model)
    for ids in (tokens(1, 20), tokens(1, 1), tokens(1, 5)):
        prefill(model, expected, ids)
    assert_same(cache, expected)


# ---- forwards that break off ----


@pytest.mark.parametrize("where", ["before", "between", "within"])
@pytest.mark.parametrize("num_new", [1, 5])
def test_a_forward_that_broke_off(where: str, num_new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    cache = small(model)
    prefill(model, cache, tokens(1, 20))

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patching:
        if where == "between":
            patching.setattr(model.model.layers[1], "forward", interrupt)
        elif where == "within":
            for name in ("h2o_decode", "h2o_select"):
                patching.setattr(f"sinklora.torch_h2o.{name}", interrupt)
        else:
            patching.setattr("sinklora.hf.attention.h2o_attention", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prefill(model, cache, tokens(1, num_new))
    for use in (
        lambda: prefill(model, cache, tokens(1, 1)),
        lambda: copy.deepcopy(cache),
        lambda: cache.crop(-1),
        lambda: cache.save("never-written"),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(RuntimeError, match="broke off"):
            use()
    cache.reset()
    prefill(model, cache, tokens(1, 20))


def test_a_kernel_that_refuses_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    cache = small(model)
    prefill(model, cache, tokens(1, 20))
    before = copy.deepcopy(cache)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    operations = {"h2o_decode": 1, "causal_attention": 5, "attention_scores": 5, "h2o_select": 5}
    for name, num_new in operations.items():
        with monkeypatch.context() as patching, pytest.raises(MemoryError):
            patching.setattr(f"sinklora.torch_h2o.{name}", refuse)
            prefill(model, cache, tokens(1, num_new))
        assert_same(cache, before)
    assert torch.equal(prefill(model, cache, tokens(1, 1)), prefill(model, before, tokens(1, 1)))


# ---- crop ----


def test_crop_is_refused() -> None:
    model = patched()
    cache = small(model, heavy=20, recent=20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 8:11] = 0
    prefill(model, cache, tokens(2, 20), attention_mask=mask)
    before = copy.deepcopy(cache)
    for number, words in ((3, "negative.*3"), (-21, "at least -20.*-21"), (-10, "at least -9.*padding.*-10")):
        with pytest.raises(ValueError, match=words):
            cache.crop(number)
    cache.crop(0)
    assert_same(cache, before)
    cache.crop(-9)
    with pytest.raises(ValueError, match=r"at least -0.*padding"):
        cache.crop(-1)
    assert cache.get_seq_length() == 11 and cache.kept_positions(0)[0, 0].tolist() == [*range(8), -1, -1, -1]
    prefill(model, cache, tokens(2, 30), attention_mask=torch.cat([mask[:, :11], torch.ones(2, 30)], 1))
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(RuntimeError, match=r"crop.*evicted"):
        cache.crop(-1)


# ---- compiled models ----


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_compiled_models_run_outside_the_graph(dynamo: None) -> None:
    model, ids = patched(), tokens(1, 20)
    cache, other = small(model), small(model)
    compiled = torch.compile(model, backend="eager")
    for turn in (ids, *tokens(1, 4, seed=1).split(1, 1)):
        assert torch.equal(prefill(compiled, cache, turn), prefill(model, other, turn))
    assert_same(cache, other)


def test_whole_graphs_say_what_to_do(dynamo: None) -> None:
    model, ids = patched(), tokens(1, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"(?s)H2OCache changes with every token.*_orig_mod"):
        prefill(compiled, small(model), ids)
    prefill(compiled._orig_mod, small(model), ids)
    # A graph without such a cache is as it was, and has the bits of the model itself.
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for turn in (ids, tokens(1, 1, seed=1), tokens(1, 5, seed=2)):
        assert torch.equal(prefill(compiled, caches[0], turn), prefill(model, caches[1], turn))
