"""Compiling the kernels for one architecture, with a cache, and asking their headers for shared memory.

Dynamic shared memory is not in a cubin: the host passes it at the launch. PLANS says which header knows it;
tests/test_cuda_static.py demands a line for every kernel that uses shared memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_cubin

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
# As in setup.py; -v makes ptxas say what spills.
FLAGS = ("-std=c++17", "-O3", "-DSL_WITH_CUDA", "-Xptxas", "-v")
CACHE = ROOT / "build" / "cuda-static"


@dataclass(frozen=True)
class Plan:
    """Kernels whose readable name matches use so many bytes: a C++ expression over one header, {0} and so on
    being the match's groups."""

    kernel: str
    header: str
    bytes: str


PLANS = (
    Plan(r"^attention_forward<.*, (\d+)>$", "sm80/attention_forward_config.h", "sl_forward_shared({0})"),
    Plan(
        r"^backward_(?:owner|keys)<.*, (\d+)>$",
        "sm80/attention_backward_config.h",
        "sl_backward_shared({0}, true)",
    ),
    Plan(
        r"^backward_queries<.*, (\d+)>$", "sm80/attention_backward_config.h", "sl_backward_shared({0}, false)"
    ),
    Plan(r"^h2o_score<.*, (\d+)>$", "sm80/h2o_score_config.h", "sl_score_shared({0})"),
    Plan(r"^attention_forward_f32<", "simt/tile_config.h", "SL_SIMT_FORWARD_SHARED"),
    Plan(r"^attention_backward_\w+_f32<", "simt/tile_config.h", "SL_SIMT_BACKWARD_SHARED"),
    Plan(r"^h2o_score_f32<", "simt/tile_config.h", "SL_SIMT_SCORE_SHARED"),
)


@dataclass(frozen=True)
class Compiled:
    source: Path
    cubin: Path
    spills: dict[str, cuda_cubin.Spills]


def sources() -> list[Path]:
    return sorted(CUDA.rglob("*.cu"))


def compile_sources(
    wanted: Sequence[Path], arch: str, *, defines: Sequence[str] = (), cache: Path = CACHE, jobs: int = 2
) -> list[Compiled]:
    """A cubin of each source for "sm_80" or another arch, compiled where the cache has none of this text.

    MissingToolError without nvcc, RuntimeError with its words where it fails.
    """
    nvcc = cuda_cubin.tool("nvcc")
    flags = [*FLAGS, *(f"-D{define}" for define in defines)]
    shared = hashlib.sha256(" ".join((nvcc, arch, *flags)).encode())
    shared.update(cuda_cubin.run("nvcc", "--version").encode())
    for path in sorted(ROOT.joinpath("csrc").rglob("*")):
        if path.suffix in (".h", ".cuh", ".def", ".inc"):
            shared.update(path.name.encode() + path.read_bytes())

    def one(source: Path) -> Compiled:
        key = shared.copy()
        key.update(str(source.relative_to(ROOT)).encode() + source.read_bytes())
        cubin = cache / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.cubin"
        said = cubin.with_suffix(".ptxas")
        if not said.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as temp:
                fresh = Path(temp, cubin.name)
                command = [nvcc, f"-arch={arch}", *flags, "-cubin", "-o", str(fresh), str(source)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"nvcc failed on {source.name}: {done.stderr.strip()[-3000:]}")
                os.replace(fresh, cubin)
                Path(temp, "said").write_text(done.stderr)
                os.replace(Path(temp, "said"), said)  # last: it stands for a finished compilation
        return Compiled(source, cubin, cuda_cubin.parse_ptxas(said.read_text()))

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, wanted))


def dynamic_shared(names: Iterable[str]) -> dict[str, int]:
    """Readable kernel name -> bytes of dynamic shared memory, for those that PLANS knows.

    Compiles a small host program from each header's constexpr functions and runs it. A header that is not
    here or does not know the function leaves its kernels out; the compiler's words go to standard error.
    """
    wanted: dict[str, dict[str, str]] = {}
    for name in sorted(set(names)):
        for plan in PLANS:
            if (match := re.search(plan.kernel, name)) and CUDA.joinpath(plan.header).exists():
                wanted.setdefault(plan.header, {})[name] = plan.bytes.format(*match.groups())
    found: dict[str, int] = {}
    for header, expressions in wanted.items():
        found |= _evaluated(header, expressions)
    return found


def _evaluated(header: str, expressions: dict[str, str]) -> dict[str, int]:
    lines = "".join(f'std::printf("{name}\\t%ld\\n", (long)({c}));\n' for name, c in expressions.items())
    text = f'#include <cstdio>\n#include <cstdint>\n#include "{header}"\nint main() {{\n{lines}}}\n'
    with tempfile.TemporaryDirectory() as temp:
        program, source = Path(temp, "plans"), Path(temp, "plans.cpp")
        source.write_text(text)
        command = [
            os.environ.get("CXX", "c++"),
            "-std=c++17",
            "-I",
            str(CUDA),
            "-o",
            str(program),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{header}: {done.stderr.strip()[-1000:]}", file=sys.stderr)
            return {}
        said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    pairs = (line.rsplit("\t", 1) for line in said.splitlines())
    return {name: int(number) for name, number in pairs}
