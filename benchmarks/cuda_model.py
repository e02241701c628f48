"""How much of a GPU's peak can a loop reach? A model of the pipes of one quarter of a multiprocessor (SM).

Each quarter issues one warp instruction a clock. A pipe is busy for so many clocks of a quarter with one
warp instruction; shared memory serves all four quarters, 128 bytes a clock, so its clocks count four times.
Two figures bound the truth:

    best    the busiest pipe sets the pace, everything else hides behind it
    worst   within a warp nothing overlaps; only the resident warps of a quarter take turns

Not modelled: latencies, bank conflicts (the emulator counts those), L2 and memory, clocks that drop under
load, the tiles that are masked in part, the ends of a kernel. These are predictions until a GPU has answered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cuda_sass import Instruction

QUARTERS = 4
FLOPS_PER_HMMA = 2 * 16 * 8 * 16
FLOPS_PER_FFMA = 2 * 32
WARP = 32
REGISTERS = 65536
REGISTERS_STEP = 256  # a warp's registers are given out in such steps
SHARED_RESERVED = 1024  # of each block, by the driver
# Of a loop without HMMA: fewer multiply-adds than this share are not what it is there for.
LEAST_PRODUCTS = 0.25


@dataclass(frozen=True)
class Part:
    """Clocks of a quarter that one warp instruction takes on each pipe, and what an SM holds."""

    name: str
    capability: str
    sms: int
    ghz: float
    hmma: float  # m16n8k16, 16-bit inputs, float32 sums, by mma.sync
    hmma_peak: float  # the same at the vendor's dense peak
    fma: float
    alu: float
    shared_kib: int
    shared_block_kib: int
    threads: int
    blocks: int

    def peak_tflops(self, tensor: bool = True) -> float:
        clocks, flops = (self.hmma_peak, FLOPS_PER_HMMA) if tensor else (self.fma, FLOPS_PER_FFMA)
        return self.sms * QUARTERS * self.ghz * flops / clocks / 1e3


# From public data sheets. Hopper's peak needs wgmma; mma.sync is taken to reach 62 % of it, as published
# microbenchmarks found (not measured here). GeForce parts sum in float32 at half rate.
PARTS = (
    Part("A100 SXM", "8.0", 108, 1.41, 8, 8, 2, 2, 164, 163, 2048, 32),
    Part("H100/H200 SXM", "9.0", 132, 1.83, 4 / 0.62, 4, 1, 2, 228, 227, 2048, 32),
    Part("RTX 4090", "8.9", 128, 2.52, 32, 32, 1, 2, 100, 99, 1536, 24),
)

TENSOR, XU, FMA, ALU, SHARED, ISSUE = "tensor", "MUFU", "FMA", "ALU", "shared", "issue"
_ALU = ("FMNMX", "F2FP", "IADD", "LOP", "SEL", "MOV")


def _shared_clocks(item: Instruction) -> int:
    """Wavefronts of 128 bytes without bank conflicts, four clocks of a quarter each."""
    parts = item.opcode.split(".")
    if item.kind == "LDSM":
        matrices = int(parts[-1]) if parts[-1] in ("2", "4") else 1
        return QUARTERS * matrices
    widths = [int(part) for part in parts if part in ("64", "128")]
    return QUARTERS * max(1, max(widths, default=32) // 32)


def pipe_of(item: Instruction, part: Part) -> tuple[str, float]:
    """(pipe, clocks) of one warp instruction. What only takes an issue slot has the pipe ISSUE and 1."""
    kind, name = item.kind, item.opcode
    if kind == "HMMA":
        return TENSOR, part.hmma / (2 if "1688" in name else 1)
    if kind == "MUFU" or re.match(r"F2F\b|F2I|I2F", name):
        return XU, 8
    if kind in ("FFMA", "FADD", "FMUL") or name.startswith("IMAD"):
        return FMA, part.fma
    if kind in ("LDSM", "LDS", "STS", "LDGSTS"):
        return SHARED, _shared_clocks(item)
    if kind == "SHFL":
        return SHARED, QUARTERS
    if kind in _ALU and not re.match(r"CS2R|S2R|S2UR|R2UR|LDC", name):
        return ALU, part.alu
    return ISSUE, 1


def pipes(path: Sequence[Instruction], part: Part) -> dict[str, float]:
    """Clocks that each pipe is busy while one warp runs the path."""
    busy: Counter[str] = Counter()
    for item in path:
        pipe, clocks = pipe_of(item, part)
        if pipe != ISSUE:
            busy[pipe] += clocks  # type: ignore[assignment]
    return dict(busy) | {ISSUE: float(len(path))}


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int  # resident on an SM
    limit: str  # what allows no more blocks


def occupancy(part: Part, registers: int, shared: int, threads: int) -> Occupancy:
    """Blocks that an SM holds at once; shared counts static and dynamic bytes of a block."""
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTERS_STEP) * REGISTERS_STEP
    # Warps are given to quarters, each with its own quarter of the registers.
    fitting = REGISTERS // QUARTERS // max(per_warp, 1) * QUARTERS
    room = {
        "registers": fitting // warps,
        "shared": part.shared_kib * 1024 // (shared + SHARED_RESERVED),
        "threads": part.threads // (warps * WARP),
        "blocks": part.blocks,
    }
    if shared > part.shared_block_kib * 1024:
        room["shared"] = 0
    limit = min(room, key=lambda name: room[name])
    return Occupancy(room[limit], room[limit] * warps, limit)


@dataclass(frozen=True)
class Prediction:
    """Shares of the part's published peak, best and worst, and what the best waits for."""

    part: Part
    tensor: bool
    limit: str
    clocks: dict[str, float]
    best: float
    worst: float

    def tflops(self) -> tuple[float, float]:
        peak = self.part.peak_tflops(self.tensor)
        return self.worst * peak, self.best * peak


def predict(path: Sequence[Instruction], part: Part, warps: int) -> Prediction | None:
    """None for a path that does no products, or of a kernel that does not fit."""
    kinds = Counter(item.kind for item in path)
    tensor = kinds["HMMA"] > 0
    products = tensor or kinds["FFMA"] >= LEAST_PRODUCTS * len(path)
    if warps == 0 or not products:
        return None
    clocks = pipes(path, part)
    least = clocks[TENSOR] * part.hmma_peak / part.hmma if tensor else kinds["FFMA"] * part.fma
    limit = max(clocks, key=lambda name: clocks[name])
    # A warp alone: its instructions in line, each as long as its pipe is busy. Shared memory then serves the
    # other quarters as well, which is in its clocks already.
    in_line = sum(max(1.0, pipe_of(item, part)[1]) for item in path)
    slowest = max(clocks[limit], in_line / max(1.0, warps / QUARTERS))
    return Prediction(part, tensor, limit, clocks, least / clocks[limit], least / slowest)
