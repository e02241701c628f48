"""Compiled CUDA kernels: the tools that read them, and what a cubin says about itself."""

from __future__ import annotations

import functools
import re
import shutil
import struct
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# ELF sections of a cubin: attributes of all kernels, and of one.
_INFO = ".nv.info"
_REGISTERS, _FRAME, _MAX_THREADS = 0x2F, 0x11, 0x05
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


class MissingToolError(RuntimeError):
    """A program of the CUDA toolkit that is not here; the message says how to get it."""


@dataclass(frozen=True)
class Kernel:
    """What the cubin says of one kernel: bytes, threads of the largest block (0: no __launch_bounds__)."""

    name: str
    registers: int
    stack: int
    shared: int
    threads: int


@dataclass(frozen=True)
class Spills:
    """What ptxas -v says of one kernel, in bytes."""

    stack: int
    stores: int
    loads: int


def tool(name: str) -> str:
    """The path of nvcc, nvdisasm, cuobjdump or c++filt. MissingToolError where there is none.

    Looks on PATH, where the packages of the package index put theirs (nvidia/cu13/bin beside other packages),
    and beside nvcc.
    """
    places = [None]
    for key in ("purelib", "platlib"):
        places += sorted(map(str, Path(sysconfig.get_path(key)).glob("nvidia/cu*/bin")), reverse=True)
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parent))
    for place in places:
        if found := shutil.which(name, path=place):
            return found
    package = f"nvidia-cuda-{name}"
    raise MissingToolError(
        f"{name}: not found; `pip install {package}` or a CUDA toolkit on PATH has it"
        if name in ("nvdisasm", "cuobjdump", "nvcc")
        else f"{name}: not found on PATH"
    )


def run(name: str, *arguments: str) -> str:
    """What a tool prints. RuntimeError with its last words where it fails."""
    command = [tool(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def disassemble(cubin: Path) -> str:
    return run("nvdisasm", "-c", str(cubin))


def cubins_of(path: Path, folder: Path) -> list[Path]:
    """The cubins in a host object or library, taken out into a folder by cuobjdump; a cubin is its own."""
    if _is_cubin(path):
        return [path]
    folder.mkdir(parents=True, exist_ok=True)
    command = [tool("cuobjdump"), "--extract-elf", "all", str(path.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    found = sorted(folder.glob("*.cubin"))
    if not found:
        raise RuntimeError(f"{path}: no cubin in it; {(done.stderr or done.stdout).strip()[-500:]}")
    return found


def _is_cubin(path: Path) -> bool:
    head = path.read_bytes()[: _HEADER.size]
    return head[:4] == b"\x7fELF" and len(head) == _HEADER.size and _HEADER.unpack(head)[2] == 190  # EM_CUDA


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled -> a readable name without parameters; as it is where c++filt is missing."""
    try:
        text = subprocess.run(
            [tool("c++filt"), *names], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (MissingToolError, subprocess.SubprocessError):
        return {name: name for name in names}
    return {name: readable(line) for name, line in zip(names, text, strict=True)}


def readable(demangled: str) -> str:
    """ "void f<(sl_dtype)1, 64>(params)" as "f<bfloat16, 64>"."""
    name = re.sub(r"^(static |void )+", "", demangled)
    if name.endswith(")"):
        depth, at = 0, len(name)
        while at and (depth or at == len(name)):
            at -= 1
            depth += {")": 1, "(": -1}.get(name[at], 0)
        name = name[:at]
    name = re.sub(r"\(sl_dtype\)(\d+)", lambda match: _dtypes()[int(match[1])], name)
    return re.sub(r"\(\w+\)(?=-?\w)", "", name)


@functools.cache
def _dtypes() -> list[str]:
    """Names by number, from the list that makes the enum."""
    text = Path(__file__).resolve().parents[1].joinpath("csrc", "core", "dtype.def").read_text()
    return re.findall(r'^SL_DTYPE\(\w+, "(\w+)"', text, re.MULTILINE)


def kernels(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin, read from its ELF sections: needs no tool."""
    data = cubin.read_bytes()
    header = _HEADER.unpack_from(data)
    offset, size, count, strings = header[6], header[11], header[12], header[13]
    raw = [_SECTION.unpack_from(data, offset + i * size) for i in range(count)]
    names_at = raw[strings][4]
    sections = {_text(data, names_at + item[0]): item for item in raw}
    symbols = _symbols(data, sections, raw)
    facts: dict[str, dict[int, int]] = {}
    _, _, _, _, at, length, *_ = sections[_INFO]
    for attribute, value in _attributes(data[at : at + length]):
        if attribute in (_REGISTERS, _FRAME):
            index, number = struct.unpack("<II", value)
            facts.setdefault(symbols[index], {})[attribute] = number
    found = []
    for name, item in sections.items():
        if not name.startswith(_INFO + "."):
            continue
        kernel = name.removeprefix(_INFO + ".")
        threads = 0
        for attribute, value in _attributes(data[item[4] : item[4] + item[5]]):
            if attribute == _MAX_THREADS:
                x, y, z = struct.unpack("<III", value)
                threads = x * y * z
        shared = sections.get(f".nv.shared.{kernel}", (0,) * 10)[5]
        own = facts.get(kernel, {})
        found.append(Kernel(kernel, own.get(_REGISTERS, 0), own.get(_FRAME, 0), shared, threads))
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _symbols(data: bytes, sections: dict[str, tuple[int, ...]], raw: list[tuple[int, ...]]) -> list[str]:
    table = sections[".symtab"]
    names_at = raw[table[6]][4]
    count = table[5] // _SYMBOL.size
    entries = (_SYMBOL.unpack_from(data, table[4] + i * _SYMBOL.size) for i in range(count))
    return [_text(data, names_at + entry[0]) for entry in entries]


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    """(attribute, value) of an info section: format, attribute, then two bytes of value or of a size."""
    found, at = [], 0
    while at + 4 <= len(data):
        form, attribute, small = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:
            found.append((attribute, data[at : at + small]))
            at += small
    return found


def parse_ptxas(text: str) -> dict[str, Spills]:
    """Mangled name -> stack and spills, from what ptxas -v says on standard error."""
    found: dict[str, Spills] = {}
    name = ""
    for line in text.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            name = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            found[name] = Spills(*map(int, match.groups()))
    return found
