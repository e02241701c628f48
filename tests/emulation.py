"""Builds CUDA sources for the host with the emulator in tests/emulator, and says what launches may touch.

``build()`` compiles .cu and .c files into a shared library, object by object; an object is kept for as long
as it and everything that it includes stay the same. ``Emulator`` is such a library: its memory, its reports,
its counts.

Three builds, chosen by SINKLORA_EMULATOR: ``race`` (default), ``hook`` (plain loads and stores are checked
too), ``asan`` (address and undefined-behaviour sanitizers; Python must run with their libraries preloaded).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "tests/emulator"
CXX, CC = os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Werror")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
HOOKS = ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
PATTERN = ("-ftrivial-auto-var-init=pattern",)
# What kernels, the emulator and the link get.
BUILDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "race": (("-O1", *PATTERN), ("-O2",), ()),
    "hook": (("-O1", *PATTERN, *HOOKS), ("-O2", "-DEMU_HOOKS"), ()),
    "asan": (("-O1", *SANITIZE), ("-O2", "-DEMU_ASAN"), ("-fsanitize=address,undefined",)),
}
READ, WRITE, BLANK = 1, 2, 4  # BLANK: what it holds may not be read before it is written


def chosen_build() -> str:
    return os.environ.get("SINKLORA_EMULATOR", "race")


def missing() -> str:
    """Why the emulator cannot be built here; empty where it can."""
    if not sys.platform.startswith("linux"):
        return f"the emulator is for Linux, this is {sys.platform}"
    absent = [name for name in (CXX, CC) if not shutil.which(name)]
    return f"the emulator needs {' and '.join(absent)}, not found on PATH" if absent else ""


# ---- building


def _cache() -> Path:
    folder = Path(os.environ.get("SINKLORA_EMULATOR_CACHE", ROOT / "build" / "emulator"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_with_includes(tree: Path, name: str, seen: dict[str, bytes]) -> None:
    """Collects a file and, recursively, what it includes by quotes, or from the emulator."""
    path = Path(os.path.normpath(tree / name))
    key = path.relative_to(tree).as_posix()
    if key in seen:
        return
    seen[key] = path.read_bytes()
    for bracket, other in re.findall(rb'^\s*#\s*include\s*([<"])([^>"]+)', seen[key], re.MULTILINE):
        beside = path.parent / other.decode()
        if beside.exists() and bracket == b'"':
            read_with_includes(tree, beside.relative_to(tree).as_posix(), seen)
        elif (tree / ENGINE / other.decode()).exists():
            read_with_includes(tree, f"{ENGINE}/{other.decode()}", seen)


def _command(name: str, kind: str, defines: Sequence[str]) -> list[str]:
    kernel_flags, engine_flags, _ = BUILDS[kind]
    common = ["-g1", "-fPIC", "-pthread"]
    if name.endswith(".c"):
        return [CC, "-std=c11", "-O1", *(SANITIZE if kind == "asan" else ()), *common, *defines]
    common = [CXX, "-std=c++17", *WARNINGS, *common, "-I", ENGINE, "-x", "c++"]
    engine = name.startswith(ENGINE) and name.endswith(".cpp")
    return [*common, *(engine_flags if engine else (*kernel_flags, *defines))]


def _object(tree: Path, name: str, command: list[str], folder: Path) -> Path:
    """Compiles one file, unless an object of the same content is kept. Run in the tree, so that reports name
    files relative to it."""
    seen: dict[str, bytes] = {}
    read_with_includes(tree, name, seen)
    digest = hashlib.sha256(repr((command, name, sorted(seen.items()))).encode()).hexdigest()[:24]
    for kept in (folder / f"{digest}.o", _cache() / f"{digest}.o"):
        if kept.exists():
            return kept
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".o", delete=False) as made:
        done = subprocess.run(
            [*command, "-c", name, "-o", made.name], cwd=tree, capture_output=True, text=True, check=False
        )
    if done.returncode:
        Path(made.name).unlink()
        raise RuntimeError(f"{' '.join(command)} {name}\n{done.stderr[-6000:]}")
    Path(made.name).rename(folder / f"{digest}.o")
    return folder / f"{digest}.o"


def build(
    sources: Iterable[str],
    kind: str | None = None,
    defines: Sequence[str] = (),
    tree: Path = ROOT,
    folder: Path | None = None,
    from_root: Sequence[str] = (),
) -> Path:
    """A shared library of sources (paths in the tree) and the emulator. Other trees than this one: give a
    folder for what they add, and the sources that are taken from this one all the same."""
    kind = kind or chosen_build()
    folder = folder or _cache()
    names = [*sorted(sources), *sorted(f"{ENGINE}/{p.name}" for p in (tree / ENGINE).glob("*.cpp"))]
    # Long ones first: two compilers at a time.
    names.sort(key=lambda name: name.startswith(ENGINE) or name.endswith(".c"))

    def compiled(name: str) -> Path:
        here, kept = (ROOT, _cache()) if name in from_root else (tree, folder)
        return _object(here, name, _command(name, kind, defines), kept)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, names))
    link = [CXX, "-shared", *BUILDS[kind][2]]
    digest = hashlib.sha256(repr((link, [p.name for p in objects])).encode()).hexdigest()[:24]
    out = folder / f"{kind}-{digest}.so"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temp:
            made = Path(temp) / out.name
            subprocess.run([*link, *map(str, objects), "-o", str(made), "-pthread", "-ldl"], check=True)
            shutil.move(made, out)
    return out


def require_preload() -> None:
    """The sanitizers' libraries must come before everything else in the process."""
    maps = Path("/proc/self/maps")
    if maps.exists() and "libasan" not in maps.read_text():
        preload = subprocess.run(
            [CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        )
        raise RuntimeError(
            f"the emulator's asan build needs LD_PRELOAD={preload.stdout.strip()}:"
            "$(c++ -print-file-name=libstdc++.so) ASAN_OPTIONS=detect_leaks=0"
        )


# ---- a library


COUNTS = (
    *("launches", "blocks", "switches", "collectives", "mma", "global_bytes"),
    *("ldmatrix", "ldmatrix_wavefronts", "read_ideal", "read_wavefronts"),
    *("write_ideal", "write_wavefronts", "copy_ideal", "copy_wavefronts"),
)


class Statistics(ctypes.Structure):
    """struct emu_stats of cuda_host.h."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in COUNTS)


class Emulator:
    """A loaded library. Nothing may be touched by a launch but what allow() named since clear()."""

    def __init__(self, path: Path) -> None:
        if path.name.startswith("asan"):
            require_preload()
        self.path = path
        self.lib = ctypes.CDLL(str(path))
        self.lib.emu_report.restype = ctypes.c_char_p
        self.lib.emu_build.restype = ctypes.c_char_p

    @property
    def kind(self) -> str:
        return str(self.lib.emu_build().decode())

    def clear(self) -> None:
        self.lib.emu_clear()

    def seed(self, seed: int) -> None:
        """Order of blocks and threads, until it is set again."""
        self.lib.emu_seed(ctypes.c_uint64(seed))

    def device(self, processors: int = 4, shared: int = 99 << 10) -> None:
        """The device pretended to be: multiprocessors, and the shared memory that a block may have."""
        self.lib.emu_device(processors, shared)

    def expect_stream(self, stream: int | None) -> None:
        """Work on any other stream than this one is an error; None: on any."""
        self.lib.emu_expect_stream(ctypes.c_void_p(stream or 0), int(stream is not None))

    def allow(self, pointer: int, size: int, access: int = READ) -> None:
        self.lib.emu_memory_allow(ctypes.c_void_p(pointer), ctypes.c_size_t(size), access)

    def allow_strided(
        self, pointer: int, shape: Sequence[int], strides: Sequence[int], item: int, access: int = READ
    ) -> None:
        """The elements of an array, and not what lies between its rows. Strides count bytes."""
        n = len(shape)
        self.lib.emu_memory_allow_strided(
            ctypes.c_void_p(pointer),
            n,
            (ctypes.c_int64 * n)(*shape),
            (ctypes.c_int64 * n)(*strides),
            item,
            access,
        )

    def forbid(self, pointer: int, size: int) -> None:
        self.lib.emu_memory_forbid(ctypes.c_void_p(pointer), ctypes.c_size_t(size))

    def report(self) -> str:
        """What the emulator had to say about the last launch that failed since clear()."""
        return str(self.lib.emu_report().decode())

    def statistics(self) -> Statistics:
        out = Statistics()
        self.lib.emu_statistics(ctypes.byref(out))
        return out

    def conflicts(self) -> list[str]:
        """Call sites whose accesses to shared memory met in banks, since clear()."""
        text = ctypes.create_string_buffer(1 << 16)
        self.lib.emu_conflicts(text, len(text))
        return text.value.decode().splitlines()


@functools.cache
def load(path: Path) -> Emulator:
    return Emulator(path)
