"""Builds the one extension, sinklora._C: C11, CPython's limited API 3.11, NumPy 2 C API, no torch headers.
CUDA too, where it is asked for or a GPU is there.

SINKLORA_CUDA=auto       (default) CUDA for the GPUs that nvidia-smi shows if there is nvcc, else without
SINKLORA_CUDA=1          CUDA for DEFAULT_ARCHS, or an error
SINKLORA_CUDA=0          without
SINKLORA_CUDA_ARCHS="8.0;9.0"  these compute capabilities instead; with auto, also where no GPU is visible
SINKLORA_CUDA_VERBOSE=1  print how long nvcc took for each file
CUDA_HOME                the toolkit, else that of the nvcc on PATH
SINKLORA_DEBUG=1         -O0 -g
SINKLORA_SANITIZE=1      address and undefined-behaviour sanitizers (run with the asan runtime preloaded)
SINKLORA_WERROR=1        warnings are errors
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = sorted(map(str, [*Path("csrc").glob("*/*.c"), *Path("csrc/cpu/isa").glob("*.c")]))
# The kernels, in folders of their own, take nvcc longest: they come first.
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").rglob("*.cu")), key=lambda name: (-name.count("/"), name))
ALL_HEADERS = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".def", ".inc", ".cuh"))
# What C files include; nvcc itself says what each of its files includes.
HEADERS = [name for name in ALL_HEADERS if not name.startswith("csrc/cuda/") or name == "csrc/cuda/device.h"]
SETTINGS = ["setup.py", "pyproject.toml"]
with open("pyproject.toml", "rb") as settings:
    ISA_FLAGS = tomllib.load(settings)["tool"]["sinklora"]["isa-flags"]

# Every family from Ampere on; the newest also as PTX, which the driver compiles for what comes after it.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
OLDEST_ARCH, OLDEST_NVCC = (8, 0), (12, 0)
ASK_SECONDS = 60.0  # for nvidia-smi and nvcc to say what they are


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class NoCudaError(Exception):
    """CUDA cannot be built here; the text says why."""


class Toolkit(NamedTuple):
    nvcc: str
    release: str
    archs: frozenset[str]  # that this nvcc knows
    cudart: str  # libcudart_static.a


class Cuda(NamedTuple):
    toolkit: Toolkit
    archs: tuple[str, ...]


def read_archs(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The compute capabilities of SINKLORA_CUDA_ARCHS, oldest first; empty where it is not set."""
    text = environ.get("SINKLORA_CUDA_ARCHS", "")
    found = {name for name in re.split(r"[;,\s]+", text) if name}
    for name in found:
        if not re.fullmatch(r"[1-9]\d*\.\d", name):
            raise SystemExit(f"SINKLORA_CUDA_ARCHS: expected compute capabilities, 8.0;9.0, got {name!r}")
        if version(name) < OLDEST_ARCH:
            raise SystemExit(f"SINKLORA_CUDA_ARCHS: expected 8.0 (Ampere) or later, got {name}")
    return tuple(sorted(found, key=version))


def choose_cuda(environ: Mapping[str, str]) -> Cuda | str:
    """What to build, or the reason to build without CUDA. SystemExit where the settings cannot be met."""
    mode, archs = environ.get("SINKLORA_CUDA", "") or "auto", read_archs(environ)
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"SINKLORA_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return "SINKLORA_CUDA=0"
    try:
        if environ.get("SINKLORA_SANITIZE", "0") not in ("", "0"):
            raise NoCudaError("CUDA does not run under SINKLORA_SANITIZE=1, which is for the C code")
        toolkit = find_toolkit(environ)
        archs = archs or (DEFAULT_ARCHS if mode == "1" else visible_archs())
        unknown = [name for name in archs if name not in toolkit.archs]
        if unknown:
            what = f"nvcc {toolkit.release} does not know compute capability {', '.join(unknown)}"
            raise NoCudaError(f"{what}; a newer one does, or name others in SINKLORA_CUDA_ARCHS")
    except NoCudaError as error:
        if mode == "1":
            raise SystemExit(f"SINKLORA_CUDA=1: {error}") from None
        return str(error)
    return Cuda(toolkit, archs)


def find_toolkit(environ: Mapping[str, str]) -> Toolkit:
    if not sys.platform.startswith("linux"):
        raise NoCudaError(f"CUDA is built on Linux only, this is {sys.platform}")
    home = environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else environ.get("PATH"))
    if nvcc is None:
        raise NoCudaError(f"no nvcc in CUDA_HOME, {home}" if home else "no nvcc on PATH, and no CUDA_HOME")
    release = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    if release is None:
        raise NoCudaError(f"{nvcc} --version names no release")
    if version(release[1]) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise NoCudaError(f"nvcc {release[1]} is too old, {oldest} or later is needed ({nvcc})")
    archs = re.findall(r"compute_(\d+)(\d)\b", ask(nvcc, "--list-gpu-arch"))
    # What stands on PATH may be a script or a link elsewhere: nvcc itself knows where its libraries are.
    said = ask(nvcc, "--dryrun", "-x", "cu", *SETTINGS[:1])
    folders = re.findall(r'"-L([^"]+)"', said)
    found = [path for path in (Path(name, "libcudart_static.a") for name in folders) if path.is_file()]
    if not found:
        raise NoCudaError(f"no libcudart_static.a where {nvcc} links from: {', '.join(folders) or 'nowhere'}")
    return Toolkit(nvcc, release[1], frozenset(f"{a}.{b}" for a, b in archs), str(found[0].resolve()))


def visible_archs() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs, oldest first."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        raise NoCudaError("no GPU is visible here (no nvidia-smi)")
    said = ask(smi, "--query-gpu=compute_cap", "--format=csv,noheader")
    found = set(re.findall(r"^\s*(\d+\.\d)\s*$", said, re.MULTILINE))
    if not found:
        raise NoCudaError("no GPU is visible here (nvidia-smi shows none)")
    fit = sorted((name for name in found if version(name) >= OLDEST_ARCH), key=version)
    if not fit:
        raise NoCudaError(f"the GPU here ({', '.join(sorted(found))}) is older than Ampere (8.0)")
    return tuple(fit)


def ask(*command: str) -> str:
    """What a command prints, on either stream; nothing where it cannot run or hangs."""
    try:
        done = run(command, ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def run(command: Sequence[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, timeout=seconds
    )


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def common_flags() -> list[str]:
    flags = ["-std=c11", "-O3", "-g1", "-pthread", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Wstrict-prototypes"]
    if flag("SINKLORA_DEBUG"):
        flags += ["-O0", "-g"]
    if flag("SINKLORA_SANITIZE"):
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    if flag("SINKLORA_WERROR"):
        flags += ["-Werror"]
    return flags


def nvcc_flags(archs: Sequence[str]) -> list[str]:
    """For device code of each architecture, and of the newest as PTX too."""
    flags = ["-std=c++17", "-O3", "-lineinfo", "-Xfatbin=-compress-all", "-DSL_WITH_CUDA"]
    for arch in archs:
        number = arch.replace(".", "")
        also = f",compute_{number}" if arch == archs[-1] else ""
        flags.append(f"-gencode=arch=compute_{number},code=[sm_{number}{also}]")
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if flag("SINKLORA_DEBUG"):
        host += ["-O0", "-g"]
    if flag("SINKLORA_WERROR"):
        flags += ["-Werror", "all-warnings"]
    return [*flags, f"-Xcompiler={','.join(host)}"]


def apply(cuda: Cuda | str, ext: Extension) -> None:
    """What the C sources are told, which the module says again in build_info(), and what is linked."""
    ext.extra_link_args = ["-pthread", "-lm", "-ldl"]
    if flag("SINKLORA_SANITIZE"):
        ext.extra_link_args += ["-fsanitize=address,undefined"]
    if isinstance(cuda, str):
        ext.define_macros += [("SL_CUDA_ABSENT", json.dumps(cuda))]
        return
    archs, release = json.dumps(" ".join(cuda.archs)), json.dumps(cuda.toolkit.release)
    ext.define_macros += [("SL_WITH_CUDA", None), ("SL_CUDA_ARCHS", archs), ("SL_CUDA_TOOLKIT", release)]
    # The runtime and the C++ library within, nothing of them visible: the module needs no driver to be
    # imported, and meets no other copy of them.
    within = [cuda.toolkit.cudart, "-static-libgcc", *cpp_library()]
    ext.extra_link_args += [*within, "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]


def cpp_library() -> list[str]:
    """The C++ library, static where the compiler has it so: some distributions sell it apart."""
    compiler = os.environ.get("CC", "").split() or ["cc"]
    found = Path(ask(*compiler, "-print-file-name=libstdc++.a").strip())
    static = found.is_absolute() and found.is_file()
    return ["-Wl,-Bstatic", "-lstdc++", "-Wl,-Bdynamic"] if static else ["-lstdc++"]


def compile_cuda(cuda: Cuda, sources: Iterable[str], folder: Path, force: bool) -> list[str]:
    """The objects of all sources, as many at once as there are processors; what is unchanged stays."""
    start = time.monotonic()
    with ThreadPoolExecutor(processors()) as pool:
        done = list(pool.map(lambda source: compile_one(cuda, source, folder, force), sources))
    if flag("SINKLORA_CUDA_VERBOSE"):
        for seconds, target in sorted(done, reverse=True):
            print(f"sinklora: nvcc {seconds:6.1f} s  {target.relative_to(folder)}")
        print(f"sinklora: nvcc {time.monotonic() - start:6.1f} s  in all")
    return [str(target) for _, target in done]


def processors() -> int:
    """Those of this process: a container or a batch job may have few of many."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def compile_one(cuda: Cuda, source: str, folder: Path, force: bool) -> tuple[float, Path]:
    """Seconds that it took, 0 where nothing had changed, and the object."""
    target = folder / Path(source).with_suffix(".o")
    made, used = target.with_suffix(".command"), target.with_suffix(".d")
    files = ["-MMD", "-MF", str(used), "-c", source, "-o", str(target)]
    command = [cuda.toolkit.nvcc, *nvcc_flags(cuda.archs), *files]
    if not force and made.is_file() and made.read_text() == "\n".join(command) and is_fresh(target, used):
        return 0.0, target
    target.parent.mkdir(parents=True, exist_ok=True)
    made.unlink(missing_ok=True)  # an interrupted compilation must not pass for a whole one
    start = time.monotonic()
    done = run(command)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise CompileError(f"nvcc failed on {source}; SINKLORA_CUDA=0 builds without CUDA")
    made.write_text("\n".join(command))
    return time.monotonic() - start, target


def is_fresh(target: Path, used: Path) -> bool:
    """Is target newer than every file in the make rule that the compiler wrote beside it?"""
    if not target.is_file() or not used.is_file():
        return False
    rule = used.read_text().replace("\\\n", " ").partition(":")[2]
    files = [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", rule)]
    return all(Path(name).is_file() and changed(name) <= changed(target) for name in files)


def changed(path: str | Path) -> int:
    return Path(path).stat().st_mtime_ns


class BuildExt(build_ext):
    """CUDA by nvcc, each file under csrc/cpu/isa with its own flags, and nothing again that is unchanged."""

    def build_extension(self, ext: Extension) -> None:
        cuda = choose_cuda(os.environ)
        if isinstance(cuda, str):
            print(f"sinklora: building without CUDA: {cuda}")
        else:
            print(
                f"sinklora: building with CUDA {cuda.toolkit.release}, for {', '.join(cuda.archs)} and later"
            )
            ext.extra_objects = compile_cuda(cuda, CUDA_SOURCES, Path(self.build_temp), bool(self.force))
        apply(cuda, ext)
        # A file that is new whenever the settings of the build are.
        stamp = Path(self.build_temp, "settings.json")
        text = json.dumps([ext.define_macros, ext.extra_compile_args, ext.extra_link_args])
        if not stamp.is_file() or stamp.read_text() != text:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(text)
        ext.depends = [*ext.depends, str(stamp)]
        newest = max(map(changed, (*HEADERS, *SETTINGS, stamp)))
        compile_file = self.compiler._compile

        def with_isa(obj, src, suffix, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            made = changed(obj) if Path(obj).is_file() else 0
            if self.force or made < max(newest, changed(src)):
                isa = ISA_FLAGS.get(Path(src).name, []) if platform.machine() in ("x86_64", "AMD64") else []
                compile_file(obj, src, suffix, cc_args, [*extra, *isa], pp_opts)

        self.compiler._compile = with_isa
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_file


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "sinklora._C",
                SOURCES,
                include_dirs=[numpy.get_include()],
                define_macros=[
                    ("Py_LIMITED_API", "0x030B0000"),
                    ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
                    ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
                ],
                extra_compile_args=common_flags(),
                depends=[*ALL_HEADERS, *CUDA_SOURCES],
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": BuildExt},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
