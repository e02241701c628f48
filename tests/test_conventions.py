"""The house's rules (csrc/README.md) that a machine can check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinklora import _C

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
C_SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".c", ".h", ".inc", ".cu", ".cuh"})
PYTHON_SOURCES = sorted((ROOT / "sinklora").rglob("*.py"))
OUTSIDE_THE_TREE = {"build", "dist", "__pycache__", "sinklora-demo"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_comments(source: Path) -> str:
    """The C text with comments and string contents blanked, line numbers kept."""
    text = source.read_text()
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r'(?<!include )"(?:\\.|[^"\\\n])*"', '""', text)


def matches(pattern: str, sources: list[Path], exempt: set[str]) -> list[str]:
    found = []
    for source in sources:
        if relative(source) in exempt:
            continue
        text = without_comments(source) if source in C_SOURCES else source.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{relative(source)}:{number}: {line.strip()}")
    return found


# ---- folders are include permissions ----

LIBC = {"math.h", "stdarg.h", "stdbool.h", "stddef.h", "stdint.h", "stdio.h", "string.h", "float.h"}
CUDA = {"math.h", "float.h", "stdint.h", "stdio.h", "cuda_runtime.h"}
SYSTEM = {
    "core": LIBC,
    "cpu": LIBC
    | {"stdlib.h", "stdatomic.h", "pthread.h", "sched.h", "unistd.h", "dlfcn.h", "cpuid.h", "errno.h"},
    "cpu/isa": LIBC | {"immintrin.h", "arm_neon.h"},
    "python": LIBC | {"stdlib.h", "Python.h", "numpy/arrayobject.h"},
    "cuda": CUDA,
    "cuda/ptx": CUDA | {"emulator.h"},  # tests/emulator: what a host compiler takes for CUDA
}
OWN = {
    "core": (r"[a-z_0-9]+\.(h|def)",),
    "cpu": (r"[a-z_0-9]+\.h", r"\.\./core/\w+\.(h|def)"),
    "cpu/isa": (r"[a-z_0-9]+\.(h|inc)", r"\.\./kernels\.h"),
    "python": (
        r"[a-z_0-9]+\.h",
        r"\.\./core/\w+\.(h|def)",
        r"\.\./cpu/(detect|parallel)\.h",
        r"\.\./cuda/device\.h",
    ),
    # The host side of an operation knows the tiles and launchers of its kernels, never their code.
    "cuda": (
        r"\w+\.(h|cuh|def)",
        r"\.\./core/\w+\.(h|def)",
        r"ptx/\w+\.cuh",
        r"\w+/(\w+_)?(config\.h|params\.cuh)",
    ),
    "cuda/ptx": (r"\w+\.cuh", r"\.\./\.\./core/\w+\.(h|def)"),
}
# Kernels: their own folder, what all of them share, instructions.
KERNEL_FOLDERS = sorted(p.name for p in (CSRC / "cuda").iterdir() if p.is_dir() and p.name != "ptx")
for _name in KERNEL_FOLDERS:
    SYSTEM[f"cuda/{_name}"] = {"math.h", "float.h", "stdint.h"}
    OWN[f"cuda/{_name}"] = (
        r"\w+\.(h|cuh|def)",
        r"\.\./\w+\.(h|cuh|def)",
        r"\.\./ptx/\w+\.cuh",
        r"\.\./\.\./core/portable\.h",
    )


@pytest.mark.parametrize("source", C_SOURCES, ids=relative)
def test_folders_are_include_permissions(source: Path) -> None:
    folder = source.parent.relative_to(CSRC).as_posix()
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', source.read_text(), re.MULTILINE):
        if bracket == "<":
            assert name in SYSTEM[folder], f"{folder} may not include <{name}>"
        else:
            assert any(re.fullmatch(own, name) for own in OWN[folder]), f'{folder} may not include "{name}"'


def test_the_core_neither_prints_nor_exits_nor_allocates() -> None:
    calls = (
        r"\b(printf|fprintf|puts|fputs|perror|exit|_exit|abort|assert|malloc|calloc|realloc|alloca|free)\s*\("
    )
    # Threads live longer than a call, so their pool owns memory.
    assert not matches(calls, C_SOURCES, exempt={"csrc/cpu/parallel.c"})
    assert not matches(
        r"\b(printf|fprintf|puts|perror|exit|_exit|abort|assert)\s*\(", C_SOURCES, exempt=set()
    )


# ---- CUDA goes through ptx/ ----

CUDA_SOURCES = [s for s in C_SOURCES if s.is_relative_to(CSRC / "cuda")]


def test_kernels_reach_instructions_through_ptx() -> None:
    """What the emulator replaces: launches, instructions, shared memory. And what it could not see."""
    ptx = {relative(s) for s in CUDA_SOURCES if s.parent.name == "ptx"}
    assert not matches(r"<<<", C_SOURCES, {"csrc/cuda/ptx/platform.cuh"})
    assert not matches(r"\basm\b", CUDA_SOURCES, ptx)
    assert not matches(r"__CUDACC__|__CUDA_ARCH__", CUDA_SOURCES, ptx | {"csrc/cuda/device.cu"})
    assert not matches(r"\b__shared__", CUDA_SOURCES, {"csrc/cuda/ptx/memory.cuh"})
    assert not matches(r"\bvolatile\b", CUDA_SOURCES, ptx)
    assert not matches(
        r"\b(atomic(Add|CAS|Exch|Max|Min|Or|And|Xor|Inc)|__nv\w+|__ldg|__ldcs)\s*\(", CUDA_SOURCES, ptx
    )


def test_cuda_neither_waits_nor_allocates() -> None:
    """Work goes to the caller's stream, memory comes from the caller, and a graph can capture all of it."""
    calls = r"\bcuda(Malloc|Free|Host|Memcpy|Memset|\w*Synchronize|Stream|Event|Graph)\w*\s*\("
    assert not matches(calls, CUDA_SOURCES, exempt=set())


def test_every_ptx_header_has_a_unit_kernel() -> None:
    for header in (CSRC / "cuda" / "ptx").glob("*.cuh"):
        unit = ROOT / "tests" / "emulator" / "ptx" / f"{header.stem}.cu"
        assert header.stem == "platform" or unit.exists(), f"{relative(header)}: no {relative(unit)}"


# ---- one pattern, one header ----


def test_the_inequality_is_written_in_one_header() -> None:
    """Nobody else takes a position's group: no quotient by the group size, no use of the shift."""
    exempt = {"csrc/core/pattern.h", "csrc/core/pattern.c", "csrc/python/errors.c"}
    shift = r"(->|\.)shift\b"
    assert not matches(shift, C_SOURCES, exempt)
    position = r"\b(q|k|t|i|x|position)\b\s*[/%]\s*[\w.>-]*group_size|%\s*[\w.>-]*group_size|group_size\s*\*"
    assert not matches(position, C_SOURCES, exempt)
    # torch_s2.py folds for a rival, benchmark.py checks that it can; reference.py checks that whole groups
    # fill a sequence to be rolled.
    python = r"%\s*(\w+\.)*group_size|group_size\s*\*|//\s*(\w+\.)*group_size"
    found = matches(python, PYTHON_SOURCES, exempt={"sinklora/benchmark.py", "sinklora/torch_s2.py"})
    assert not [match for match in found if "if tokens % group_size:" not in match]


def test_every_kernel_folder_asks_the_pattern() -> None:
    for user in ("csrc/cpu/plan.c", "csrc/python/py_pattern.c", "csrc/cuda/h2o_score_params.cuh"):
        assert "sl_pattern_" in (ROOT / user).read_text()
    for folder in ("sm80", "simt"):
        kernels = (CSRC / "cuda" / folder).glob("attention_*.cuh")
        assert any("sl_pattern_" in kernel.read_text() for kernel in kernels), folder


# ---- sizes ----

FILE_LINES = 300
LONGER_FILES = {"csrc/cpu/attention_backward.c": 420}
FUNCTION_LINES = 65


@pytest.mark.parametrize("source", [*C_SOURCES, *PYTHON_SOURCES], ids=relative)
def test_files_stay_readable(source: Path) -> None:
    lines = len(source.read_text().splitlines())
    budget = LONGER_FILES.get(relative(source), FILE_LINES)
    assert lines <= budget, f"{lines} lines, at most {budget}: which noun is missing?"


def functions(source: Path) -> Iterator[tuple[str, int]]:
    """Name and length of every function."""
    if source.suffix == ".py":
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                yield node.name, node.end_lineno - node.lineno + 1
        return
    start: tuple[str, int] | None = None
    for number, line in enumerate(source.read_text().splitlines()):
        if line.endswith(") {") and not line.startswith(("#", "}")):
            start = start or (line, number)
        elif line == "}" and start:
            yield start[0], number - start[1] + 1
            start = None


# A command's function is its list of options.
READABLE = [p for p in [*C_SOURCES, *PYTHON_SOURCES] if p.parent.name != "commands"]


@pytest.mark.parametrize("source", READABLE, ids=relative)
def test_functions_stay_readable(source: Path) -> None:
    long = [f"{name}: {lines} lines" for name, lines in functions(source) if lines > FUNCTION_LINES]
    assert not long


# ---- one stem, four places ----

OPERATIONS = sorted(p.stem for p in (CSRC / "cpu").glob("*.c") if re.match(r"(attention|h2o)_", p.name))


@pytest.mark.parametrize("stem", OPERATIONS)
def test_every_operation_has_two_devices_tests_and_a_benchmark(stem: str) -> None:
    assert (CSRC / "cuda" / f"{stem}.cu").exists()
    assert (ROOT / "tests" / f"test_{stem}.py").exists()
    names = (f"test_cuda_{stem}.py", f"test_cuda_{stem.removeprefix('attention_')}.py")
    assert any((ROOT / "tests" / name).exists() for name in names), f"tests: none of {names}"
    names = (f"bench_{stem}.py", f"bench_{stem.partition('_')[0]}.py")
    assert any((ROOT / "benchmarks" / name).exists() for name in names), f"benchmarks: none of {names}"


# ---- the package ----


def test_import_is_light(tmp_path: Path) -> None:
    heavy = {"numpy", "torch", "transformers", "matplotlib"}
    code = f"import sys, sinklora; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


def test_stub_names_are_the_modules_names() -> None:
    stub = ast.parse((ROOT / "sinklora" / "_C.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    values = {
        n.target.id for n in stub.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    assert functions | values == {name for name in dir(_C) if not name.startswith("__")}


def test_the_extension_exports_one_symbol() -> None:
    if not shutil.which("nm") or not sys.platform.startswith("linux"):
        pytest.skip("no nm")
    command = ["nm", "-D", "--defined-only", str(_C.__file__)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {line.split()[-1] for line in symbols if line}
    # Under sanitizers the runtime adds its own.
    assert {name for name in names if not re.match(r"_|asan|ubsan", name)} <= {"PyInit__C"}


# ---- what a reader meets ----


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_is_short_and_has_its_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 200
    commands = [line for line in shell_lines(readme) if "pip install" in line and "&&" in line]
    assert len(commands) == 2, commands
    assert re.search(r"&&.*sinklora demo\b", commands[0]), commands[0]
    assert re.search(r'pip install -c tests/constraints\.txt .*"\.\[test\]".*&&.*\bpytest\b', commands[1])


def tracked_texts() -> Iterator[tuple[Path, str]]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = parts[0].startswith(".") and parts[0] != ".ci"
        made = any(p in OUTSIDE_THE_TREE or p.endswith(".egg-info") for p in parts)
        if hidden or made or not path.is_file() or path == Path(__file__).resolve():
            continue
        try:
            yield path, path.read_text()
        except UnicodeDecodeError:
            continue


def test_no_path_of_one_machine_is_in_the_tree() -> None:
    paths = re.compile(
        r"(?<![\w.])/(work|home|root|Users|tmp)/\w|(index|extra-index)-url|://[\w.-]*(pypi|artifact)\b"
    )
    found = [
        f"{relative(path)}: {match[0]}"
        for path, text in tracked_texts()
        for match in [paths.search(text)]
        if match
    ]
    assert not found
