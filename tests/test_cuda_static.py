"""What the CUDA kernels compile to: no spills, no local memory, a lean inner loop; and the reader of SASS."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
ARCH = "sm_80"
# Of the forward's bfloat16 kernel with a head dimension of 128.
MOST_ISSUED_PER_HMMA = 2.5

needs_nvcc = pytest.mark.skipif(
    not SOURCES or shutil.which("nvcc") is None,
    reason="no nvcc: nothing compiled" if SOURCES else "no CUDA sources here",
)

Load = Callable[[str], ModuleType]

# One loop with a masked half, an inner loop without products, and a subroutine behind EXIT.
LISTING = r"""
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R12, R4, R8 ;
.L_x_2:
        /*0040*/                   LDG.E.128 R20, [R30.64] ;
        /*0050*/              @P2 BRA `(.L_x_2) ;
        /*0060*/              @!P3 BRA `(.L_x_3) ;
        /*0070*/                   FSEL R8, R8, -INF , P4 ;
        /*0080*/                   FSEL R9, R9, -INF , P4 ;
.L_x_3:
        /*0090*/               @P5 BRA `(.L_x_4) ;
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R3], [R30.64] ;
        /*00a8*/                   CALL.REL.NOINC `($kernel$divide) ;
.L_x_4:
        /*00b0*/                   MUFU.EX2 R8, R8 ;
        /*00c0*/                   IMAD.MOV.U32 R9, RZ, RZ, R8 ;
        /*00d0*/                   BRA.DIV UR4, `(.L_x_9) ;
        /*00e0*/              @!P0 EXIT ;
        /*00e8*/                   CALL.REL.NOINC `(.L_x_1) ;
.L_x_9:
        /*00f0*/                   EXIT ;
.L_x_10:
        /*0100*/               @P0 BRA `(.L_x_3);
        /*0110*/                   BRA `(.L_x_10);
	.section	.nv.constant0.kernel,"a",@progbits
        /*0000*/ .word 0x1 ;
	.section	.text.spilling,"ax",@progbits
        /*0000*/                   STL [R1], R0 ;
        /*0010*/                   LDL.64 R2, [R1] ;
        /*0020*/                   EXIT ;
"""

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aILi64EEv1p' for 'sm_80'
ptxas info    : Function properties for _Z1aILi64EEv1p
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 504 bytes cmem[0]
ptxas info    : Function properties for _Z1b
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
"""


# ---- reading listings ----


def test_functions_and_their_local_accesses(load: Load) -> None:
    sass = load("cuda_sass")
    kernel, spilling = sass.functions(LISTING)
    assert (kernel.name, len(kernel.instructions), kernel.local_accesses()) == ("kernel", 20, 0)
    assert (spilling.name, spilling.local_accesses()) == ("spilling", 2)
    assert kernel.labels[".L_x_3"] == 0x90


def test_cuobjdumps_listing_has_addresses_for_labels(load: Load) -> None:
    sass = load("cuda_sass")
    text = """
		Function : other
        /*0000*/                   FFMA R1, R1, R2, R3 ;          /* 0x0000000102017223 */
                                                                  /* 0x000fca0000000003 */
        /*0010*/               @P0 BRA 0x0 ;                      /* 0xfffffff000000947 */
        /*0020*/                   EXIT ;                         /* 0x000000000000794d */
"""
    (function,) = sass.functions(text)
    (loop,) = sass.loops(function)
    assert [item.opcode for item in loop.path] == ["FFMA", "BRA"]


def test_loops_nest_and_the_steady_path_copies_without_masking(load: Load) -> None:
    sass = load("cuda_sass")
    kernel = sass.functions(LISTING)[0]
    outer, inner = sass.loops(kernel)  # the one that nothing reaches is none
    assert (outer.depth, outer.innermost, inner.depth, inner.innermost) == (1, False, 2, True)
    count = outer.count()
    wanted = {"HMMA": 1, "LDSM": 1, "LDG": 1, "LDGSTS": 1, "MUFU": 1, "MOV": 1, "BRA": 7}
    assert count == wanted, "masked selects are off the path, the copy is on it"
    assert len(outer.path) == 13 and outer.longest == 15
    assert [item.address for item in inner.path] == [0x40, 0x50]


def test_the_steady_loop_has_the_products(load: Load) -> None:
    sass = load("cuda_sass")
    text = """
	.section	.text.k,"ax",@progbits
.L_1:
        /*0000*/                   FADD R1, R1, R2 ;
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/               @P0 BRA `(.L_1) ;
.L_2:
        /*0040*/                   HMMA.16816.F32 R8, R12, R4, R8 ;
        /*0050*/               @P0 BRA `(.L_2) ;
        /*0060*/                   EXIT ;
"""
    (function,) = sass.functions(text)
    steady = sass.steady_loop(sass.loops(function))
    assert steady.path[0].opcode == "HMMA.16816.F32"
    outer, inner = sass.loops(sass.functions(LISTING)[0])
    assert sass.steady_loop([outer, inner]) is outer and sass.steady_loop([inner]) is inner
    assert sass.steady_loop([]) is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("@!P0 LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGSTS"),
        ("LDG.E R1, [R2.64]", "LDG"),
        ("STL [R1], R2", "local"),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "MOV"),
        ("IMAD.WIDE R1, R2, R3, R4", "IMAD"),
        ("@UP0 UIADD3 UR4, UR4, 0x1, URZ", "uniform"),
        ("ULDC.64 UR4, c[0x0][0x118]", "uniform"),
        ("LDSM.16.MT88.4 R4, [R2]", "LDSM"),
        ("LDS.128 R4, [R2]", "LDS"),
        ("F2FP.BF16.PACK_AB R1, R2, R3", "F2FP"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "BAR"),
        ("HMMA.1688.F32 R4, R1, R2, R4", "HMMA"),
        ("QSPC.E.S P0, RZ, [R1]", "other"),
    ],
)
def test_classes(load: Load, text: str, kind: str) -> None:
    assert load("cuda_sass").Instruction(0, text).kind == kind


def test_ptxas_says_what_spills(load: Load) -> None:
    cubin = load("cuda_cubin")
    found = cubin.parse_ptxas(PTXAS)
    assert found == {"_Z1aILi64EEv1p": cubin.Spills(0, 0, 0), "_Z1b": cubin.Spills(24, 8, 12)}


def test_readable_names(load: Load) -> None:
    readable = load("cuda_cubin").readable
    assert readable("void forward<(sl_dtype)1, 128>(params)") == "forward<bfloat16, 128>"
    assert readable("void f<(kind)2, -1>(void (*)(int), int)") == "f<2, -1>"
    assert readable("clear") == "clear"


def test_a_missing_tool_says_how_to_get_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    cubin = load("cuda_cubin")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(cubin.MissingToolError, match="pip install nvidia-cuda-nvdisasm"):
        cubin.tool("nvdisasm")


# ---- the model ----


def test_peaks_are_the_data_sheets(load: Load) -> None:
    peaks = {part.name: part.peak_tflops() for part in load("cuda_model").PARTS}
    assert peaks == pytest.approx({"A100 SXM": 312, "H100/H200 SXM": 989, "RTX 4090": 165}, rel=0.01)
    singles = [part.peak_tflops(tensor=False) for part in load("cuda_model").PARTS]
    assert singles == pytest.approx([19.5, 67 * 1.83 / 1.98, 82.6], rel=0.01)


def test_occupancy_by_each_limit(load: Load) -> None:
    model = load("cuda_model")
    a100, _, ada = model.PARTS
    assert model.occupancy(a100, 232, 80 * 1024, 128) == model.Occupancy(2, 8, "registers")
    assert model.occupancy(a100, 128, 80 * 1024, 128) == model.Occupancy(2, 8, "shared")
    assert model.occupancy(ada, 32, 0, 1024) == model.Occupancy(1, 32, "threads")
    assert model.occupancy(a100, 32, 0, 32) == model.Occupancy(32, 32, "blocks")
    assert model.occupancy(ada, 32, 100 * 1024, 128).blocks == 0


def test_the_busiest_pipe_limits(load: Load) -> None:
    model, sass = load("cuda_model"), load("cuda_sass")
    a100 = model.PARTS[0]
    product = [sass.Instruction(0, "HMMA.16816.F32.BF16 R8, R12, R4, R8")]
    fragment = [sass.Instruction(0, "LDSM.16.M88.4 R4, [R2]")]
    best = model.predict(product * 8, a100, warps=8)
    assert (best.limit, best.best) == (model.TENSOR, 1.0)
    # A fragment read for every product takes twice the product's time on shared memory.
    bound = model.predict((product + fragment) * 8, a100, warps=8)
    assert (bound.limit, bound.best) == (model.SHARED, 0.5)
    assert bound.tflops()[1] == pytest.approx(156, rel=0.01)
    # Alone in its quarter, a warp waits for both in turn.
    assert model.predict((product + fragment) * 8, a100, warps=4).worst == pytest.approx(1 / 3)
    assert model.predict(fragment, a100, warps=8) is None and model.predict(product, a100, warps=0) is None
    floats = model.predict([sass.Instruction(0, "FFMA R1, R2, R3, R1")] * 9, a100, warps=8)
    assert (floats.tensor, floats.best) == (False, 1.0)


# ---- the kernels ----


def reports_of(sources: list[Path], *defines: str) -> list:
    """Each kernel compiled (kept between runs in build/) and disassembled; skips without nvdisasm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import cuda_compile
        import cuda_cubin
        import cuda_static

        try:
            cuda_cubin.tool("nvdisasm")
        except cuda_cubin.MissingToolError as error:
            pytest.skip(str(error))
        compiled = cuda_compile.compile_sources(sources, ARCH, defines=defines)
        return [item for done in compiled for item in cuda_static.reports(done.cubin, "", done.spills)]


@needs_nvcc
def test_the_forwards_loop_is_lean() -> None:
    (source,) = [path for path in SOURCES if path.name == "attention_forward_bf16.cu"]
    (forward,) = reports_of([source], "SL_ONLY_HEAD_DIM=128")
    assert forward.name == "attention_forward<bfloat16, 128>" and spilling([forward]) == []
    count = forward.steady.count()
    issued = len(forward.steady.path) / count["HMMA"]
    assert issued <= MOST_ISSUED_PER_HMMA, f"{issued:.2f} instructions for each HMMA: {dict(count)}"


def spilling(reports: list) -> list[str]:
    """What uses local memory, by any of the four signs of it."""
    return [
        f"{item.name}: stack {item.kernel.stack}, {item.spills}, {item.function.local_accesses()} accesses, "
        f"registers {item.kernel.registers}"
        for item in reports
        if item.kernel.stack or any(vars(item.spills).values()) or item.function.local_accesses()
    ]


@pytest.fixture(scope="module")
def every_kernel() -> list:
    return reports_of(SOURCES)


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills_or_uses_local_memory(every_kernel: list) -> None:
    assert every_kernel and not spilling(every_kernel), "\n".join(spilling(every_kernel))


@needs_nvcc
@pytest.mark.slow
def test_shared_memory_is_known_and_fits_every_part(load: Load, every_kernel: list) -> None:
    """Asked of every kernel that is there for its products; others scan, copy or merge."""
    products = [item for item in every_kernel if re.search("attention|backward_|h2o_score", item.name)]
    assert products and not [item.name for item in products if item.shared is None], "cuda_compile.PLANS"
    for item in every_kernel:
        for part, fits, _ in item.predictions():
            assert fits.blocks, f"{item.name}: {item.shared} bytes do not fit {part.name}"
    assert max(item.shared or 0 for item in every_kernel) <= 99 * 1024


@needs_nvcc
@pytest.mark.slow
def test_the_script_writes_what_it_prints(load: Load, every_kernel: list, tmp_path: Path) -> None:
    rows, report = load("cuda_rows"), load("report")
    output = tmp_path / "static.csv"
    made = [row for item in every_kernel for row in rows.rows(item, ARCH)]
    report.write_csv(output, made, {"commit": "x"})
    text = output.read_text().splitlines()
    assert len(text) == 1 + 3 * len(every_kernel) and text[0].startswith("kernel,arch,registers")
    assert len(rows.summary(every_kernel).lines) == len(every_kernel)
