"""Mixtures: shares, filters, what a manifest says, and the command."""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from sinklora.cli import main
from sinklora.data.mix import manifest_path, mix
from sinklora.data.mix_settings import PRESETS, MixSettings, MixSource, make_sources
from sinklora.tokenizer import byte_tokenizer


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def alpaca(number: int, words: str = "answer") -> dict:
    return {"instruction": f"question {number}", "output": f"{words} {number}"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three sources: 60 rows of Alpaca's fields, 40 chats, 30 plain texts."""
    chats = [
        {"messages": [{"role": "user", "content": f"chat {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(40)
    ]
    return {
        "a": write_lines(tmp_path / "a.jsonl", [alpaca(n) for n in range(60)]),
        "b": write_lines(tmp_path / "b.jsonl", chats),
        "c": write_lines(tmp_path / "c.jsonl", [{"text": f"plain text {n}"} for n in range(30)]),
    }


def settings(files: dict[str, str], shares: tuple[float, ...] = (0.5, 0.3, 0.2), **options) -> MixSettings:
    sources = [
        MixSource(name, path, share) for (name, path), share in zip(files.items(), shares, strict=True)
    ]
    return MixSettings(sources, **{"rows": 50, **options})


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_come_by_shares_in_one_form(tmp_path: Path, files: dict[str, str]) -> None:
    output = tmp_path / "out" / "mix.jsonl"
    manifest = mix(settings(files), output)
    rows = rows_of(output)
    assert collections.Counter(row["source"] for row in rows) == {"a": 25, "b": 15, "c": 10}
    assert all(set(row) == {"messages", "source"} for row in rows)
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    assert [row["source"] for row in rows] != sorted(row["source"] for row in rows)
    assert len({json.dumps(row) for row in rows}) == 50
    plain = next(row["messages"] for row in rows if row["source"] == "c")
    assert plain[0]["content"] == "Write a long text." and plain[1]["content"].startswith("plain text")
    assert json.loads(manifest_path(output).read_text()) == json.loads(json.dumps(manifest))
    assert manifest["output"]["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    first = manifest["sources"][0]
    assert first["inputs"][0]["sha256"] == hashlib.sha256(Path(files["a"]).read_bytes()).hexdigest()
    assert first["rows"] == {
        "read": 60, "duplicates": 0, "too_short": 0, "too_long": 0, "eligible": 60, "taken": 25
    }  # fmt: skip
    assert sorted(path.name for path in output.parent.iterdir()) == ["mix.jsonl", "mix.manifest.json"]


def test_the_draw_is_the_seeds_and_no_orders(tmp_path: Path, files: dict[str, str]) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    mix(settings(files), first)
    lines = Path(files["a"]).read_text().splitlines(keepends=True)
    Path(files["a"]).write_text("".join(reversed(lines)))
    mix(settings(files), second)
    assert first.read_bytes() == second.read_bytes()
    mix(settings(files, seed=1), second)
    assert set(first.read_text().splitlines()) != set(second.read_text().splitlines())


def test_equal_rows_are_kept_once(tmp_path: Path) -> None:
    same = {
        "messages": [{"role": "user", "content": "question  0\n"}, {"role": "gpt", "content": "answer 0 "}]
    }
    composed, apart = alpaca(1, "caf\u00e9"), alpaca(1, "cafe\u0301")
    files = {
        "a": write_lines(tmp_path / "a.jsonl", [alpaca(0), composed, apart, alpaca(0)]),
        "b": write_lines(tmp_path / "b.jsonl", [same, alpaca(7), alpaca(8)]),
    }
    manifest = mix(settings(files, (0.5, 0.5), rows=4), tmp_path / "mix.jsonl")
    counts = [source["rows"] for source in manifest["sources"]]
    assert [(c["read"], c["duplicates"], c["eligible"]) for c in counts] == [(4, 2, 2), (3, 1, 2)]


def test_lengths_are_of_all_messages(tmp_path: Path) -> None:
    byte_tokenizer(64).save_pretrained(tmp_path / "tokenizer")
    rows = [{"instruction": "q" * n, "output": f"{n:04}"} for n in range(1, 21)]  # n + 4 bytes
    files = {"a": write_lines(tmp_path / "a.jsonl", rows)}
    options = {"tokenizer": str(tmp_path / "tokenizer"), "min_tokens": 8, "max_tokens": 20}
    manifest = mix(settings(files, (1.0,), rows=13, **options), tmp_path / "mix.jsonl")
    assert manifest["sources"][0]["rows"] == {
        "read": 20, "duplicates": 0, "too_short": 3, "too_long": 4, "eligible": 13, "taken": 13
    }  # fmt: skip
    lengths = [sum(len(m["content"]) for m in row["messages"]) for row in rows_of(tmp_path / "mix.jsonl")]
    assert sorted(lengths) == list(range(8, 21))


def test_too_few_rows_are_told_or_allowed(tmp_path: Path, files: dict[str, str]) -> None:
    output = tmp_path / "mix.jsonl"
    with pytest.raises(
        ValueError, match=r"source: a: .*; c: expected 40 rows \(0.2 of 200\), there were 30 \(30 read"
    ):
        mix(settings(files, rows=200), output)
    assert not output.exists() and not list(tmp_path.glob(".mix*"))
    manifest = mix(settings(files, rows=200, allow_fewer=True), output)
    assert [source["rows"]["taken"] for source in manifest["sources"]] == [60, 36, 24]


def test_shares_are_by_largest_remainder() -> None:
    sources = [MixSource(str(n), "x", 1 / 3) for n in range(3)]
    assert MixSettings(sources, 100).counts(100) == [34, 33, 33]
    preset = PRESETS["longalpaca-plus"]
    made = make_sources([f"{name}=x" for name in preset.shares], ["nq=CC BY-SA 3.0"], "longalpaca-plus")
    assert MixSettings(made, preset.rows).counts(28_000) == [12_320, 7_560, 5_040, 3_080]
    assert made[0].licence == "CC BY-SA 3.0" and made[1].licence is None


BAD_SETTINGS = [
    (dict(sources=[]), "source: expected at least one"),
    (dict(sources=[MixSource("a", "x", 0.5)]), "source: expected shares that add up to 1"),
    (dict(sources=[MixSource("a", "x", 0.5)] * 2), "source: expected each name once, got a"),
    (dict(sources=[MixSource("a", "x", 1.5)]), "source: a: expected a share above 0, at most 1, got 1.5"),
    (dict(rows=0), "rows: expected at least 1, got 0"),
    (dict(min_tokens=5), "min_tokens: expected a tokenizer too"),
    (dict(tokenizer="x"), "tokenizer: expected min_tokens or max_tokens too"),
    (dict(tokenizer="x", min_tokens=5, max_tokens=4), "min_tokens: expected at most max_tokens"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_SETTINGS)
def test_bad_settings_are_named(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        MixSettings(**{"sources": [MixSource("a", "x", 1.0)], "rows": 5, **changed})


BAD_SOURCES = [
    (["a=x"], {}, r"source: expected NAME=PATH:SHARE.*, got 'a=x'"),
    (["x:0.5"], {}, r"source: expected NAME=PATH:SHARE"),
    (["a=x:50%%"], {}, r"source: expected NAME=PATH:SHARE"),
    (["a=x:1"], {"licences": ["b=MIT"]}, "licence: expected the name of a source, got b"),
    (["a=x:1"], {"licences": ["MIT"]}, "licence: expected NAME=TEXT, got 'MIT'"),
    (["a=x:1"], {"preset": "other"}, "preset: expected one of longalpaca-plus, got other"),
    (["nq=x"], {"preset": "longalpaca-plus"}, "source: expected NAME=PATH for .*, got none for redpajama"),
    (["nq=x:0.4"], {"preset": "longalpaca-plus"}, "source: nq: expected no share"),
    (["zz=x"], {"preset": "longalpaca-plus"}, "source: expected one of nq, .* as names, got 'zz'"),
]


@pytest.mark.parametrize(("texts", "options", "message"), BAD_SOURCES)
def test_bad_sources_are_named(texts: list[str], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sources(texts, **options)


def test_a_name_on_the_hub_may_have_a_configuration() -> None:
    (source,) = make_sources(["a=owner/name:part:100%"])
    assert (source.path, source.share) == ("owner/name:part", 1.0)


def test_bad_rows_and_outputs_are_named(tmp_path: Path, files: dict[str, str]) -> None:
    with Path(files["b"]).open("a") as file:
        file.write('{"instruction": "no answer"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:41: expected "):
        mix(settings(files), tmp_path / "mix.jsonl")
    assert not list(tmp_path.glob("*mix*"))
    with pytest.raises(
        ValueError, match=r"output: expected a new file, .*a\.jsonl, which something else wrote"
    ):
        mix(settings(files), files["a"])
    with pytest.raises(ValueError, match=r"output: expected a name that ends in \.jsonl"):
        mix(settings(files), tmp_path / "mix.txt")
    with pytest.raises(OSError, match=r"the rows cannot be written there: (File exists|Not a directory)"):
        mix(settings(files), Path(files["a"]) / "mix.jsonl")


def test_a_full_disk_leaves_the_earlier_mixture(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mix.jsonl"
    mix(settings(files), output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the rows cannot be written there: No space left on device"):
        mix(settings(files, seed=5), output)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_and_its_configuration(tmp_path: Path, files: dict[str, str], capsys) -> None:
    output, config = tmp_path / "mix.jsonl", tmp_path / "mix.yaml"
    given = [
        f"--source={name}={path}:{share}"
        for (name, path), share in zip(files.items(), ("50%", 0.3, "20 %"), strict=True)
    ]
    assert main(["data", "mix", *given, "--rows=20", "--licence=a=MIT", f"--output={output}"]) == 0
    shown = capsys.readouterr().out
    assert "20 rows in" in shown and "No licence given for b, c" in shown
    content = output.read_bytes()
    config.write_text(
        f"source:\n  a: {{path: {files['a']}, share: 0.5}}\n  b: {files['b']}:30%\n  c: {files['c']}:0.2\n"
        "rows: 20\nlicence: {a: MIT}\n"
    )
    assert main(["data", "mix", f"--config={config}", f"--output={output}"]) == 0
    assert output.read_bytes() == content
    assert json.loads(manifest_path(output).read_text())["sources"][0]["licence"] == "MIT"
    config.write_text("source: {a: {share: 0.5}}\n")
    assert main(["data", "mix", f"--config={config}", f"--output={output}"]) == 2
    assert "a: expected path and share" in capsys.readouterr().err


def test_errors_of_the_command_name_the_option(tmp_path: Path, files: dict[str, str], capsys) -> None:
    output = f"--output={tmp_path / 'mix.jsonl'}"
    source = f"--source=a={files['a']}:1.0"
    wrong = {
        (source, "--rows=100"): "'--source': a: expected 100 rows",
        (source,): "'--rows': expected",
        (source, "--rows=5", "--min-tokens=5"): "'--min-tokens': expected a tokenizer too",
        ("--source=a=none.jsonl:1", "--rows=5"): "'--source': no such file or folder",
        ("--source=a=missing.jsonl:1", "--rows=5"): "no such file or folder",
        (
            source,
            "--rows=5",
            "--max-tokens=9",
            f"--model={tmp_path / 'none'}",
        ): "'--tokenizer': cannot be opened",
    }
    for arguments, message in wrong.items():
        assert main(["data", "mix", *arguments, output]) != 0
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
