"""Rivals compute what they say, timing and memory measure what they say, every script runs, and the README's
figures are the newest results'."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
from benchmark_support import rows_of, run_script

import sinklora

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
SMALL = ("--dtypes", "float32", "--rounds", "1", "--threads", "1")


def s2_mask(heads: int, tokens: int, group: int) -> torch.Tensor:
    """The wrapped mask by rolling token numbers: (H, N, N) bool."""
    shifted = torch.arange(heads) >= heads - heads // 4
    token = torch.arange(tokens)
    place = torch.where(shifted[:, None], (token - group // 2) % tokens, token)
    same = place[:, :, None] // group == place[:, None, :] // group
    return same & (place[:, None, :] <= place[:, :, None])


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (4, 2), (2, 2)])
def test_s2_forms_compute_the_wrapped_s2_attention(load, heads: int, kv_heads: int) -> None:
    rivals = load("rivals")
    torch.manual_seed(7)
    tokens, group = 48, 12
    query = torch.randn(2, tokens, heads, 8).transpose(1, 2)
    key, value = (torch.randn(2, tokens, kv_heads, 8).transpose(1, 2) for _ in range(2))
    mask = s2_mask(heads, tokens, group)
    assert int(mask.sum()) == rivals.s2_pairs(heads, tokens, group)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    for form in (rivals.s2_one_batch, rivals.s2_parts):
        torch.testing.assert_close(form(query, key, value, group), expected)
    case = load("shapes").Case("float32", heads, kv_heads, tokens, 8, group)
    for name, form in load("bench_rivals").forms(case).items():
        assert torch.allclose(form(query, key, value), expected, atol=1e-5), name


def test_s2_forms_refuse_a_short_group(load) -> None:
    rivals = load("rivals")
    x = torch.zeros(1, 2, 10, 8)
    for form in (rivals.s2_one_batch, rivals.s2_parts):
        with pytest.raises(ValueError, match="multiple of group_size 4, got 10"):
            form(x, x, x, 4)


@pytest.mark.parametrize("shift", [None, 0, 3])
def test_the_flex_rival_has_our_pattern(load, shift: int | None) -> None:
    pattern = sinklora.SFPattern(group_size=10, num_sink_tokens=3, shift=shift)
    allowed = load("rivals").flex_mask(pattern, 4)
    token = torch.arange(37)
    mask = allowed(torch.tensor(0), torch.arange(4)[:, None, None], token[:, None], token[None, :])
    assert torch.equal(mask, torch.from_numpy(pattern.mask(4, 37)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "group"), [(8, 2, 512, 128), (2, 2, 300, 100)])
def test_the_flex_rival_computes_our_function(
    load, heads: int, kv_heads: int, tokens: int, group: int
) -> None:
    pattern = sinklora.SFPattern(group_size=group)
    torch.manual_seed(11)
    query, key, value = (torch.randn(1, tokens, n, 16).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
    with torch.no_grad():
        out = load("rivals").flex(pattern, heads, kv_heads, tokens)(query, key, value)
    assert torch.allclose(out, sinklora.sf_attention(query, key, value, pattern), atol=1e-5)


def test_dense_rival_and_pairs(load) -> None:
    shapes = load("shapes")
    case = shapes.Case.parse("float32", "4/2/30/8/10")
    whole = sinklora.SFPattern(group_size=30, shifted_fraction=0.0, num_sink_tokens=0)
    assert shapes.candidate("dense", case).pairs == whole.mask(4, 30).sum()
    pattern = sinklora.SFPattern(group_size=10)
    assert shapes.candidate("sinklora", case).pairs == pattern.mask(4, 30).sum()


@pytest.mark.parametrize("shape", ["8/8/64/128", "8/8/64/0/8", "a/8/64/8/8"])
def test_a_bad_shape_is_refused(load, shape: str) -> None:
    with pytest.raises(ValueError):
        load("shapes").Case.parse("float32", shape)


def test_interleave_takes_turns_and_counts(load) -> None:
    timing = load("timing")
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timing.interleave(calls, rounds=3, warmup=1, drop_disturbed=False)
    assert order == list("abc") + list("abc") + list("bca") + list("cab")
    assert all(len(taken.seconds) == 3 and taken.quiet for taken in timings.values())


def test_disturbed_samples_are_dropped_together(load, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = load("timing")
    script = iter([(1.0, False), (9.0, True), (2.0, False), (9.0, False), (3.0, False)])
    monkeypatch.setattr(timing, "sample", lambda call: next(script))
    timings = timing.interleave({"a": lambda: None, "b": lambda: None}, rounds=2, warmup=0)
    # a 1, b 9 (disturbed); round two begins with b: b 2, a 9; round three: b 3.
    assert timings["a"] == timing.Timing((1.0, 9.0))
    assert timings["b"] == timing.Timing((2.0, 3.0), dropped=1)
    monkeypatch.setattr(timing, "sample", lambda call: call())
    calls = {"quiet": lambda: (1.0, False), "busy": lambda: (5.0, True)}
    timings = timing.interleave(calls, rounds=2, warmup=0)
    assert not timings["quiet"].quiet and not timings["busy"].quiet
    timings = timing.interleave(calls, rounds=2, warmup=0, drop_disturbed=False)
    assert timings["quiet"].quiet and timings["busy"].seconds == (5.0, 5.0)


def test_timing_measures_and_summarises(load) -> None:
    timing = load("timing")
    seconds, _ = timing.sample(lambda: time.sleep(0.02))
    assert 0.02 <= seconds < 2
    taken = timing.Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert taken.median == 3.0 and taken.quartiles == (2.0, 4.0)
    assert timing.Timing((2.0, 1.0)).quartiles == (1.0, 2.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_sees_what_was_freed_again(load) -> None:
    memory = load("memory")

    def call() -> None:
        torch.ones(64 * MIB // 4)
        torch.ones(16 * MIB // 4)

    peak = memory.peak_extra_bytes(call)
    # The allocator may keep a block from before, or the first of these; measure() starts a fresh process.
    assert 56 * MIB < peak < 88 * MIB
    case = load("shapes").Case.parse("float32", "4/4/4096/64/1024")
    peak = memory.measure("s2_parts", "float32", "4/4/4096/64/1024", "forward", 1)
    assert case.output_bytes() < peak < 40 * MIB


def test_bars_name_the_failing_case(load) -> None:
    bench, report, shapes = load("bench_attention"), load("report"), load("shapes")
    case = shapes.Case.parse("float32", "8/2/8192/128/2048")

    def judged(speed: float, extra: int) -> str:
        rows = [
            report.Row.of(case, "attention", shapes.BOTH, name) for name in ("sinklora", *shapes.S2_FORMS)
        ]
        for row, seconds in zip(rows, (1.0, speed + 1, speed), strict=True):
            row.seconds = seconds
        rows[0].extra_bytes, rows[0].bound_bytes = extra, 100 * MIB
        bench.add_speedups(rows)
        bench.judge(rows[0], case, shapes.BOTH, 2)
        return rows[0].verdict

    assert judged(1.5, 100 * MIB) == "pass; pass"
    assert judged(1.49, 101 * MIB) == "FAIL; FAIL"
    assert not bench.matching_bars(case, shapes.BOTH, threads=1)
    row = report.Row.of(case, "attention", shapes.BOTH, "sinklora")
    bench.judge(row, case, shapes.BOTH, 2)
    assert row.verdict == "not measured"


def test_bench_attention_runs(tmp_path: Path, load) -> None:
    output = tmp_path / "attention.csv"
    shape = "4/2/128/16/32"
    text = run_script(
        "bench_attention.py", *SMALL, "--shapes", shape, "--long-shapes", shape, "--keep-disturbed",
        "--candidates", "sinklora", "s2_one_batch", "s2_parts", "dense", "--no-memory", "--no-tiny",
        "--output", str(output),
    )  # fmt: skip
    rows = rows_of(output)
    assert "forward+backward float32 H4/2 N128 D16 G32" in text
    assert len(rows) == 12 and all(float(row["seconds"]) > 0 and float(row["gflops"]) > 0 for row in rows)
    ours = rows[0]
    assert float(ours["over_s2"]) > 0 and float(ours["over_dense"]) > 0
    assert ours["cpu"] and ours["commit"] and ours["torch"] == torch.__version__
    table = load("tables").figures(tmp_path)
    assert ours["commit"] in table


def test_bench_attention_shows_what_it_leaves_out(tmp_path: Path) -> None:
    output = tmp_path / "attention.csv"
    text = run_script(
        "bench_attention.py", *SMALL, "--shapes", "2/2/100/16/32", "--long-shapes",
        "--candidates", "sinklora", "s2_parts", "--no-memory", "--no-tiny", "--output", str(output),
    )  # fmt: skip
    assert "needs num_tokens a multiple of group_size" in text
    assert [row["note"] != "" for row in rows_of(output) if row["candidate"] == "s2_parts"] == [True, True]


def test_bench_training_step_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = tmp_path / "step.csv"
    run_script(
        "bench_training_step.py", "--tokens", "64", "--dtypes", "float32", "--hidden", "32", "--layers", "1",
        "--heads", "4", "--vocabulary", "32", "--rounds", "1", "--threads", "1", "--output", str(output),
    )  # fmt: skip
    rows = rows_of(output)
    assert [row["attention"] for row in rows] == ["sinklora", "full", "s2"]
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_bench_rivals_runs() -> None:
    text = run_script(
        "bench_rivals.py",
        "--dtypes",
        "float32",
        "--shapes",
        "4/2/32/16/16",
        "--rounds",
        "1",
        "--threads",
        "1",
    )
    assert "parts cat enable_gqa" in text


def test_pages_hold_the_newest_figures(load) -> None:
    tables = load("tables")
    for path, make in tables.PAGES.items():
        held = tables.between_markers(path.read_text(encoding="utf-8"))
        assert held == "\n" + make(), f"{path.name}: run benchmarks/tables.py --write"


def test_half_a_pair_of_markers_is_an_error(load) -> None:
    tables = load("tables")
    assert tables.between_markers("no figures") is None
    assert tables.between_markers(f"a{tables.BEGIN}x{tables.END}b") == "x"
    for text in (f"{tables.BEGIN} x", f"{tables.END} x {tables.BEGIN}"):
        with pytest.raises(ValueError, match="expected"):
            tables.between_markers(text)
