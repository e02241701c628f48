"""The heavy-hitter cache's rivals compute what they say, the bars judge, the script runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmark_support import rows_of, run_script

torch = pytest.importorskip("torch")

MIB = 2**20


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(8, 2, 300), (4, 4, 256), (3, 1, 7)])
def test_prompt_rivals_give_output_and_column_sums(load, heads: int, kv_heads: int, tokens: int) -> None:
    rivals = load("rivals_h2o")
    torch.manual_seed(3)
    query = torch.randn(2, tokens, heads, 16).transpose(1, 2)
    key, value = (torch.randn(2, tokens, kv_heads, 16).transpose(1, 2) for _ in range(2))
    each = heads // kv_heads
    logits = query.double() @ key.double().repeat_interleave(each, 1).transpose(2, 3) / math.sqrt(16)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    probability = logits.masked_fill(future, -math.inf).softmax(-1)
    expected = (probability @ value.double().repeat_interleave(each, 1)).float()
    scores = probability.sum(2).view(2, kv_heads, each, tokens).sum(2).float()
    for way in (rivals.prompt_eager, rivals.prompt_chunked):
        found = way(query, key, value)
        torch.testing.assert_close(found, (expected, scores), atol=1e-4, rtol=1e-4, msg=way.__name__)
    torch.testing.assert_close(rivals.prompt_sdpa(query, key, value), expected, atol=1e-4, rtol=1e-4)


def test_step_rivals_agree_and_keep_the_same(load) -> None:
    """Each against a list of entries: outputs, and which keys are left after 20 steps."""
    rivals, ways = load("rivals_h2o"), load("h2o_ways")
    torch.manual_seed(5)
    case = ways.Case("float32", 4, 2, 9, 8)
    steps = [(case.random(4, 1), case.random(2, 1), case.random(2, 1)) for _ in range(20)]
    first_key, first_value, first_scores = ways._entries(case, 8)

    def fresh(name: str) -> object:
        if name == "published":
            return rivals.Slots(
                first_key, first_value, first_scores, torch.arange(8).expand(1, 2, 8), torch.zeros(0), 8, 4
            )
        # The free slot, which the others have, in front of the same entries.
        pad = torch.nn.functional.pad
        positions = torch.arange(-1, 8).expand(1, 2, 9).contiguous()
        key, value = pad(first_key, (0, 0, 1, 0)), pad(first_value, (0, 0, 1, 0))
        free = torch.zeros(1, 2, 1, dtype=torch.int64)
        return rivals.Slots(key, value, pad(first_scores, (1, 0)), positions, free, 8, 4)

    names = [name for name in ways.STEP_RIVALS if "alone" not in name]
    caches = {name: fresh(name) for name in names}
    for query, new_key, new_value in steps:
        outputs = [ways.STEP_RIVALS[name](caches[name], query, new_key, new_value) for name in names]
        for name, output in zip(names, outputs, strict=True):
            torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5, msg=name)

    def kept(name: str) -> list[list[float]]:
        key = caches[name].key[0, :, :, 0]
        if name != "published":
            left = torch.ones(2, 9, dtype=torch.bool).scatter_(1, caches[name].free[0], False)
            key = key[left].view(2, 8)
        return key.sort().values.tolist()

    assert all(kept(name) == kept(names[0]) for name in names)
    newest = sorted(float(new_key[0, 0, 0, 0]) for _, new_key, _ in steps[-4:])
    assert set(newest) <= set(kept(names[0])[0])


def test_bars_judge_the_fastest_rival(load) -> None:
    rows, ways = load("h2o_rows"), load("h2o_ways")
    case = ways.Case("bfloat16", 8, 2, 4096, 128)

    def step(seconds: dict[str, float]) -> list[object]:
        found = []
        for name, value in seconds.items():
            row = rows.Row.of(rows.STEP, case, name)
            row.seconds, row.gigabytes = value, 10.0 / value
            found.append(row)
        rows.add_ratios(found)
        return found

    def verdict(measured: list[object], what: str) -> tuple[str, ...]:
        return next(line for line in rows.verdicts(measured) if what in line[0] and "bfloat16" in line[0])

    slow = step({ways.OURS: 1.0, "eager": 3.9, "sdpa + scores": 9.0, "published": 2.0, ways.READS[0]: 0.8})
    assert verdict(slow, "over the fastest")[1:] == ("3.90x", ">= 4.00x", "FAIL")
    assert verdict(slow, "read bandwidth")[1:] == ("80%", ">= 85%", "FAIL")
    fast = step({ways.OURS: 1.0, "eager": 4.1, "sdpa + scores": 9.0, "published": 2.0, ways.READS[0]: 0.9})
    assert verdict(fast, "over the fastest")[3] == verdict(fast, "read bandwidth")[3] == "pass"
    assert verdict([], "over the fastest")[3] == "not measured"


def test_cache_share_is_of_real_storages(load) -> None:
    transformers = pytest.importorskip("transformers")
    rows, model = load("h2o_rows"), load("h2o_model")
    cache = transformers.DynamicCache()
    whole = torch.zeros(1, 2, 100, 8)
    for layer in range(5):
        cache.update(whole[:, :, :10].clone(), whole[:, :, 10:20].clone(), layer)
    assert model.storage_bytes(cache) == 5 * 2 * (2 * 10 * 8 * 4)
    cache.layers = cache.layers[:1]
    cache.layers[0].keys = cache.layers[0].values = whole[:, :, :10]  # two views of one storage
    assert model.storage_bytes(cache) == whole.nbytes
    measured = []
    for name, size in ((rows.DYNAMIC, 100), ("H2O 20 %", 23)):
        row = rows.Row.of(rows.GENERATE, model.Shape().case(), name)
        row.cache_bytes = size
        measured.append(row)
    assert rows.cache_share(measured) == pytest.approx(0.23)
    assert rows.verdicts(measured)[-1][3] == "FAIL"


@pytest.mark.parametrize("shape", ["8/8/64", "8/0/64/8", "a/8/64/8"])
def test_a_bad_shape_is_refused(load, shape: str) -> None:
    with pytest.raises(ValueError):
        load("h2o_ways").Case.parse("float32", shape)


def test_eager_is_left_out_where_it_does_not_fit(load) -> None:
    ways = load("h2o_ways")
    assert not ways.skip_reason(ways.EAGER, ways.Case("bfloat16", 8, 2, 8192, 128))
    assert "GiB" in ways.skip_reason(ways.EAGER, ways.Case("bfloat16", 8, 2, 32768, 128))


def test_bench_h2o_runs(tmp_path: Path, load) -> None:
    pytest.importorskip("transformers")
    output = tmp_path / "h2o.csv"
    text = run_script(
        "bench_h2o.py", "--quick", "--dtypes", "bfloat16", "--threads", "1", "--rounds", "1", "--no-memory",
        "--keep-disturbed", "--output", str(output),
    )  # fmt: skip
    assert "step with scores and eviction" in text
    ways, model = load("h2o_ways"), load("h2o_model")
    rows = rows_of(output)
    assert [row["way"] for row in rows if row["section"] == "prompt"] == list(ways.PROMPT_WAYS)
    assert [row["way"] for row in rows if row["section"] == "step"] == list(ways.STEP_WAYS)
    assert [row["way"] for row in rows if row["section"] == "model's step"] == list(model.WAYS)
    assert all(float(row["seconds"]) > 0 for row in rows)
    # The README shows longer prompts only, and not every budget.
    tables = load("tables_h2o")
    steps, models = tables.tables(rows)
    assert steps.count("\n") == 2 and models.count("\n") == 1 + len(model.WAYS) - len(tables.LEFT_OUT_WAYS)
