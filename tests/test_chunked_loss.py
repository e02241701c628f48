"""The loss in chunks: the plain loss's value and gradients, no full logits, and nothing else changed."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from hf_support import ARCHITECTURES, PATTERN, VOCAB, tiny, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sinklora
from sinklora.evaluation.perplexity import file_losses
from sinklora.hf.output_layer import logits_scale, token_losses
from sinklora.memory.watch import MemoryWatch
from sinklora.training.chunked_loss import use_chunked_loss

CHUNK = 8  # tokens; 2 rows of 33 make many chunks and a rest
Gradients = dict[str, torch.Tensor]


def batch(ignored: int = 5) -> dict[str, torch.Tensor]:
    """Two rows of 33 tokens, the first `ignored` of each not scored."""
    ids = tokens(2, 33)
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def train(model: torch.nn.Module, **inputs: Any) -> tuple[Any, Gradients]:
    """The outputs and gradients of one step from nothing."""
    model.train()
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs, use_cache=False)
    outputs.loss.backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_training(model: torch.nn.Module, chunk: int = CHUNK, **inputs: Any) -> None:
    """The loss and all gradients in chunks are the plain ones to float32 rounding."""
    expected, plain = train(model, **inputs)
    handle = use_chunked_loss(model, chunk)
    assert handle.active
    got, chunked = train(model, **inputs)
    handle.undo()
    assert got.logits is None
    assert "logits" not in got
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert plain.keys() == chunked.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(chunked[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def other(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny model of an architecture that hf_support does not have."""
    sizes = tiny().config.to_dict()
    keep = {k: sizes[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = getattr(transformers, f"{name}Config")(
        **keep, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes
    )
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    model: transformers.PreTrainedModel = kind(config)
    return model


# ---- the same loss ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_plain_loss(architecture: str) -> None:
    assert_equal_training(tiny(architecture), **batch())


@pytest.mark.parametrize("chunk", [1, 7, 66, 10**6])
def test_every_chunk_size(chunk: int) -> None:
    assert_equal_training(tiny(), chunk, **batch())


@pytest.mark.parametrize("ignored", [0, 1, 31, 32])
def test_ignored_labels(ignored: int) -> None:
    assert_equal_training(tiny(), **batch(ignored))


def test_the_number_of_items_divides() -> None:
    assert_equal_training(tiny(), **batch(), num_items_in_batch=torch.tensor(77))
    assert_equal_training(tiny(), **batch(), num_items_in_batch=77)


def test_labels_that_are_shifted_already() -> None:
    given = batch()
    assert_equal_training(tiny(), **given, shift_labels=given["labels"].roll(-1, 1))


def test_no_scored_token_leaves_gradients_of_zero() -> None:
    given = batch(33)
    model = tiny()
    assert use_chunked_loss(model, CHUNK).active
    outputs, gradients = train(model, **given, num_items_in_batch=torch.tensor(10))
    assert outputs.loss == 0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())
    assert model(**given).loss.isnan()  # the mean of nothing, as without chunks


def test_tied_embeddings() -> None:
    assert_equal_training(tiny(tie_word_embeddings=True), **batch())


@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [
        ("Cohere", {"logit_scale": 0.0625}, 0.0625),
        ("Granite", {"logits_scaling": 8.0}, 0.125),
        ("Mixtral", {"output_router_logits": True, "num_key_value_heads": 2}, 1.0),
        ("Phi", {}, 1.0),  # its output layer has a bias
    ],
)
def test_scaled_logits_routers_and_biases(name: str, changes: dict[str, Any], scale: float) -> None:
    model = other(name, **changes)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    assert logits_scale(model) == pytest.approx(scale, rel=1e-6)
    assert_equal_training(model, **batch())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sf_attention(gradient_checkpointing: bool) -> None:
    model = sinklora.patch(tiny(), PATTERN)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_training(model, **batch())


def test_bfloat16_and_autocast_stay_near() -> None:
    for model, autocast in ((tiny().bfloat16(), False), (tiny(), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, plain = train(model, **batch())
            assert use_chunked_loss(model, CHUNK).active
            got, chunked = train(model, **batch())
        assert got.loss.dtype == torch.float32
        torch.testing.assert_close(got.loss, expected.loss, atol=1e-3, rtol=0)
        for name, gradient in plain.items():
            worst = (chunked[name] - gradient).abs().max() / gradient.abs().max()
            assert worst < 0.05, name


def test_weights_of_two_dtypes_that_run_only_under_autocast() -> None:
    model = tiny().bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = train(model, **batch())
    assert use_chunked_loss(model, CHUNK).active  # outside: so does a run set it up
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = train(model, **batch())
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-3, rtol=0)


# ---- wrapped models ----


def adapted(model: Any, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    )
    return wrapped


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["LoRA on the head", "a copy of the head"],
)
def test_heads_that_peft_wraps(settings: dict[str, Any]) -> None:
    assert_equal_training(adapted(tiny(), **settings), **batch())

    early = tiny()
    use_chunked_loss(early, CHUNK)
    got, chunked = train(adapted(early, **settings), **batch())
    expected, plain = train(adapted(tiny(), **settings), **batch())
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-5)


def test_dropout_in_the_head_is_drawn_once() -> None:
    """The backward's second computation of a chunk drops what the first dropped."""
    model = adapted(tiny(), target_modules=["lm_head"], lora_dropout=0.5)
    assert use_chunked_loss(model, 1000).active
    torch.manual_seed(3)
    got, chunked = train(model, **batch(0))
    use_chunked_loss(model, 1000).undo()
    torch.manual_seed(3)
    expected, plain = train(model, **batch(0))
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-5)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("own_head", [False, True])
def test_sharded_models(own_head: bool) -> None:
    """FSDP2, where the output layer belongs to the whole model's parameters or is sharded by itself."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    expected, plain = train(tiny(), **batch())
    model: Any = tiny()
    use_chunked_loss(model, CHUNK)
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, *((model.lm_head,) if own_head else ()), model):
        fully_shard(module, mesh=mesh)
    got, chunked = train(model, **batch())
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-6, rtol=1e-6)
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in chunked.items()}
    torch.testing.assert_close(whole, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("one_process")
def test_data_parallel_models() -> None:
    expected, plain = train(tiny(), **batch())
    model = tiny()
    use_chunked_loss(model, CHUNK)
    got, chunked = train(torch.nn.parallel.DistributedDataParallel(model), **batch())
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close({f"module.{n}": g for n, g in plain.items()}, chunked, atol=1e-6, rtol=1e-5)


def test_compiled_models() -> None:
    model = tiny(num_hidden_layers=1)
    expected, plain = train(model, **batch())
    use_chunked_loss(model, 40)
    got, chunked = train(torch.compile(model, backend="eager", fullgraph=True), **batch())
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close({f"_orig_mod.{n}": g for n, g in plain.items()}, chunked, atol=1e-6, rtol=1e-5)


# ---- memory ----


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_full_logits_never_exist() -> None:
    """Neither in training nor in evaluation; a vocabulary so large that nothing else comes near."""
    vocabulary, given = 4096, batch(0)
    model = tiny(vocab_size=vocabulary)
    with LargestTensor() as plain:
        train(model, **given)
    assert plain.elements >= given["input_ids"].numel() * vocabulary
    use_chunked_loss(model, CHUNK)
    with LargestTensor() as chunked:
        train(model, **given)
    # The head's weights are the largest that is left.
    assert chunked.elements == model.get_output_embeddings().weight.numel() == 64 * vocabulary
    assert chunked.elements < plain.elements

    # Nor are chunks of them kept for the backward. Float32 logits of all tokens are 1 MB, and so would
    # be the gradients of the weights around them.
    model.get_output_embeddings().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    peaks = []
    for chunk in (CHUNK, 10**6):
        use_chunked_loss(model, chunk)
        with MemoryWatch(model.parameters(), lambda operator, args: 0) as watch:
            train(model, **given)
        peaks.append(watch.peaks[None].total)
    assert peaks[0] < peaks[1] - 2 * 4 * given["input_ids"].numel() * vocabulary

    slim = tiny(vocab_size=vocabulary, hidden_size=8, num_attention_heads=2, num_key_value_heads=2)
    with LargestTensor() as scored:
        file_losses(slim, list(tokens(2, 2000)), 1900, 100)
    # Chunks of 1024 tokens, of windows of 1900.
    assert scored.elements <= 1024 * vocabulary


def test_ignored_tokens_are_not_computed() -> None:
    model = tiny(vocab_size=512, hidden_size=8, num_attention_heads=2)
    use_chunked_loss(model, 1000)
    with LargestTensor() as seen, torch.no_grad():
        model(**batch(30))
    assert seen.elements < 33 * 512


# ---- what stays as it was ----


def test_without_labels_the_model_is_as_ever() -> None:
    model = tiny()
    expected = model(input_ids=tokens(2, 9)).logits
    text = model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False)
    use_chunked_loss(model, CHUNK)
    torch.testing.assert_close(model(input_ids=tokens(2, 9)).logits, expected, atol=0, rtol=0)
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False), text)


def test_undo_restores_everything() -> None:
    model = tiny().train()
    model.model.layers[0].eval()
    before = dict(model.__dict__), dict(model.lm_head.__dict__)
    handle = use_chunked_loss(model, CHUNK)
    assert model.training
    assert not model.model.layers[0].training
    model(**batch()).loss.backward()
    handle.undo()
    handle.undo()
    assert not handle.active
    assert (model.__dict__.keys(), model.lm_head.__dict__.keys()) == (before[0].keys(), before[1].keys())
    assert model(**batch()).logits.shape == (2, 33, VOCAB)


def test_undo_under_another_librarys_wrapper() -> None:
    model = tiny()
    handle = use_chunked_loss(model, CHUNK)
    inner = model.forward
    model.forward = functools.partial(inner)
    handle.undo()
    assert model(**batch()).logits is not None


def test_used_again_it_takes_the_new_number() -> None:
    model = tiny()
    first = use_chunked_loss(model, 8)
    second = use_chunked_loss(model, 4)
    assert (first.active, second.active, second.chunk_tokens) == (False, True, 4)
    second.undo()
    assert "forward" not in model.__dict__


def test_a_copied_model_is_its_own() -> None:
    model = tiny()
    use_chunked_loss(model, CHUNK)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.lm_head.weight)
    assert twin(**batch()).loss.item() == pytest.approx(math.log(VOCAB), abs=1e-5)
    assert model(**batch()).loss.item() != twin(**batch()).loss.item()


def test_positional_labels_and_tuples() -> None:
    model = tiny()
    expected = model(**batch()).loss
    use_chunked_loss(model, CHUNK)
    loss = model(**batch(), return_dict=False)[0]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    given = batch()
    outputs = model(given["input_ids"], None, None, None, None, given["labels"])
    torch.testing.assert_close(outputs.loss, expected, atol=1e-6, rtol=1e-6)


# ---- models that cannot ----


def test_soft_capping_keeps_the_plain_loss(caplog: pytest.LogCaptureFixture) -> None:
    model = other("Gemma2", head_dim=8, final_logit_softcapping=5.0, num_key_value_heads=2)
    expected, plain = train(model, **batch())
    with caplog.at_level(logging.WARNING, "sinklora"):
        handle = use_chunked_loss(model, CHUNK)
    assert not handle.active
    assert "full logits" in caplog.text
    assert "soft-capping" in caplog.text
    got, same = train(model, **batch())
    assert torch.equal(got.loss, expected.loss)
    assert got.logits is not None
    torch.testing.assert_close(same, plain, atol=0, rtol=0)

    ids = tokens(2, 9)
    nll = token_losses(model.eval(), ids, input_ids=ids)
    logits = model(input_ids=ids).logits
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    torch.testing.assert_close(nll, wanted, atol=1e-6, rtol=1e-6)


def test_a_loss_of_its_own_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 42
    assert not use_chunked_loss(model, CHUNK).active
    assert model(**batch()).loss == 42
    assert "loss function of its own" in caplog.text

    later = tiny()
    assert use_chunked_loss(later, CHUNK).active
    later.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 42
    assert later(**batch()).loss == 42


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_refuses_bad_numbers(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="chunk_tokens: expected"):
        use_chunked_loss(tiny(), value)


# ---- losses of single tokens ----


@pytest.mark.parametrize("wanted", ["all", "few", "none"])
def test_token_losses(wanted: str) -> None:
    model, ids = tiny(), tokens(3, 20)
    targets = tokens(3, 20, seed=1)
    if wanted != "all":
        targets[:, 2 if wanted == "few" else 0 :] = -100
        targets[1] = -100
    logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    got = token_losses(model, targets, chunk_tokens=7, input_ids=ids)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
