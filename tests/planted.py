"""Plants errors in copies of the CUDA sources, and finds out whether the emulator, or the result, tells.

An error is a change of text: a barrier or a wait taken away, a wait that waits for less. ``find_syncs`` lists
them all. Only what the change touches is compiled again, for one head size and one 16-bit format. A child
process runs the operations that use the changed file on small inputs; told is what the emulator reports, bits
that differ from those of the unchanged sources, new bank conflicts, or a crash.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import emulated
import emulation
import planted_cases
import torch
from emulation import ROOT, Emulator

CUDA = "csrc/cuda"
torch.set_num_threads(1)  # the children are forked
SECONDS = 60


@dataclass(frozen=True)
class Planted:
    """A change of one file's text, from one place to another."""

    file: str
    start: int
    end: int
    text: str

    @property
    def source(self) -> str:
        return _text(self.file)

    @property
    def number(self) -> int:
        return self.source.count("\n", 0, self.start) + 1

    def __str__(self) -> str:
        old = " ".join(self.source[self.start : self.end].split())
        return f"{self.file}:{self.number}: {old} -> {self.text or 'nothing'}"


@cache
def _text(file: str) -> str:
    return (ROOT / file).read_text()


def replaced(file: str, old: str, new: str, nth: int = 0) -> Planted:
    """The nth match of a regular expression replaced; a match that is not there is an error of the test."""
    found = list(re.finditer(old, _text(file)))
    assert len(found) > nth, f"{file} has no {old!r} number {nth}: its planted error needs a new text"
    return Planted(file, found[nth].start(), found[nth].end(), found[nth].expand(new))


# ---- every barrier and wait

_SYNC = re.compile(
    r"\b(__syncthreads\w*|__syncwarp|__threadfence|sl_cp_async_commit|sl_cp_async_wait(?:_all)?|sl_barrier_\w+)"
    r"\s*(<[^<>;]*>)?\s*\("
)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError("unbalanced parentheses")


def _without_comments(text: str) -> str:
    blank = lambda m: re.sub(r"[^\n]", " ", m[0])  # noqa: E731
    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)


def find_syncs(file: str) -> list[Planted]:
    """Each barrier, wait, commit and fence of a file taken away, and each wait made one group weaker."""
    text, found = _without_comments(_text(file)), []
    for match in _SYNC.finditer(text):
        end = _closing(text, match.end() - 1)
        arguments = text[match.end() : end].strip()
        found.append(Planted(file, match.start(), end + 1, f"({arguments or '(void)0'})"))
        if match[1] == "sl_cp_async_wait":
            found.append(Planted(file, match.start(2), match.end(2), f"<({match[2][1:-1]}) + 1>"))
    return found


def kernel_files() -> list[str]:
    files = [p for p in (ROOT / CUDA).rglob("*.cu*") if p.parent.name != "ptx"]
    return sorted(p.relative_to(ROOT).as_posix() for p in files)


# ---- what a file is used by


@cache
def _units_using(file: str) -> list[str]:
    """Translation units that are the file or include it."""
    out = []
    for unit in emulated.sources():
        seen: dict[str, bytes] = {}
        emulation.read_with_includes(ROOT, unit, seen)
        if file in seen:
            out.append(unit)
    return out


def _operation(unit: str) -> str | None:
    """By its name, or that of its folder; None for what all operations share."""
    for name in sorted(emulated.OPERATIONS, key=len, reverse=True):
        path = Path(unit)
        if path.stem.startswith(name) or path.parent.name == name.removeprefix("h2o_"):
            return name
    return None


def operations_using(file: str) -> list[str]:
    found = {_operation(unit) for unit in _units_using(file)}
    return sorted(emulated.OPERATIONS if None in found else found)  # type: ignore[arg-type]


def dtypes_using(file: str) -> list[torch.dtype]:
    units = _units_using(file)
    simt = [unit for unit in units if "/simt/" in unit or unit.endswith("_f32.cu")]
    tensor_cores = len(simt) < len(units)
    return [torch.bfloat16] * tensor_cores + [torch.float32] * bool(simt)


# ---- building and running


def build(planted: Planted | None, kind: str, dim: int, folder: Path) -> Path:
    """The library for one head size, with an error or without."""
    defines = ("-DSL_WITH_CUDA", f"-DSL_ONLY_HEAD_DIM={dim}", "-w")
    if planted is None:
        return emulation.build(emulated.sources(), kind, defines)
    tree = folder / "tree"
    for part in ("csrc/core", CUDA, emulation.ENGINE):
        shutil.copytree(ROOT / part, tree / part)
    text = planted.source
    (tree / planted.file).write_text(text[: planted.start] + planted.text + text[planted.end :])
    # float16 is the same source as bfloat16, and no case has it: not compiled again.
    spared = [s for s in emulated.sources() if s.endswith("_f16.cu") and s != planted.file]
    return emulation.build(emulated.sources(), kind, defines, tree, folder, spared)


Bits = list[torch.Tensor]


def results(
    emulator: Emulator, operation: str, dtype: torch.dtype, dim: int
) -> Iterator[tuple[Bits, set[str]]]:
    """Outputs and call sites with bank conflicts, case by case."""
    for outputs in planted_cases.run(emulator, operation, dtype, dim):
        yield [x.contiguous().view(torch.uint8).clone() for x in outputs], set(emulator.conflicts())


@cache
def _unchanged(operation: str, dtype: torch.dtype, kind: str, dim: int) -> list[tuple[Bits, set[str]]]:
    emulator = emulated.prepare(emulation.load(build(None, kind, dim, ROOT)))
    return list(results(emulator, operation, dtype, dim))


def _compare(library: Path, operation: str, dtype: torch.dtype, kind: str, dim: int) -> str:
    """What tells that this library is not the unchanged one; empty if nothing does."""
    expected = _unchanged(operation, dtype, kind, dim)
    try:
        emulator = emulated.prepare(Emulator(library))
        for case, (got, want) in enumerate(
            zip(results(emulator, operation, dtype, dim), expected, strict=True)
        ):
            if not all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True)):
                return f"{operation}, case {case}: other bits"
            if got[1] - want[1]:
                return f"{operation}, case {case}: bank conflicts: {min(got[1] - want[1])}"
    except RuntimeError as error:
        return str(error)
    return ""


def _in_child(library: Path, operation: str, dtype: torch.dtype, kind: str, dim: int) -> str:
    """_compare in a child, which a planted error may bring down."""
    _unchanged(operation, dtype, kind, dim)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, _compare(library, operation, dtype, kind, dim).encode()[:4000])
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], SECONDS)
    if not ready:
        os.kill(child, signal.SIGKILL)
    told = b"" if not ready else os.read(reader, 4000)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    return told.decode() or (f"the process ended with status {status}" if status else "")


# Head sizes have their own tiles, and so do their branches: tried until one tells.
LADDER = (("race", 64), ("hook", 64), ("race", 128), ("race", 256), ("race", 32))


def told_by(planted: Planted, folder: Path, ladder: tuple[tuple[str, int], ...] = LADDER) -> str:
    """What tells of an error; empty if it goes unnoticed."""
    for kind, dim in ladder:
        place = folder / f"{kind}-{dim}"
        place.mkdir(parents=True)
        try:
            build(None, kind, dim, place)  # its objects are kept
            library = build(planted, kind, dim, place)
            for dtype in dtypes_using(planted.file):
                for operation in operations_using(planted.file):
                    if planted_cases.has(operation, dtype) and (
                        told := _in_child(library, operation, dtype, kind, dim)
                    ):
                        return told
        finally:
            shutil.rmtree(place)
    return ""
