"""Where data comes from: files, folders and data sets of the Hub, as streams of rows and documents."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import files, hub
from .files import Row

__all__ = ["Document", "Origin", "Row", "find_origins", "read_documents", "read_rows"]

# "owner/name" or "owner/name:configuration"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


class Document(NamedTuple):
    """One text that belongs together. source: "file", "file:line" or "file: row n", for messages."""

    text: str
    source: str


@dataclass(frozen=True)
class Origin:
    """One file, folder that `datasets` saved, or data set of the Hub.

    kind: a key of files.READERS, "saved" or "hub". size: bytes, 0 where that is not known. identity: plain
    JSON that changes when the content does.
    """

    name: str
    kind: str
    size: int
    identity: Sequence[Any]

    def read(
        self, split: str, columns: Sequence[str] | None, advance: Callable[[int], None]
    ) -> Iterator[Row]:
        """Its rows; advance is told of bytes read, `size` in all. columns: those needed, to read no other."""
        if self.kind == "hub":
            return hub.read_hub(self.name, split, columns, self.identity[-1])
        if self.kind == "saved":
            return hub.read_saved(Path(self.name), split, columns, self.size, advance)
        return files.READERS[self.kind](Path(self.name), columns, advance)


def read_documents(
    sources: Sequence[str],
    *,
    text_field: str = "text",
    split: str = "train",
    advance: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """The documents of the sources, in their order; inside a folder, by path.

    Read as a stream: of a file of rows never more than a few are in memory. A text file is one document
    whatever its size.

    Args:
        sources: of one kind or several: text files (.txt, .md, .py, anything not named here; each is one
            document, UTF-8), JSON Lines (.jsonl; a document a line), .json (a list of objects, in memory as
            a whole, or objects a line), .parquet (a document a row), each also compressed (.gz, .bz2, .xz,
            .zst) but for Parquet; folders of these, in depth and through links, without hidden files; folders
            that `datasets` saved; names of the Hub (owner/name or owner/name:configuration), where nothing
            here is called so.
        text_field: of a row, what holds the text.
        split: of a saved data set or one of the Hub.
        advance: is told of bytes read.

    Raises:
        ValueError: no such source; a file that is not what its name says (with its line); a row without the
            field, or with something else than a string in it; no text at all. OSError: a file that cannot
            be read.
    """
    return _documents(find_origins(sources, split), text_field, split, advance or _ignore)


def _documents(
    origins: Sequence[Origin], text_field: str, split: str, advance: Callable[[int], None]
) -> Iterator[Document]:
    found = False
    for origin in origins:
        field = files.TEXT if origin.kind == "text" else text_field
        for row in origin.read(split, [field], advance):
            text = text_of(row, field)
            if text:
                found = True
                yield Document(text, row.source)
    if not found:
        raise ValueError(f"data: expected text, found none in {_listed(origins)}")


def read_rows(
    sources: Sequence[str],
    *,
    split: str = "train",
    advance: Callable[[int], None] | None = None,
) -> Iterator[Row]:
    """The rows of the sources (as read_documents takes them) with all their fields; a text file is one row
    with the field "text".

    Raises:
        ValueError: as read_documents, but for fields; no row at all.
    """
    origins = find_origins(sources, split)
    found = False
    for origin in origins:
        for row in origin.read(split, None, advance or _ignore):
            found = True
            yield row
    if not found:
        raise ValueError(f"data: expected rows, found none in {_listed(origins)}")


def text_of(row: Row, field: str) -> str:
    """The row's text.

    Raises:
        ValueError: no such field, or no string that can be written as UTF-8.
    """
    if field not in row.values:
        there = ", ".join(map(str, row.values)) or "none"
        raise ValueError(f"data: {row.source}: expected the field {field} (text_field), got {there}")
    text = row.values[field]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise ValueError(f"data: {row.source}: expected a string in the field {field}, got {kind}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
        raise ValueError(
            f"data: {row.source}: expected characters in the field {field}, got half of a surrogate pair "
            f"at {error.start}"
        ) from error
    return text


def find_origins(sources: Sequence[str], split: str = "train") -> list[Origin]:
    """What the sources name, folders searched in depth, in a fixed order; nothing is read yet.

    Raises:
        ValueError: a source that is neither here nor can be on the Hub, a folder without files.
    """
    if isinstance(sources, str):
        raise TypeError("data: expected a list of files, folders or names, got one string")
    if not sources:
        raise ValueError("data: expected files, folders or names of the Hub, got none")
    origins: list[Origin] = []
    for source in sources:
        path = Path(os.path.expanduser(source))
        if path.is_dir():
            found = _in_folder(path)
            if not found:
                raise ValueError(f"data: expected files in {source}, found none (hidden ones do not count)")
            origins += found
        elif path.exists():
            origins.append(_of_file(path))
        elif _may_be_on_the_hub(source):
            origins.append(Origin(source, "hub", *hub.describe(source, split)))
        else:
            raise ValueError(f"data: no such file or folder, nor a name on the Hub (owner/name): {source!r}")
    return origins


def _in_folder(root: Path, above: tuple[Path, ...] = ()) -> list[Origin]:
    if hub.is_saved(root):
        return [Origin(str(root), "saved", *hub.describe_saved(root))]
    origins = []
    above = (*above, root.resolve())
    for entry in sorted(root.iterdir(), key=lambda path: path.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            # A link to a folder above would be followed for ever.
            if entry.resolve() not in above:
                origins += _in_folder(entry, above)
        elif entry.exists() and not entry.is_file():
            raise ValueError(f"data: expected files and folders in {root}, got the pipe {entry.name}")
        else:
            origins.append(_of_file(entry))
    return origins


def _of_file(path: Path) -> Origin:
    status = path.stat()
    identity = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    return Origin(str(path), files.kind_of(path), status.st_size, identity)


def _may_be_on_the_hub(source: str) -> bool:
    """A path that was spelt wrong is not asked for: one with a file's ending, or inside a folder that is
    here."""
    owner = source.partition("/")[0]
    return (
        bool(_HUB_NAME.fullmatch(source))
        and not files.has_known_ending(Path(source))
        and not Path(owner).is_dir()
    )


def _listed(origins: Sequence[Origin]) -> str:
    names = [origin.name for origin in origins[:3]]
    more = len(origins) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _ignore(amount: int) -> None:
    del amount
