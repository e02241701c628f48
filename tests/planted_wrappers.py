"""One error for each wrapper in csrc/cuda/ptx, planted in the unit kernel that calls it."""

from __future__ import annotations

# wrapper: (unit kernel, regular expression, what it becomes)
ERRORS: dict[str, tuple[str, str, str]] = {
    # Another lane map, another number format, other operands.
    "sl_ldmatrix_x1": ("ldmatrix", r"sl_ldmatrix_x1\(", "sl_ldmatrix_x1_trans("),
    "sl_ldmatrix_x2": ("ldmatrix", r"sl_ldmatrix_x2\(r, row", "sl_ldmatrix_x2(r, row ^ 16"),
    "sl_ldmatrix_x4": ("ldmatrix", r"sl_ldmatrix_x4\(r, row", "sl_ldmatrix_x4(r, row + 8"),
    "sl_ldmatrix_x1_trans": (
        "ldmatrix",
        r"sl_ldmatrix_x1_trans\(r, row",
        "sl_ldmatrix_x1_trans(r, row + 512",
    ),
    "sl_ldmatrix_x2_trans": ("ldmatrix", r"(?=sl_ldmatrix_x2_trans\()", "if (lane < 16) "),
    "sl_ldmatrix_x4_trans": ("ldmatrix", r"sl_ldmatrix_x4_trans\(", "sl_ldmatrix_x4("),
    "sl_movmatrix_trans": ("ldmatrix", r"sl_movmatrix_trans\(", "("),
    "sl_mma_16816": ("mma", r"sl_mma_16816<SL_BF16>", "sl_mma_16816<SL_F16>"),
    "sl_pack": ("convert", r"sl_pack<DTYPE>\((.*?), (.*?)\);", r"sl_pack<DTYPE>(\2, \1);"),
    "sl_pack_one": ("convert", r"sl_pack_one<DTYPE>\(in\[2 \* i", r"sl_pack_one<DTYPE>(in[2 * i + 1"),
    "sl_unpack": ("convert", r"(sl_unpack<DTYPE>)\(word\)", r"\1(word ^ 0x8000)"),
    "sl_unpack_one": (
        "convert",
        r"sl_unpack_one<DTYPE>\(\(uint16_t\)word",
        "sl_unpack_one<DTYPE>((uint16_t)(word >> 16)",
    ),
    "sl_exp2": ("convert", r"sl_exp2\(v\)", "exp2f(v * 1.0001f)"),
    "sl_log2": ("convert", r"sl_log2\(v\)", "logf(v)"),
    "sl_rcp": ("convert", r"sl_rcp\(v\)", "sl_rcp(-v)"),
    "sl_widen": (
        "widen",
        r"sl_widen<DTYPE>\(\(\(const uint4 \*\)p.in\)\[lane\]",
        "sl_widen<DTYPE>(((const uint4 *)p.in)[lane ^ 1]",
    ),
    "sl_element": ("widen", r"lane \* 2 \+ 1", "lane * 2"),
    "sl_float_of": ("widen", r"sl_float_of\(p", "(float)(p"),
    "sl_bits_of": ("widen", r"sl_bits_of\(wide\[i\]\)", "(uint32_t)(int)wide[i]"),
    "sl_float_of_f16": ("widen", r"sl_float_of_f16\((.*?) >> 16\)", r"sl_float_of_f16(\1)"),
    "sl_mul": ("widen", r"sl_mul\(sl_float_of\((.*?)\),", r"sl_mul(-sl_float_of(\1),"),
    "sl_min_nan": ("minimum", r"sl_min_nan\(", "fminf("),
    "sl_address": ("address", r"lane - 16, 4\)", "lane - 16, 8)"),
    "sl_address_step": ("address", r"4\), 64\)", "4), 0)"),
    # Copies that are misaligned, unguarded, not committed or not waited for.
    "sl_cp_async_16": (
        "cp_async",
        r"sl_cp_async_16\(base \+ lane \* 16",
        "sl_cp_async_16(base + lane * 16 + 8",
    ),
    "sl_cp_async_8": ("cp_async", r"p.in \+ lane \* 2, quarters \* 2", "p.in + lane * 2 + 1, quarters * 2"),
    "sl_cp_async_4": ("cp_async", r"p.in \+ lane, quarters", "p.in + lane + 300, 4"),
    "sl_cp_async_16_if": ("cp_async", r"lane % 2 == 0", "lane % 2 == 1"),
    "sl_cp_async_commit": ("cp_async", r"sl_cp_async_commit\(\)", "(void)0"),
    "sl_cp_async_wait": ("cp_async", r"sl_cp_async_wait<1>", "sl_cp_async_wait<2>"),
    "sl_cp_async_wait_all": ("cp_async", r"sl_cp_async_wait_all\(\)", "sl_cp_async_wait<0>()"),
    # Accesses outside of their memory, misaligned, or into what is read-only.
    "sl_shared_addr": ("memory", r"sl_shared_addr\(SL_SHARED_BASE\(\)\)", "sl_shared_addr(p.in)"),
    "sl_st_shared_b16": ("memory", r"base \+ lane \* 2,", "base + lane * 2 + 1,"),
    "sl_ld_shared_b16": ("memory", r"base \+ other \* 2", "base + other * 2 + 512"),
    "sl_st_shared_b32": ("memory", r"st_shared_b32\(base \+ lane", "st_shared_b32(base + lane / 2"),
    "sl_ld_shared_b32": ("memory", r"ld_shared_b32\(base", "ld_shared_b32(base - 4"),
    "sl_st_shared_v2": ("memory", r"base \+ lane \* 8", "base + lane * 4"),
    "sl_ld_shared_v2": ("memory", r"ld_shared_v2\(base \+ other", "ld_shared_v2(base + lane"),
    "sl_st_shared_v4": ("memory", r"st_shared_v4\(base", "st_shared_v4(base + 16"),
    "sl_ld_shared_v4": ("memory", r"ld_shared_v4\(base", "ld_shared_v4(base + 8"),
    "sl_ld_global": ("memory", r"sl_ld_global\(\(const T \*\)p.in", "sl_ld_global((const T *)p.in + 4096"),
    "sl_st_global": ("memory", r"sl_st_global\(\(T \*\)p.out", "sl_st_global((T *)p.in"),
    "sl_ld_global_once": ("memory", r"p.in \+ \(lane \^ 1\)\)\);\s*\} else", "p.in + lane)); } else"),
    "sl_st_global_once": (
        "memory",
        r"st_global_once\(\(uint4 \*\)p.out",
        "st_global_once((uint4 *)(p.out + 1)",
    ),
    "sl_st_global_v4": ("memory", r"v4\(\(uint4 \*\)p.out \+ lane", "v4((uint4 *)p.out + lane / 2"),
    "sl_st_shared_floats": ("floats", r"st_shared_floats\(base", "st_shared_floats(base + 4"),
    "sl_ld_shared_floats": ("floats", r"base \+ other \* 16", "base + other * 16 + 640"),
    "sl_st_shared_float": ("floats", r"st_shared_float\(base \+ 512", "st_shared_float(base + 496"),
    "sl_ld_shared_float": ("floats", r"base \+ 512 \+ other", "base + 512 + lane"),
    "sl_ld_global_floats": ("floats", r"in \+ lane \* 4", "in + lane * 4 + 160"),
    "sl_st_global_floats": ("floats", r"\(float \*\)p.out \+ lane \* 4", "(float *)p.out + lane * 4 + 2"),
    # Lanes that are not all there, threads that race or wait for ever.
    "sl_warp_sum": ("warp", r"sl_warp_sum<32>", "sl_warp_sum<16>"),
    "sl_warp_max": ("warp", r"sl_warp_max<8>\(v\)", "(lane & 1 ? v : sl_warp_max<8>(v))"),
    "sl_barrier_sync": ("barrier", r"sl_barrier_sync\(1 \+ pair, 64\)", "__syncwarp()"),
    "sl_barrier_arrive": ("barrier", r"sl_barrier_arrive\(1 \+ pair, 64\)", "__syncwarp()"),
    "sl_barrier_any": ("barrier", r"sl_barrier_any\(v", "(v"),
    "sl_atom_shared_add": ("atomic", r"sl_atom_shared_add\(", "sl_st_shared_b32("),
    "sl_atom_shared_min": (
        "atomic",
        r"sl_atom_shared_min\(base \+ 72, \(int\)v",
        "sl_atom_shared_min(base + 72, v",
    ),
    "sl_atom_shared_max": ("atomic", r"sl_atom_shared_max\(base \+ 68", "sl_atom_shared_max(base + 67"),
    "sl_atom_shared_or": ("atomic", r"sl_atom_shared_or\(", "sl_atom_shared_add("),
    "sl_atom_shared_exchange": (
        "atomic",
        r"sl_atom_shared_exchange\(base \+ 84",
        "sl_atom_shared_exchange(base + 96",
    ),
    "sl_atom_shared_cas": ("atomic", r"base \+ 88, 7, 11", "base + 88, 11, 7"),
}

# Without any effect on the host: they hold back the device's compiler.
EXEMPT = {"sl_keep"}
