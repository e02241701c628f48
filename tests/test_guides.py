"""The guides' code runs and prints what they say, their options exist, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sinklora import cli

FOLDER = Path(__file__).parent.parent / "notebooks"
GUIDES = sorted((FOLDER / "guides").glob("*.md"))
PAGES = [FOLDER.parent / "README.md", FOLDER / "README.md", *GUIDES]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


class Block(NamedTuple):
    """A fenced block: its info string ("python", "python no-run", "text", "bash"), first line and text."""

    info: str
    line: int
    text: str


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[2].strip(), line, textwrap.dedent(match[3])))
    return found


class Said(logging.Handler):
    """Puts what sinklora logs as a warning among what a block prints."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage())


def run(block: Block, path: Path, namespace: dict[str, Any]) -> str:
    """What a block prints and warns of; an exception, which ends it, is the last line."""
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    said = Said(logging.WARNING)
    logging.getLogger("sinklora").addHandler(said)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                exec(code, namespace)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
                namespace["_raised"] = error
    finally:
        logging.getLogger("sinklora").removeHandler(said)
    return output.getvalue()


def test_there_are_guides() -> None:
    assert len(GUIDES) >= 4


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_python_runs_and_prints_what_the_page_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run in one namespace, in order. A block of text right behind one is what it
    prints; where there is none it may print anything but must not raise."""
    monkeypatch.chdir(tmp_path)
    found = blocks(path)
    page = types.ModuleType(f"guide_{path.stem}")  # torch.compile looks a function's module up
    monkeypatch.setitem(sys.modules, page.__name__, page)
    namespace = page.__dict__
    assert any(block.info == "python" for block in found)
    for block, following in zip(found, [*found[1:], Block("", 0, "")], strict=True):
        at = f"{path.name}:{block.line}"
        if block.info == "python no-run":
            compile(block.text, at, "exec")
        if block.info != "python":
            continue
        shown = run(block, path, namespace)
        raised = namespace.pop("_raised", None)
        if following.info == "text":
            assert shown.split() == following.text.split(), f"{at} prints\n{shown}"
        elif raised is not None:
            raise raised


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """(command, text with its options) of each call in a shell block or in backquotes, and of each row of a
    table whose last header names a command."""
    text = path.read_text(encoding="utf-8")
    calls = [block.text.replace("\\\n", " ") for block in blocks(path) if block.info == "bash"]
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    calls += [" ".join(call.split()) for call in re.findall(r"`(sinklora\s[^`]+)`", prose)]
    for call in calls:
        for line in re.split(r"\n|&&", call):
            match = re.search(r"(?:^|\s)sinklora ((?:data )?[a-z]+)(.*)", line.split("#")[0])
            if match:
                yield match[1], match[2]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, *rows = (line.rstrip("| ").rpartition("|")[2].strip() for line in table.splitlines())
        if match := re.fullmatch(r"`sinklora ((?:data )?[a-z]+)`", header):
            for row in rows:
                yield match[1], " ".join(re.findall(r"`([^`]*)`", row))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_and_their_options_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, set[str]] = {}
    for command, rest in commands(path):
        assert command.split()[0] in cli.COMMANDS, f"sinklora {command}"
        if command not in helps:
            assert cli.main([*command.split(), "--help"]) == 0
            helps[command] = set(OPTION.findall(capsys.readouterr().out))
        unknown = set(OPTION.findall(rest)) - helps[command]
        assert not unknown, f"sinklora {command} has no {unknown}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target
