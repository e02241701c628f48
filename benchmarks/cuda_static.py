"""What do the CUDA kernels issue, and what share of a GPU's peak does that allow? Needs nvcc, but no GPU.

usage: python benchmarks/cuda_static.py [--arch sm_80] [--kernel PART] [--output DATE-cuda-static.csv]
       python benchmarks/cuda_static.py --cubin FILE [FILE...] [--kernel PART] [--loops] [--instructions]

Compiles csrc/cuda, or reads the given cubins (nvcc -cubin), objects or libraries. Prints registers, stack,
spills and shared memory of each kernel, the instructions that its steady loop issues (what that is:
cuda_sass.py), and the predicted share of peak (how: cuda_model.py). --kernel keeps the kernels whose readable
name has that part; --loops adds every loop's counts, which --cubin prints by itself. nvdisasm is found on
PATH or from `pip install nvidia-cuda-nvdisasm` (objects also need nvidia-cuda-cuobjdump).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cuda_compile
import cuda_cubin
import cuda_rows
import cuda_sass
import machine
import report


def reports(
    cubin: Path, part: str, spills: Mapping[str, cuda_cubin.Spills] | None = None
) -> list[cuda_rows.Report]:
    """The kernels of a cubin whose readable name has that part, disassembled."""
    kernels = cuda_cubin.kernels(cubin)
    names = cuda_cubin.demangle([kernel.name for kernel in kernels])
    kernels = [kernel for kernel in kernels if part in names[kernel.name]]
    if not kernels:
        return []
    functions = {item.name: item for item in cuda_sass.functions(cuda_cubin.disassemble(cubin))}
    dynamic = cuda_compile.dynamic_shared(names[kernel.name] for kernel in kernels)
    found = []
    for kernel in kernels:
        name = names[kernel.name]
        item = cuda_rows.Report(name, kernel, functions[kernel.name], (spills or {}).get(kernel.name))
        if name in dynamic or not item.uses_shared():
            item.shared = kernel.shared + dynamic.get(name, 0)
        found.append(item)
    return found


def gather(options: argparse.Namespace, temp: Path) -> list[cuda_rows.Report]:
    if options.cubin:
        cubins = [
            cubin
            for index, path in enumerate(options.cubin)
            for cubin in cuda_cubin.cubins_of(path, temp / str(index))
        ]
        return [item for cubin in cubins for item in reports(cubin, options.kernel)]
    sources = cuda_compile.sources()
    if not sources:
        raise RuntimeError(f"no .cu file under {cuda_compile.CUDA.relative_to(cuda_compile.ROOT)}")
    compiled = cuda_compile.compile_sources(sources, options.arch, jobs=options.jobs)
    return [item for done in compiled for item in reports(done.cubin, options.kernel, done.spills)]


def show_loops(items: Sequence[cuda_rows.Report], instructions: bool) -> None:
    for item in items:
        print(
            f"{item.name}\n  registers {item.kernel.registers}, stack {item.kernel.stack}, local accesses "
            f"{item.function.local_accesses()}, shared {'unknown' if item.shared is None else item.shared}, "
            f"threads {item.kernel.threads or 'any'}, instructions {len(item.function.instructions)}"
        )
        print("  " + str(cuda_rows.loop_table(item)).replace("\n", "\n  "))
        print("  " + str(cuda_rows.part_table(item)).replace("\n", "\n  "))
        if instructions and item.steady:
            print("\n".join(f"    {line.address:04x}  {line.text}" for line in item.steady.path))
        print()


def facts() -> dict[str, str]:
    """Column name -> value: when, which tree, which tools."""
    versions = {}
    for name in ("nvcc", "nvdisasm"):
        found = re.findall(r"\bV(\d+\.\d+\.\d+)", cuda_cubin.run(name, "--version"))
        versions[name] = found[0] if found else ""
    return {"date": machine.date(), **machine.commit(), **versions, "system": machine.system()}


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--arch", default="sm_80", help="to compile for (default sm_80)")
    add("--cubin", nargs="+", type=Path, help="cubins, objects or libraries in place of csrc/cuda")
    add("--kernel", default="", help="only kernels whose name has this part")
    add("--loops", action="store_true", help="every loop's counts, and each pipe's clocks")
    add("--instructions", action="store_true", help="list the steady path's instructions as well")
    add("--jobs", type=int, default=2, help="nvcc processes at once (default 2)")
    add("--output", type=Path, help="CSV file to write; default: none")
    return parser.parse_args(given)


def main() -> int:
    options = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as temp:
            items = gather(options, Path(temp))
        if not items:
            raise RuntimeError(f"no kernel whose name has {options.kernel!r}")
        if options.cubin or options.loops or options.instructions:
            show_loops(items, options.instructions)
        print(cuda_rows.summary(items))
        print(
            "share of peak: of the steady loop, from nothing overlapping within a warp to all else hidden\n"
            "behind the busiest pipe, which is named (nothing was run; of float32's peak without HMMA)"
        )
        if options.output:
            rows = [row for item in items for row in cuda_rows.rows(item, options.arch)]
            report.write_csv(options.output, rows, facts())
            print(f"written: {options.output}")
    except (cuda_cubin.MissingToolError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
