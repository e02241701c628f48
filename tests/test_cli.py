"""The command line: every command, one-line errors, exit statuses, --config, missing packages."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import sinklora
from sinklora import cli, extras

TINY_DEMO = """\
start-steps: 2
extend_steps: 1
start_context: 32
context: 64
group-size: 32
hidden-size: 64
layers: 1
validation-files: 2
validation-tokens: 96
sample-tokens: 3
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and the one line of stderr."""
    status = cli.main(arguments)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("sinklora: error: ")
    return status, captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sinklora {sinklora.__version__}\n"


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_shows_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: sinklora" in text
    if command == "visualize":
        assert "[default: 16]" in text
    if not command:
        assert all(name.split()[0] in text for name in cli.COMMANDS)


def test_nothing_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "Usage: sinklora" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert str(sinklora.info()["cpu_level"]) in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sinklora"] == sinklora.__version__


def test_visualize_to_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--group-size=4", "--sinks=1", "--fraction=0.5", "--shift=1", "--heads=2", "--tokens=6"]
    assert cli.main(["visualize", *options]) == 0
    causal = capsys.readouterr().out
    assert "1 head, shifted by 1" in causal
    assert causal.rstrip("\n").endswith("▒▒········██")
    assert cli.main(["visualize", *options, "--no-causal"]) == 0
    assert "not causal" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.PDF", b"%PDF")])
def test_visualize_to_a_file(
    name: str, magic: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["visualize", "--output", name]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert capsys.readouterr().out == f"wrote {name}\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        "tokens: 64\ngroup-size: 16\nrounds: 1\nkv_heads: 2\ndtype: bfloat16\n"
    )
    assert cli.main(["benchmark", "--config", "run.yaml", "--group-size", "32", "--output", "times.csv"]) == 0
    out = capsys.readouterr().out
    assert "SF-Attn (sinklora)" in out
    assert "groups of 32" in out
    with (tmp_path / "times.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        assert float(row["forward_ms"]) > 0
        assert (row["tokens"], row["group_size"], row["kv_heads"], row["dtype"]) == (
            "64",
            "32",
            "2",
            "bfloat16",
        )


def test_benchmark_s2_form_is_the_rolled_one() -> None:
    import torch

    from sinklora import SFPattern, reference
    from sinklora.benchmark import s2_over_sdpa

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 24, 8, generator=generator) for heads in (4, 2, 2))
    found = s2_over_sdpa(query, key, value, 8)
    expected = reference.sf_attention(query, key, value, SFPattern.s2(8))
    # The first and the last half group of rolled heads see each other in the rolled form.
    torch.testing.assert_close(found[:, :2].double(), expected[:, :2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 2:, 4:20].double(), expected[:, 2:, 4:20], atol=1e-5, rtol=1e-5)


def test_demo_from_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(TINY_DEMO + "output: elsewhere\nquick: true\n")
    assert cli.main(["demo", "--config", "run.yaml", "--output", "out", "--seed", "5", "--layers", "2"]) == 0
    out = capsys.readouterr().out
    assert "SF-Attn" in out
    assert "none" in out or "%" in out
    assert not (tmp_path / "elsewhere").exists()
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    expected = {
        "seed": 5,
        "num_layers": 2,
        "start_steps": 2,
        "extend_steps": 1,
        "group_size": 32,
        "sample_tokens": 3,
    }
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nonsense"], 2, "nonsense"),
        (["info", "--nonsense"], 2, "info: No such option"),
        (["visualize", "--group-size", "two"], 2, "--group-size"),
        (["visualize", "--group-size", "0"], 1, "group_size: expected"),
        (["visualize", "--output", "p.txt"], 2, "p.txt"),
        (["visualize", "--output", "no/such/folder/p.png"], 1, "no/such/folder"),
        (["benchmark", "--tokens", "100"], 1, "multiple of group_size"),
        (["benchmark", "--dtype", "float64"], 1, "float64"),
        (["benchmark", "--threads", "0"], 1, "threads: expected at least 1"),
        (["demo", "--context", "100"], 1, "context: expected more"),
        (["demo", "--config", "none.yaml"], 2, "none.yaml"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, line = error_of(arguments, capsys)
    assert found == status
    assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tokenz: 3\n", "tokenz: no such option"),
        ("config: other.yaml\n", "config: no such option"),
        ("- tokens\n", "expected a mapping"),
        ("tokens: [1\n", "expected YAML"),
        ("tokens: many\n", "--tokens"),
        (b"\xff\xfe\xfa", "run.yaml"),
    ],
)
def test_bad_configs(
    content: str | bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    status, line = error_of(["benchmark", "--config", "run.yaml"], capsys)
    assert status == 2
    assert words in line


def test_demo_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert cli.main(["demo", "--output", "mine"]) == 1
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_traceback(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["visualize", "--group-size", "0"]
    if how == "option":
        arguments.insert(0, "--debug")
    else:
        monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("sinklora: error: group_size")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sinklora, "info", interrupted)
    assert error_of(["info"], capsys) == (130, "sinklora: error: interrupted\n")


def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util,
        "find_spec",
        lambda name: None if name in ("peft", "matplotlib") else find(name),
    )
    status, line = error_of(["demo"], capsys)
    assert status == 1
    assert "peft, matplotlib" in line
    assert "pip install 'sinklora[train]'" in line
    status, line = error_of(["visualize", "--output", "p.png"], capsys)
    assert status == 1
    assert "pip install 'sinklora[plot]'" in line
    assert cli.main(["visualize"]) == 0


def module_run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code.split(maxsplit=1), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(sinklora.__file__).parent.parent)},
    )


def test_python_m_sinklora() -> None:
    done = module_run("-m sinklora", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sinklora {sinklora.__version__}\n", "")
    done = module_run("-m sinklora", "visualize", "--tokens", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "sinklora: error: num_tokens: expected from 1 to 8192 for a picture, got 0"
    ]


def test_no_typer_is_one_line() -> None:
    code = (
        "import sys, importlib.util as u; f = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'typer' else f(n, *a); "
        "sys.argv = ['sinklora', 'info']; from sinklora.__main__ import main; main()"
    )
    done = module_run("-c " + code)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "sinklora: error: typer: not installed, needed here; run: pip install 'sinklora[cli]'"
    ]


HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "matplotlib", "numpy", "sinklora._C")


def leaves(entries: Mapping[str, cli.Command | cli.Group], *names: str) -> Iterator[tuple[str, ...]]:
    """The words that call each command."""
    for name, entry in entries.items():
        if isinstance(entry, cli.Group):
            yield from leaves(entry.commands, *names, name)
        else:
            yield (*names, name)


def test_help_imports_little() -> None:
    """No command for the list of commands; no heavy library for the help of any command."""
    code = f"""
import sys
from sinklora.cli import main
assert main(["--help"]) == 0
commands = [name for name in sys.modules if name.startswith("sinklora.commands")]
assert not commands, commands
for words in {[*leaves(cli.COMMANDS)]}:
    assert main([*words, "--help"]) == 0
    heavy = set({HEAVY}) & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = module_run("-c " + code)
    assert done.returncode == 0, done.stderr


def test_the_list_shows_what_the_commands_say_of_themselves() -> None:
    def check(entry: cli.Command | cli.Group) -> None:
        if isinstance(entry, cli.Group):
            for inner in entry.commands.values():
                check(inner)
            return
        module = importlib.import_module(f"sinklora.commands.{entry.module}")
        text = inspect.getdoc(getattr(module, entry.function)) or ""
        assert entry.help == " ".join(text.partition("\n\n")[0].split())

    for entry in cli.COMMANDS.values():
        check(entry)


def test_groups_of_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    group = cli.Group("Several things.", {"facts": cli.COMMANDS["info"]})
    monkeypatch.setattr(cli, "COMMANDS", {"several": group})
    assert cli.main(["--help"]) == 0
    assert "several  Several things." in capsys.readouterr().out
    assert cli.main(["several", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: sinklora several [OPTIONS] COMMAND" in text
    assert "facts  Show versions" in text
    assert cli.main(["several", "facts", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sinklora"] == sinklora.__version__
    assert cli.main(["several", "facts", "-h"]) == 0
    assert "Usage: sinklora several facts" in capsys.readouterr().out
    status, line = error_of(["several", "fact"], capsys)
    assert status == 2
    assert "several: No such command 'fact'. Did you mean 'facts'?" in line
    status, line = error_of(["several"], capsys)
    assert status == 2
    assert "several: Missing command" in line


def test_frame_imports_no_heavy_library() -> None:
    code = (
        "import sys; from sinklora.cli import main; assert main(['visualize', '--tokens', '4']) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = module_run("-c " + code)
    assert done.returncode == 0, done.stderr
