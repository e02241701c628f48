"""A folder of results is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinklora.folders import replaced_folder


def test_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "results"
    with pytest.raises(RuntimeError, match="half way"), replaced_folder(target, "marker") as folder:
        (folder / "file").write_text("new")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []

    with replaced_folder(target, "marker") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "old").write_text("old")
        (folder / "marker").write_text("1")
    (target / "own notes").write_text("kept")
    with replaced_folder(target, "marker") as folder:
        (folder / "sub").mkdir()
        (folder / "marker").write_text("2")
    assert sorted(path.name for path in target.rglob("*")) == ["marker", "own notes", "sub"]
    assert (target / "marker").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]

    (target / "marker").unlink()
    with pytest.raises(ValueError, match="holds other files"), replaced_folder(target, "marker"):
        pass
    with pytest.raises(ValueError, match="got the file"), replaced_folder(target / "own notes", "marker"):
        pass
