"""What the unit kernels in tests/emulator/ptx must dump, from the PTX manual's words and not from the code.

Each ``Unit`` is one call of one kernel: words in, words out. Matrices are filled element by element by the
manual's formulas for rows and columns of fragments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Words = np.ndarray  # uint32


@dataclass(frozen=True)
class Unit:
    kernel: str
    mode: int
    what: str
    inputs: Callable[[np.random.Generator], Words]
    expected: Callable[[Words], Words]
    # For approximate units: largest relative error.
    tolerance: float = 0.0
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.kernel}-{self.what}")


def words(n: int) -> Callable[[np.random.Generator], Words]:
    return lambda rng: rng.integers(0, 2**32, n, dtype=np.uint32)


def _f32(values: Words) -> np.ndarray:
    return np.ascontiguousarray(values, np.uint32).view(np.float32)


def _bits(values: np.ndarray) -> Words:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


# ---- ldmatrix: of each 8x8 matrix thread l receives elements 2(l%4) and 2(l%4)+1 of row l/4


def _ldmatrix(count: int, trans: bool) -> Callable[[Words], Words]:
    def expected(given: Words) -> Words:
        matrices = given.view(np.uint16).reshape(4, 8, 8).astype(np.uint32)
        out = np.zeros((32, 4), np.uint32)
        for lane in range(32):
            for i in range(count):
                m = matrices[i].T if trans else matrices[i]
                row = m[lane // 4]
                out[lane, i] = row[lane % 4 * 2] | row[lane % 4 * 2 + 1] << 16
        return out.ravel()

    return expected


def _movmatrix(given: Words) -> Words:
    held = given[:32].view(np.uint16).reshape(8, 8)  # thread l holds elements 2(l%4), +1 of row l/4
    out = np.zeros((32, 4), np.uint32)
    out[:, 0] = np.ascontiguousarray(held.T).view(np.uint32).ravel()
    return out.ravel()


# ---- mma.m16n8k16: groupID = lane >> 2, threadID_in_group = lane % 4; element i of a fragment:
#  A: row = groupID for i in 0,1,4,5 else groupID + 8;     col = threadID * 2 + (i & 1), + 8 for i >= 4
#  B: row = threadID * 2 + (i & 1), + 8 for i >= 2;        col = groupID
#  C, D: row = groupID for i in 0,1 else groupID + 8;      col = threadID * 2 + (i & 1)


def _halves(values: Words, bf16: bool) -> np.ndarray:
    """float64 of the 16-bit numbers, lower half first."""
    short = values.view(np.uint16)
    if bf16:
        return _f32(short.astype(np.uint32) << 16).astype(np.float64)
    return short.view(np.float16).astype(np.float64)


def _mma_inputs(bf16: bool) -> Callable[[np.random.Generator], Words]:
    def inputs(rng: np.random.Generator) -> Words:
        values = (
            rng.integers(-8, 9, 192 * 2).astype(np.float32) / 4
        )  # exact in either format, and so are their sums
        short = (_bits(values) >> 16).astype(np.uint16) if bf16 else values.astype(np.float16).view(np.uint16)
        return np.concatenate([short.view(np.uint32), _bits(rng.integers(-99, 99, 128).astype(np.float32))])

    return inputs


def _mma(bf16: bool) -> Callable[[Words], Words]:
    def expected(given: Words) -> Words:
        a_of = _halves(given[:128], bf16).reshape(32, 8)
        b_of = _halves(given[128:192], bf16).reshape(32, 4)
        c_of = _f32(given[192:]).reshape(32, 4)
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))

        def place(i: int, lane: int) -> tuple[int, int]:
            return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)

        for lane in range(32):
            group, thread = lane // 4, lane % 4
            for i in range(8):
                row = group if i in (0, 1, 4, 5) else group + 8
                a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)] = a_of[lane, i]
            for i in range(4):
                b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] = b_of[lane, i]
                c[place(i, lane)] = c_of[lane, i]
        d = a @ b + c
        return _bits(np.array([[d[place(i, lane)] for i in range(4)] for lane in range(32)])).ravel()

    return expected


# ---- cp.async


def _cp_async(size: int) -> Callable[[Words], Words]:
    def expected(given: Words) -> Words:
        out = np.full((32, 16), 0xAB, np.uint8)
        source = given.view(np.uint8)
        for lane in range(32):
            taken = min(lane % 5, 4) * size // 4
            out[lane, :size] = 0
            out[lane, :taken] = source[lane * size : lane * size + taken]
        rest = np.full(128, 0xABABABAB, np.uint32)
        return np.concatenate([out.view(np.uint32).ravel(), rest])

    return expected


def _even_copies(given: Words) -> Words:
    out = np.full((64, 4), 0xABABABAB, np.uint32)
    out[:32] = 0
    out[:32:2] = given.reshape(64, 4)[:32:2]
    return out.ravel()


# ---- shared and global memory


def _exchange(size: int, stored: int = 16) -> Callable[[Words], Words]:
    """Lane l gets the first size bytes that lane l ^ 1 had; 16 bytes a lane are stored, or only size."""

    def expected(given: Words) -> Words:
        rows = given.view(np.uint8).reshape(32, 16)
        out = np.zeros((32, 16), np.uint8)
        out[:, :size] = rows[np.arange(32) ^ 1, :size]
        return out.view(np.uint32).ravel()

    def copied(given: Words) -> Words:
        rows = given.view(np.uint8)[: 32 * size].reshape(32, size)
        out = np.zeros(512, np.uint8)
        out[: 32 * size] = rows[np.arange(32) ^ 1].ravel()
        return out.view(np.uint32)

    return expected if stored == 16 else copied


# ---- warps, barriers, atomics


def _warp_floats(given: Words) -> Words:
    v = _f32(given)
    by4, by8 = v.reshape(8, 4), v.reshape(4, 8)
    rows = [np.full(32, v.sum()), by4.sum(1).repeat(4), np.full(32, v.max()), by8.max(1).repeat(8)]
    return _bits(np.array(rows)).ravel()


def _warp_words(given: Words) -> Words:
    n, lane = given.astype(np.int64), np.arange(32)
    signed = given.view(np.int32).astype(np.int64)

    def taken(source: np.ndarray, first: np.ndarray, width: int) -> np.ndarray:
        return n[np.where((source < first) | (source >= first + width), lane, source)]

    zero = np.zeros(32, np.int64)
    odd = n & 1
    ballot = int((odd << lane).sum())
    same = (n[:, None] & 3) == (n[None, :] & 3)
    halves = [signed[:16].max(), signed[16:].max()]
    rows = [
        np.full(32, n[5]),
        taken(lane // 8 * 8 + 9 % 8, lane // 8 * 8, 8),
        n[lane ^ 6],
        taken(lane - 3, zero, 32),
        taken(lane - 3, lane // 16 * 16, 16),
        taken(lane + 7, zero, 32),
        taken(lane + 1, lane // 4 * 4, 4),
        np.full(32, ballot),
        np.full(32, 1),
        np.full(32, 1 + 2 * int(odd.all())),
        (same.astype(np.int64) << lane[None, :]).sum(1),
        np.full(32, n.sum()),
        np.full(32, signed.min()),
        np.full(32, n.max()),
        np.repeat(halves, 16),
    ]
    return (np.array(rows) & 0xFFFFFFFF).astype(np.uint32).ravel()


def _barrier(given: Words) -> Words:
    received = np.zeros(128, np.uint64)
    for pair in range(2):
        sent = given[pair * 32 : pair * 32 + 32].astype(np.uint64)[::-1]
        total = np.zeros(32, np.uint64)
        for step in range(3):
            total = total * np.uint64(3) + ((sent + np.uint64(step)) & np.uint64(0xFFFFFFFF))
        received[64 + pair * 32 : 96 + pair * 32] = total
    odd = given & 1
    rows = [
        (received & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        np.full(128, odd.sum()),
        np.full(128, 1),
        np.full(128, 1 + 2 * int(odd.all())),
        np.full(128, 1),
    ]
    return np.array(rows).astype(np.uint32).ravel()


def _atomic(given: Words) -> Words:
    counts = np.bincount(given % 16, minlength=16)
    signed = given.view(np.int32)
    ored = int(np.bitwise_or.reduce(np.uint32(1) << (given % 32)))
    extremes = [
        given.min(),
        given.max(),
        int(signed.min()) & 0xFFFFFFFF,
        int(signed.max()) & 0xFFFFFFFF,
        ored,
    ]
    # Exchange leaves 9 and gives 7; a match of 7 stores 11, 8 matches nothing; a global 0 becomes 5.
    return np.array([*counts, *counts, *extremes, 9, 11, 7, 7, 7, 7, 0, 5], np.uint32)


# ---- conversions


def _float_inputs(rng: np.random.Generator) -> Words:
    """All sorts of floats: any bits, halfway cases of both formats, their limits, specials."""
    edges = np.array(
        [0.0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 2.0**-24, 2.0**-25, 6e-8, 1e-40], np.float32
    )
    near = rng.standard_normal(100).astype(np.float32)
    halfway = _f32((_bits(near) & 0xFFFF0000) | 0x8000), _f32((_bits(near) & 0xFFFFE000) | 0x1000)
    small = np.ldexp(rng.random(80).astype(np.float32), rng.integers(-30, -10, 80))
    some = np.concatenate([_bits(edges), _bits(near), *map(_bits, halfway), _bits(small.astype(np.float32))])
    rest = rng.integers(0, 2**32, 512 - len(some), dtype=np.uint32)
    return np.where(np.isnan(_f32(out := np.concatenate([some, rest]))), np.uint32(0x3F800000), out)


def _float_inputs_128(rng: np.random.Generator) -> Words:
    return _float_inputs(rng)[:128]


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """By distance: of the two neighbours the nearer one, of equally near ones the even one."""
    low = (_bits(values) & 0xFFFF0000).astype(np.uint64)  # towards zero
    high = low + 0x10000
    at = values.astype(np.float64)

    def value(bits: np.ndarray) -> np.ndarray:
        exact = _f32(bits.astype(np.uint32)).astype(np.float64)
        return np.where(np.isinf(exact) & np.isfinite(at), np.sign(exact) * 2.0**128, exact)

    below, above = np.abs(at - value(low)), np.abs(value(high) - at)
    up = (above < below) | ((above == below) & ((low >> 16) % 2 == 1))
    up &= np.isfinite(at)
    return (np.where(up, high, low) >> 16).astype(np.uint32)


def round_to_f16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)


def _convert(bf16: bool) -> Callable[[Words], Words]:
    @np.errstate(all="ignore")
    def expected(given: Words) -> Words:
        short = (round_to_bf16 if bf16 else round_to_f16)(_f32(given))
        lo, hi = short[0::2], short[1::2]
        pairs = (given[0::2] >> 16 | (given[1::2] & 0xFFFF0000)).astype(np.uint32)
        wide = _bits(_halves(pairs, bf16).astype(np.float32)).reshape(256, 2)
        return np.concatenate([lo | hi << 16, lo, wide[:, 0], wide[:, 1], wide[:, 0]])

    return expected


def _special_inputs(rng: np.random.Generator) -> Words:
    values = np.concatenate([rng.uniform(0.01, 30, 240), [1, 2, 0.5, 0, 126, 1e-41, np.inf, 1e30] * 2])
    return np.concatenate([_bits(values), np.zeros(256, np.uint32)])


def _special(given: Words) -> Words:
    v = _f32(given[:256]).astype(np.float64)
    v = np.where(np.abs(v) < 2.0**-126, 0.0, v)
    with np.errstate(all="ignore"):
        return _bits(np.concatenate([np.exp2(v), np.log2(v), 1 / v]).astype(np.float32))


def _minimum_inputs(rng: np.random.Generator) -> Words:
    values = rng.standard_normal((32, 2)).astype(np.float32)
    values[3, 0] = values[5, 1] = values[7] = np.nan
    values[9], values[11] = (np.inf, -np.inf), (-np.inf, 1)
    return _bits(values).ravel()


def _minimum(given: Words) -> Words:
    smaller = _bits(np.minimum(*_f32(given).reshape(32, 2).T))
    return np.where(np.isnan(_f32(smaller)), np.uint32(0x7FFFFFFF), smaller)


def _swapped_floats(given: Words) -> Words:
    lanes = np.arange(32) ^ 1
    return np.concatenate([given[:128].reshape(32, 4)[lanes].ravel(), given[128:][lanes]])


def _widen(mode: int) -> Callable[[Words], Words]:
    """Half of the bits are small numbers in every format; NaN and infinities are among the rest."""

    @np.errstate(all="ignore")
    def expected(given: Words) -> Words:
        all_of = _f32(given) if mode == 0 else _halves(given, mode == 1)
        wide = np.zeros((32, 8), np.float32)
        wide[:, : all_of.size // 32] = all_of.reshape(32, -1)
        halves = _halves(given[32:64], False)[1::2]
        product = (_f32(given[:32]).astype(np.float64) * halves).astype(np.float32)
        return np.concatenate([_bits(wide).ravel(), _bits(all_of[1:65:2]), _bits(product)])

    return expected


UNITS = (
    Unit("floats", 0, "floats", words(160), _swapped_floats),
    *(Unit("widen", i, name, _float_inputs_128, _widen(i)) for i, name in enumerate(("f32", "bf16", "f16"))),
    *(Unit("ldmatrix", i, f"x{n}", words(128), _ldmatrix(n, False)) for i, n in enumerate((1, 2, 4))),
    *(
        Unit("ldmatrix", 3 + i, f"x{n}_trans", words(128), _ldmatrix(n, True))
        for i, n in enumerate((1, 2, 4))
    ),
    Unit("ldmatrix", 6, "movmatrix", words(128), _movmatrix),
    Unit("mma", 0, "bf16", _mma_inputs(True), _mma(True)),
    Unit("mma", 1, "f16", _mma_inputs(False), _mma(False)),
    *(Unit("cp_async", i, f"{n}_bytes", words(256), _cp_async(n)) for i, n in enumerate((16, 8, 4))),
    Unit("cp_async", 3, "groups", words(256), lambda given: given),
    Unit("cp_async", 4, "wait_all", words(256), lambda given: given),
    Unit("cp_async", 5, "where", words(256), _even_copies),
    Unit("address", 0, "words", words(64), lambda given: np.append(given[:32], given[:32] + given[32:])),
    Unit("minimum", 0, "floats", _minimum_inputs, _minimum),
    *(Unit("memory", i, f"shared_{n}", words(128), _exchange(n)) for i, n in enumerate((2, 4, 8, 16))),
    *(Unit("memory", 4 + i, f"global_{n}", words(128), _exchange(n, n)) for i, n in enumerate((2, 4, 8))),
    Unit("memory", 7, "global_16", words(128), _exchange(16)),
    Unit("memory", 8, "global_once", words(128), _exchange(16)),
    Unit("warp", 0, "floats", lambda rng: _bits(rng.integers(-99, 99, 32).astype(np.float32)), _warp_floats),
    Unit("warp", 1, "words", words(32), _warp_words),
    Unit("barrier", 0, "named", words(128), _barrier),
    Unit("atomic", 0, "integers", words(256), _atomic),
    Unit("convert", 0, "bf16", _float_inputs, _convert(True)),
    Unit("convert", 1, "f16", _float_inputs, _convert(False)),
    Unit("convert", 2, "special", _special_inputs, _special, 2.0**-21),
)
