"""The benchmarks on a CUDA device, as far as they go without one: options, rows, bars, tables, timers."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_support import rows_of, run_script, start_script

import sinklora

Load = Callable[[str], ModuleType]


class FakeTimer:
    """Runs every call once and says that each took as many milliseconds as there were samples before."""

    def __init__(self) -> None:
        self.samples = 0

    def sample(self, call: Callable[[], object], cache: str) -> float:
        self.samples += 1
        call()
        return 1e-3 * self.samples


def options(**given: object) -> Namespace:
    return Namespace(rounds=2, quick=True, no_memory=True, **given)


@pytest.mark.parametrize("script", ["bench_attention.py", "bench_h2o.py"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_the_scripts_say_so(script: str) -> None:
    done = start_script(script, "--device", "cuda")
    assert done.returncode == 2, done.stderr
    assert f"--device cuda: torch {torch.__version__} sees no CUDA device" in done.stderr


def test_a_build_without_cuda_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    device = load("device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sinklora._C, "build_info", lambda: {"cuda": False})
    assert "built without CUDA" in device.refusal()
    monkeypatch.setattr(sinklora._C, "build_info", lambda: {"cuda": True})
    assert device.refusal() == ""


def test_the_devices_defaults_are_its_own(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, h2o = load("bench_attention"), load("bench_h2o")
    monkeypatch.setattr(load("device"), "refusal", lambda: "")
    on_device = attention.parse_arguments(["--device", "cuda", "--candidates", "sinklora", "dense cudnn"])
    assert (on_device.rounds, on_device.dtypes) == (50, ["bfloat16"])
    assert on_device.candidates == ["sinklora", "dense cudnn"] and "32/32/32768/128/8192" in on_device.shapes
    assert attention.parse_arguments(["--device", "cuda", "--quick"]).shapes == ["8/2/2048/64/512"]
    here = attention.parse_arguments([])
    assert (here.device, here.rounds, here.candidates) == ("cpu", 7, list(attention.NAMES))
    assert here.shapes == list(attention.SHAPES) and len(here.dtypes) == 3
    assert h2o.parse_arguments(["--device", "cuda"]).slots == [4096, 32768]
    assert h2o.parse_arguments([]).tokens == list(h2o.TOKENS)
    with pytest.raises(SystemExit):
        attention.parse_arguments(["--device", "cuda", "--candidates", "s2_parts"])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("shift", [None, 3])
def test_flex_attention_uncompiled_computes_our_function(
    load: Load, shift: int | None, fraction: float
) -> None:
    """The mask function as FlexAttention itself uses it, with gradients."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern = sinklora.SFPattern(group_size=48, num_sink_tokens=5, shift=shift, shifted_fraction=fraction)
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, 130, 16) for heads in (4, 2, 2))
    allowed = load("rivals").flex_mask(pattern, 4)
    mask = create_block_mask(allowed, 1, 4, 130, 130, device="cpu", BLOCK_SIZE=32)
    out = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, sinklora.sf_attention(query, key, value, pattern), atol=1e-5, rtol=1e-5)


def test_interleave_takes_turns_and_samples_slow_calls_less(load: Load) -> None:
    device = load("device")
    order: list[str] = []
    slow = {"a": 1e-6, "b": 1e-6, "slow": 1.0}

    class Timer:
        def sample(self, call: Callable[[], object], cache: str) -> float:
            name = str(call())
            order.append(f"{name} {cache}")
            return slow[name]

    calls = {name: device.Call(lambda _, name=name: name) for name in slow}
    timings = device.interleave(calls, Timer(), rounds=20, warmup=1)
    assert order[:3] == ["a warm", "b warm", "slow warm"]
    first, second = order[3:9], order[9:15]
    assert first == ["a cold", "a warm", "b cold", "b warm", "slow cold", "slow warm"]
    assert second == first[2:] + first[:2]
    assert len(timings["a", "cold"].seconds) == 20 and len(timings["slow", "warm"].seconds) == 10


def test_prepared_state_is_made_anew_for_each_run(load: Load) -> None:
    device = load("device")
    numbers = iter(range(9))
    call = device.Call(lambda state: state * 10, lambda: next(numbers))
    assert [call(), call()] == [0, 10]


def test_attention_rows_of_a_fake_timer(load: Load, tmp_path: Path) -> None:
    attention, shapes, rows = load("device_attention"), load("shapes"), load("device_rows")
    case = shapes.Case.parse("float32", "4/2/64/16/16")
    names = ["sinklora", "s2_one_batch flash", "s2_parts flash", "dense flash", "s2_parts cudnn"]
    measured = attention.measure(case, options(candidates=names), FakeTimer(), place="cpu")
    # The CPU has no cuDNN: the row stays and says why.
    assert [(row.direction, row.implementation, row.l2) for row in measured[:4]] == [
        ("forward", "sinklora", "cold"),
        ("forward", "sinklora", "warm"),
        ("forward", "s2_one_batch flash", "cold"),
        ("forward", "s2_one_batch flash", "warm"),
    ]
    skipped = [row for row in measured if row.implementation == "s2_parts cudnn"]
    assert len(skipped) == 2 and all(
        row.note.startswith("skipped: ") and row.seconds == "" for row in skipped
    )
    assert len(measured) == 2 * (4 * 2 + 1)
    ours = measured[0]
    pairs = sinklora.SFPattern(16).flops(4, 64, 1) // 4
    assert ours.tflops == pytest.approx(4 * 16 * pairs / ours.seconds / 1e12)
    assert ours.over_ours == 1.0 and measured[2].over_ours == pytest.approx(
        measured[2].seconds / ours.seconds
    )
    output = tmp_path / "attention-cuda.csv"
    attention.show(measured, {"gpu": "none", "commit": "x"}, output)
    written = rows_of(output)
    assert len(written) == len(measured) and written[0]["gpu"] == "none"
    # tables.py takes the newest file with one of these columns for the README.
    assert not {"candidate", "attention", "way"} & set(written[0])
    assert len(rows.figures(measured).lines) == len(measured)


def test_h2o_rows_of_a_fake_timer(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h2o, ways = load("device_h2o"), load("h2o_ways")
    monkeypatch.setattr(h2o, "num_cold_caches", lambda case: 3)
    case = ways.Case("float32", 4, 2, 64, 16)
    with torch.no_grad():
        prompts = h2o.measure_prompt(case, options(), FakeTimer())
        steps = h2o.measure_step(case, options(), FakeTimer(), lambda call: call)
    assert [row.implementation for row in prompts if row.l2 == "cold"] == [
        way for way in h2o.PROMPT_WAYS if "cudnn" not in way
    ]
    assert [row.implementation for row in steps if row.l2 == "warm"] == [
        way for way in ways.STEP_WAYS if way != "published"
    ]
    assert all(row.note for row in steps if row.implementation == "published")
    cold, warm = steps[:2]
    assert (cold.implementation, cold.l2, warm.l2) == ("sinklora", "cold", "warm")
    output = tmp_path / "h2o-cuda.csv"
    assert h2o.show([*prompts, *steps], {"gpu": "none"}, output) == 0
    assert len(rows_of(output)) == len(prompts) + len(steps)


def test_bars_judge_on_their_device(load: Load) -> None:
    attention, h2o, rows = load("device_attention"), load("device_h2o"), load("device_rows")
    shapes, ways = load("shapes"), load("h2o_ways")

    def judged(gpu: str, forward: float, flex: float) -> dict[str, tuple[str, ...]]:
        case = shapes.Case.parse("bfloat16", "32/32/8192/128/2048")
        times = {"sinklora": forward, "s2_parts cudnn": forward * 2, "s2_one_batch flash": 9.0, "flex": flex}
        made = []
        for name, milliseconds in times.items():
            made.append(attention.new_row(case, "forward", name, "cold"))
            made[-1].seconds = milliseconds * 1e-3
        rows.add_ratios(made)
        table = rows.verdicts(attention.bars(made), gpu)
        return {line[0]: tuple(line[1:]) for line in table.lines}

    name = "forward bfloat16 H32 D128 N8192 G2048"
    good = judged("NVIDIA H200", 0.44, 0.5)
    assert good[name] == ("0.44 ms", "<= 0.45 ms", "pass")
    assert good[f"{name}, over S2"] == ("2x", ">= 1x", "pass")
    assert good[f"{name}, over flex"][2] == "pass"
    bad = judged("NVIDIA H200", 0.46, 0.4)
    assert bad[name][2] == bad[f"{name}, over flex"][2] == "FAIL"
    assert judged("NVIDIA A100", 0.46, 0.5)[name] == ("0.46 ms", "<= 0.45 ms", "for H200")
    assert good["backward bfloat16 H32 D128 N8192 G2048"] == ("-", "<= 1.5 ms", "not measured")

    prompt, step = (ways.Case("bfloat16", 32, 8, tokens, 128) for tokens in (32768, 4096))
    made = [
        h2o.new_row(h2o.PROMPT, prompt, ways.FORWARD, "cold"),
        h2o.new_row(h2o.PROMPT, prompt, ways.SCORES, "cold"),
        h2o.new_row(h2o.STEP, step, ways.OURS, "cold"),
    ]
    for row, seconds in zip(made, (1e-2, 0.91e-2, 15e-6), strict=True):
        row.seconds = seconds
    lines = rows.verdicts(h2o.bars(made), "NVIDIA H200").lines
    assert [line[1:] for line in lines] == [("0.91x", "<= 0.9x", "FAIL"), ("15 us", "<= 15 us", "pass")]
    assert h2o.show(made, {"gpu": "H200"}, None, fail=True) == 1


def test_the_prediction_stands_beside_the_measured_rate(load: Load, tmp_path: Path) -> None:
    attention, shapes, report = load("device_attention"), load("shapes"), load("report")
    static, model = load("cuda_rows"), load("cuda_model")
    made = [
        static.Row(
            *("attention_forward<bfloat16, 128>", "sm_80", 255, 0, 0, 0, 0, 128, 640, 2.5, "", part.name),
            *(2, 8, "registers", "tensor", 0.5, 0.4, 100.0 + i),
        )
        for i, part in enumerate(model.PARTS)
    ]
    report.write_csv(tmp_path / "2026-01-01-cuda-static.csv", made, {"date": "2026-01-01"})
    row = attention.new_row(
        shapes.Case.parse("bfloat16", "32/32/8192/128/2048"), "forward", "sinklora", "cold"
    )
    row.tflops = 50.5
    for gpu, best in (("NVIDIA H200", 101), ("NVIDIA GeForce RTX 4090", 102), ("NVIDIA A100-SXM4-80GB", 100)):
        (line,) = attention.predictions([row], gpu, tmp_path).lines
        assert line[1:] == ("50", f"{best}", f"{50.5 / best:.0%}")
    assert not attention.predictions([row], "NVIDIA B200", tmp_path).lines
    assert not attention.predictions([row], "NVIDIA H200", tmp_path / "none").lines


def test_what_nvidia_smi_says(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    device = load("device")
    found = device.parse_smi("NVIDIA H200, 580.159, 1980, 1980, 3201, 650.1, 700.0, 51, 0x0000000000000004")
    assert (found["gpu"], found["sm_mhz"], found["throttled"]) == (
        "NVIDIA H200",
        "1980",
        "0x0000000000000004",
    )
    assert set(device.parse_smi("")) == set(device.SMI)
    monkeypatch.setenv("PATH", "")
    assert device.smi() == dict.fromkeys(device.SMI, "")


# ---- on a device ----


@pytest.mark.gpu
def test_events_time_the_device_and_not_the_host(load: Load, cuda: torch.device) -> None:
    timing, timer = load("device"), load("device").EventTimer()
    cycles = 20_000_000
    short, long = (timing.Call(lambda _, n=n: torch.cuda._sleep(n)) for n in (cycles, 4 * cycles))
    for cache in timing.CACHES:
        ratio = timer.sample(long, cache) / timer.sample(short, cache)
        assert ratio == pytest.approx(4, rel=0.2), cache
    idle = timing.Call(lambda _: time.sleep(1e-3), lambda: time.sleep(0.1))
    assert timer.sample(idle, timing.COLD) < 0.01


@pytest.mark.gpu
def test_a_captured_call_runs_again(load: Load, cuda: torch.device) -> None:
    x = torch.zeros(4, device=cuda)
    replay = load("device").captured(lambda: x.add_(1))
    before = x.clone()
    replay()
    assert torch.equal(x, before + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("script", "given"),
    [("bench_attention.py", ()), ("bench_h2o.py", ("--tokens", "512", "--slots", "512", "--no-memory"))],
    ids=["attention", "h2o"],
)
def test_the_scripts_run(script: str, given: tuple[str, ...], tmp_path: Path, cuda: torch.device) -> None:
    output = tmp_path / "figures.csv"
    run_script(script, "--device", "cuda", "--quick", *given, "--output", str(output))
    rows = rows_of(output)
    assert all(float(row["seconds"]) > 0 for row in rows if row["implementation"] == "sinklora")
    assert rows[0]["gpu"] and rows[0]["driver"]
