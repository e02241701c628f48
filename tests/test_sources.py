"""Every kind of data file: its documents, and the place of what is wrong in a bad one."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import tracemalloc
from pathlib import Path

import pytest

from sinklora.data import files
from sinklora.data.sources import Document, find_origins, read_documents, read_rows

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

ROWS = [{"text": "first", "n": 1}, {"text": "zweiter é", "n": 2}, {"text": "third\u2028line", "n": 3}]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def texts(*sources: Path | str, **options) -> list[str]:
    return [document.text for document in read_documents([str(source) for source in sources], **options)]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", ["", *COMPRESSIONS])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESSIONS.get(ending, bytes)(b"\xef\xbb\xbf" + LINES + b"\n  \n"))
    found = list(read_documents([str(path)]))
    assert found == [Document(text, f"{path}:{line}") for line, text in enumerate(TEXTS, 1)]
    assert [row.values for row in read_rows([str(path)])] == ROWS


def test_json_is_a_list_or_lines(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "lines.json").write_bytes(LINES)
    assert texts(tmp_path / "list.json") == texts(tmp_path / "lines.json") == TEXTS


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    parquet.write_table(data.data.table, tmp_path / "a.parquet", row_group_size=2)
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert texts(tmp_path / "a.parquet") == texts(tmp_path / "plain") == texts(tmp_path / "splits") == TEXTS
    assert texts(tmp_path / "splits", split="test") == TEXTS[1:2]
    assert [row.values for row in read_rows([str(tmp_path / "plain")])] == ROWS
    with pytest.raises(ValueError, match="expected one of the splits train, test, got dev"):
        texts(tmp_path / "splits", split="dev")


def test_kinds_mix_in_folders_and_calls(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    (folder / "deep" / ".git").mkdir(parents=True)
    (folder / "deep" / ".git" / "x.txt").write_text("hidden")
    (folder / "b.jsonl").write_bytes(LINES)
    (folder / "a.md").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    (folder / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "deep" / "empty.txt").write_text("")
    (tmp_path / "z.py").write_text("code")
    assert texts(tmp_path / "z.py", folder) == ["code", "marked\r\n", *TEXTS, "packed"]
    advanced: list[int] = []
    texts(folder, advance=advanced.append)
    assert sum(advanced) == sum(origin.size for origin in find_origins([str(folder)]))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("linked")
    (tmp_path / "data" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data")
    assert texts(tmp_path / "data") == ["linked"]


def test_pipes_in_a_folder_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="got the pipe pipe"):
        texts(tmp_path)


def test_the_field_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n')
    assert texts(path, text_field="content") == ["x"]


BAD_LINES = {
    b'{"text": "x"': r":2: expected JSON, an object a line: ",
    b'["x"]': r":2: expected an object a line, got list",
    b'{"text": "\xe9"}': r":2: expected UTF-8, got the byte 0xe9 at offset 10 of the line",
    b'{"body": "x", "id": 1}': r":2: expected the field text \(text_field\), got body, id",
    b'{"text": null}': r":2: expected a string in the field text, got null",
    b'{"text": ["x"]}': r":2: expected a string in the field text, got list",
    b'{"text": "\\ud83d"}': r":2: expected characters in the field text, got half of a surrogate pair at 0",
    b"[" * 100_000: r":2: expected JSON, an object a line: ",
    b'{"text": ' + b"1" * 5000 + b"}": r":2: expected (JSON|a string)",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[str(n) for n in range(len(BAD_LINES))])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(str(path)) + BAD_LINES[line]):
        texts(path)


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_a_damaged_compressed_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    content = COMPRESSIONS[ending](LINES * 100)
    for bad in (content[: len(content) // 2], b"not compressed at all"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ": expected a whole compressed file"):
            texts(path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [str(n) * 50 for n in range(5000)]}), path)
    content = path.read_bytes()
    for bad in (content[:-100], b"", content[:200] + b"\x00" * 2000 + content[2200:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ": expected a Parquet file"):
            texts(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: row 1: expected the field body .*, got text"):
        texts(path, text_field="body")


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    bad = pyarrow.array([b"fine", b"\xff\xfe"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^data: .*a\.parquet: .*utf-8"):
        texts(tmp_path / "a.parquet")


def test_bad_json_and_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "x"},\n {"text" "y"}\n]')
    with pytest.raises(ValueError, match=r"a\.json:3: expected JSON"):
        texts(path)
    path.write_text('["x"]')
    with pytest.raises(ValueError, match=r"a\.json: row 1: expected an object, got str"):
        texts(path)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff")
    with pytest.raises(ValueError, match=r"a\.txt:2: expected UTF-8, got the byte 0xff at offset 8"):
        texts(path)


def test_no_data_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"expected text, found none in .*empty\.txt"):
        texts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"expected files in .*folder, found none"):
        texts(tmp_path / "folder")
    with pytest.raises(ValueError, match="expected files, folders or names of the Hub, got none"):
        texts()


def test_the_hub_is_not_asked_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(
        ValueError, match="no file or folder owner/name here, and the Hub is not asked for it"
    ):
        texts("owner/name")
    for spelt_wrong in ("here/missing", "owner/name.jsonl", "missing", "a/b/c", "../x"):
        with pytest.raises(ValueError, match=f"no such file or folder.*{spelt_wrong}"):
            texts(spelt_wrong)


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def load(name, configuration, **options):
        asked.append((name, configuration, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    class Info:
        sha = "abc"

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: Info())
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(read_documents(["owner/name:part"]))
    assert found == [Document(t, f"owner/name:part: row {n}") for n, t in enumerate(TEXTS, 1)]
    assert asked == [("owner/name", "part", {"split": "train", "revision": "abc", "streaming": True})]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ValueError("Bad split\nx"))
    )
    with pytest.raises(ValueError, match=r"data: owner/name:part, split train: Bad split$"):
        texts("owner/name:part")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_large_files_are_streamed(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"{n} " * 2000} for n in range(2000)]  # 20 MB
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    del rows
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    peak = 0
    for _ in read_documents([str(path)]):
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python < 10e6 and peak < 10e6
    assert files.PARQUET_ROWS * 10_000 < 10e6
