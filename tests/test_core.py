"""Builds and runs the C tests (tests/c) under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
C_TESTS = ROOT / "tests" / "c"
CC = os.environ.get("CC", "cc")
WARNINGS = ["-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
SOURCES = sorted([*CSRC.glob("core/*.c"), *CSRC.glob("cpu/*.c"), *CSRC.glob("cpu/isa/*.c")])


def isa_flags(source: Path) -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    flags: list[str] = settings["tool"]["sinklora"]["isa-flags"].get(source.name, [])
    return flags


def run(*command: str | Path, seconds: int = 300, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == 0, (
        f"{command[0]}: exit {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}"
    )
    return done.stdout


@pytest.fixture(scope="session")
def sanitizer_supported(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not shutil.which(CC):
        pytest.skip(f"no C compiler ({CC})")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    command = [CC, *SANITIZERS["address"], "probe.c", "-o", "probe"]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip(f"{CC} has no sanitizer runtime")


def build_objects(folder: Path, flags: list[str]) -> list[Path]:
    """Every source of the core and the CPU kernels, two compilers at a time."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        run(CC, "-std=c11", "-O1", "-g1", "-pthread", *flags, *isa_flags(source), "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, SOURCES))


@pytest.fixture(scope="session")
def objects(sanitizer_supported: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build_objects(tmp_path_factory.mktemp("objects"), SANITIZERS["address"])


def build_program(name: str, folder: Path, flags: list[str], objects: list[Path]) -> Path:
    program = folder / name
    options = ["-std=c11", "-O1", "-g1", "-pthread", *WARNINGS, *flags]
    run(CC, *options, C_TESTS / f"{name}.c", *objects, "-lm", "-ldl", "-o", program)
    return program


def test_pattern(sanitizer_supported: None, tmp_path: Path) -> None:
    program = build_program("test_pattern", tmp_path, SANITIZERS["address"], [])
    assert "0 failed" in run(program)


def test_attention(objects: list[Path], tmp_path: Path) -> None:
    program = build_program("test_attention", tmp_path, SANITIZERS["address"], objects)
    assert "0 failed" in run(program)


@pytest.mark.parametrize("name", ("test_h2o_score", "test_h2o_decode", "test_h2o_select"))
def test_h2o(objects: list[Path], tmp_path: Path, name: str) -> None:
    program = build_program(name, tmp_path, SANITIZERS["address"], objects)
    assert "0 failed" in run(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("test_attention", "test_h2o_score", "test_h2o_decode", "test_h2o_select"))
@pytest.mark.parametrize("seed", range(2, 12))
def test_more_cases(objects: list[Path], tmp_path: Path, name: str, seed: int) -> None:
    program = build_program(name, tmp_path, SANITIZERS["address"], objects)
    assert "0 failed" in run(program, str(seed), "400")


@pytest.mark.slow
def test_no_data_race(sanitizer_supported: None, tmp_path: Path) -> None:
    flags = SANITIZERS["thread"]
    compiled = build_objects(tmp_path, flags)
    for name in ("test_attention", "test_h2o_score", "test_h2o_decode"):
        assert "0 failed" in run(build_program(name, tmp_path, flags, compiled), "1", "60")


def test_pattern_header_is_cpp(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        pytest.skip(f"no C++ compiler ({compiler})")
    (tmp_path / "one.cpp").write_text(f'#include "{CSRC}/core/pattern.h"\n')
    run(
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-fsyntax-only",
        tmp_path / "one.cpp",
    )


def test_pattern_header_is_cuda(tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    source = tmp_path / "one.cu"
    source.write_text(
        f"""#include "{CSRC}/core/pattern.h"
__global__ void pairs(sl_pattern pattern, long long n, long long *out) {{
    out[threadIdx.x] = sl_pattern_pairs(&pattern, threadIdx.x & 1, n);
}}
"""
    )
    run("nvcc", "-std=c++17", "-c", source, "-o", tmp_path / "one.o")
