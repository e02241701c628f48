"""A saved cache continues with the same bits; files that are not one are refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_support import assert_same, one_by_one, patched, prefill
from hf_support import tokens
from safetensors import safe_open
from safetensors.torch import save_file

from sinklora import H2OCache

KEY = "sinklora.H2OCache"


def _used(model: Any, **options: Any) -> H2OCache:
    cache = H2OCache(model.config, **{"heavy": [4, 0.2], "recent": 3, "num_sink_tokens": 1, **options})
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :9] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    prefill(model, cache, tokens(2, 20), attention_mask=mask, position_ids=places)
    one_by_one(model, cache, tokens(2, 3, seed=1))
    return cache


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "cache", "score_window": 4, "group_reduction": "mean"},
        {"heavy": 100},
        {"record": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_cache_goes_on(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = patched().to(dtype)
    cache = _used(model, **options)
    before = copy.deepcopy(cache)
    with torch.inference_mode():
        cache.save(tmp_path / "cache")
        loaded = H2OCache.load(tmp_path / "cache", config=model.config)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    (tmp_path / "cache").write_bytes(b"")  # a loaded cache does not lean on its file
    assert_same(loaded, cache)
    for turn in (tokens(2, 1, seed=2), tokens(2, 5, seed=3), *tokens(2, 6, seed=4).split(1, 1)):
        assert torch.equal(prefill(model, loaded, turn), prefill(model, cache, turn))
    assert_same(loaded, cache)
    for found, expected in zip(loaded.layers, before.layers, strict=True):
        assert (found.settings, found.budget) == (expected.settings, expected.budget)
    if "record" in options:
        timelines = [each.layers[0].timeline.kept_at(1, 8).tolist() for each in (loaded, cache)]
        assert timelines[0] == timelines[1]


def test_every_step_can_be_saved(tmp_path: Path) -> None:
    """A row whose slots are all in use has its free slot behind them, where the next step makes one."""
    model, path = patched(), tmp_path / "cache"
    cache = H2OCache(model.config, heavy=90, recent=9)
    for ids in (tokens(1, 5), *tokens(1, 70).split(1, 1)):
        prefill(model, cache, ids)
        cache.save(path)
        assert_same(H2OCache.load(path), cache)
    assert cache.layers[0].keys.shape[2] > 75  # one growth lies within


def test_an_empty_cache_is_saved_too(tmp_path: Path) -> None:
    model = patched()
    H2OCache(model.config, heavy=0.5, recent=1).save(tmp_path / "cache")
    loaded = H2OCache.load(str(tmp_path / "cache"))
    prefill(model, loaded, tokens(1, 20))
    assert loaded.kept_positions(0).shape[2] == 11


def test_nothing_of_the_memory_is_written(tmp_path: Path) -> None:
    """Slots that are not in use hold whatever was in memory."""
    cache = _used(patched())
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        layer.keys[layer.positions < 0] = 7.0
        layer.values[layer.positions < 0] = 7.0
    cache.save(tmp_path / "a")
    twin.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, path = _used(patched()), tmp_path / "cache"
    cache.save(path)
    before = path.read_bytes()

    def fail(tensors: Any, name: Any, **options: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("sinklora.cache.file.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        cache.save(path)
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_where_a_cache_is_saved(tmp_path: Path) -> None:
    """Through a link to what it points to; not where there is no folder."""
    cache, link = _used(patched()), tmp_path / "link"
    link.symlink_to(tmp_path / "cache")
    cache.save(link)
    assert link.is_symlink()
    assert_same(H2OCache.load(tmp_path / "cache"), cache)
    with pytest.raises(OSError, match="No such f"):
        cache.save(tmp_path / "none" / "cache")
    with pytest.raises(OSError, match="directory"):
        cache.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "link"]


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_a_pickled_cache_goes_on(positions: str) -> None:
    model = patched()
    cache = _used(model, positions=positions)
    found = pickle.loads(pickle.dumps(cache))
    assert torch.equal(prefill(model, found, tokens(2, 2)), prefill(model, cache, tokens(2, 2)))
    assert_same(found, cache)


def test_saving_in_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        _used(patched()).save(tmp_path / "missing" / "cache")


def test_models_of_another_shape(tmp_path: Path) -> None:
    model, path = patched(), tmp_path / "cache"
    _used(model).save(path)
    for changes, words in (
        ({"num_hidden_layers": 3}, "num_hidden_layers 3.*got 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4.*got 2"),
        ({"head_dim": 16}, "head_dim 16.*got 8"),
    ):
        other = patched(**changes)
        with pytest.raises(ValueError, match=words):
            H2OCache.load(path, config=other.config)
    loaded = H2OCache.load(path)
    with pytest.raises(ValueError, match=r"another model or another batch"):
        prefill(patched(num_key_value_heads=4), loaded, tokens(2, 1))
    with pytest.raises(RuntimeError, match="sdpa"):
        unpatched = patched()
        unpatched.set_attn_implementation("sdpa")
        prefill(unpatched, H2OCache.load(path, config=unpatched.config), tokens(2, 1))


Contents = tuple[dict[str, torch.Tensor], dict[str, Any]]


def _contents(path: Path) -> Contents:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()[KEY])  # noqa: SIM118


def _set(name: str, index: tuple[int, ...], value: float) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        contents[0][name][index] = value

    return change


def _say(name: str, value: Any) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        contents[1][name] = value

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c[0].update({"layers.9.keys": torch.zeros(1)}), r"unknown \['layers.9.keys'\]"),
        (lambda c: c[0].pop("layers.1.scores"), r"missing \['layers.1.scores'\]"),
        (
            lambda c: c[0].update({"layers.1.keys": c[0]["layers.1.keys"][..., :4].clone()}),
            "layers.1.keys.*shape",
        ),
        (
            lambda c: c[0].update({"layers.0.rows": c[0]["layers.0.rows"].long()}),
            "layers.0.rows.*int32.*int64",
        ),
        (lambda c: c[0].update({"layers.0.keys": c[0]["layers.0.keys"].double()}), "keys.*float64"),
        (_set("layers.0.rows", (0, 1), 10_000), "layers.0.*agree"),
        (_set("layers.0.rows", (0, 2), 3), "layers.0.*agree"),
        (_set("layers.1.free_slot", (1, 0), -3), "layers.1.*agree"),
        (_set("layers.1.free_slot", (1, 0), 100), "layers.1.*agree"),
        (_set("layers.0.positions", (0, 0, 0), 500), "layers.0.*agree"),
        (_set("layers.0.positions", (0, 0, 0), -1), "layers.0.*agree"),
        (_set("layers.0.positions", (0, 0, 0), -2), "layers.0.*agree"),
        (_set("layers.0.scores", (0, 0, 0), float("nan")), "layers.0.*agree"),
        (_set("layers.0.free_slot", (0, 0), 8), "layers.0.*agree"),
        (_say("format", 2), "format 1.*2"),
        (_say("more", 2), "fields.*more"),
        (_say("budgets", []), "budgets"),
        (_say("budgets", [[4, 0, 0], [4, 4, 0]]), "recent"),
        (_say("budgets", 5), "budgets: expected list, got 5"),
        (_say("settings", {}), "settings"),
        (_say("prompt", [1]), "prompt.*2 numbers.*got 1"),
        (_say("prompt", [-4, 2]), "prompt|agree"),
        (_say("prompt", None), "prompt: expected list, got None"),
        (_say("columns", -1), "columns.*-1"),
        (_say("clean", 100), "clean.*100"),
        (_say("evicted", []), "evicted"),
    ],
)
def test_contents_that_do_not_agree(change: Callable[[Contents], None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _used(patched()).save(path)
    contents = _contents(path)
    change(contents)
    save_file(contents[0], path, metadata={KEY: json.dumps(contents[1])})
    with pytest.raises(ValueError, match=rf"(?s)cache.*{words}"):
        H2OCache.load(path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _used(patched()).save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cache.*whole safetensors file"):
            H2OCache.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"cache.*H2OCache\.save"):
        H2OCache.load(path)
    save_file({"x": torch.zeros(1)}, path, metadata={KEY: "{"})
    with pytest.raises(ValueError, match="cache"):
        H2OCache.load(path)
    save_file({"x": torch.zeros(1)}, path, metadata={KEY: "[" * 100_000})
    with pytest.raises(ValueError, match="cache"):
        H2OCache.load(path)
    with pytest.raises(FileNotFoundError):
        H2OCache.load(tmp_path / "none")
