// Atomics on 32-bit integers in shared memory, by 32-bit address; each returns what was there before. On
// global memory CUDA's own atomicAdd, atomicMin, atomicMax, atomicExch and atomicCAS work on the host too.
// Never on data whose sum depends on the order.
#pragma once
#include "platform.cuh"

#ifdef __CUDACC__
#define SL_ATOM_SHARED(op, reduction, is_signed)                                                             \
    uint32_t old;                                                                                            \
    asm volatile("atom.shared." op " %0, [%1], %2;" : "=r"(old) : "r"(addr), "r"(v) : "memory");             \
    return old
#else
#define SL_ATOM_SHARED(op, reduction, is_signed)                                                             \
    return emu_shared_atomic(addr, (uint32_t)v, 0, reduction, is_signed, SL_HERE)
#endif

SL_DEV uint32_t sl_atom_shared_add(uint32_t addr, uint32_t v SL_SITE) {
    SL_ATOM_SHARED("add.u32", EMU_ADD, false);
}
SL_DEV uint32_t sl_atom_shared_min(uint32_t addr, uint32_t v SL_SITE) {
    SL_ATOM_SHARED("min.u32", EMU_MIN, false);
}
SL_DEV uint32_t sl_atom_shared_max(uint32_t addr, uint32_t v SL_SITE) {
    SL_ATOM_SHARED("max.u32", EMU_MAX, false);
}
SL_DEV uint32_t sl_atom_shared_or(uint32_t addr, uint32_t v SL_SITE) {
    SL_ATOM_SHARED("or.b32", EMU_OR, false);
}
SL_DEV uint32_t sl_atom_shared_exchange(uint32_t addr, uint32_t v SL_SITE) {
    SL_ATOM_SHARED("exch.b32", EMU_EXCHANGE, false);
}
SL_DEV int sl_atom_shared_min(uint32_t addr, int v SL_SITE) {
    SL_ATOM_SHARED("min.s32", EMU_MIN, true);
}
SL_DEV int sl_atom_shared_max(uint32_t addr, int v SL_SITE) {
    SL_ATOM_SHARED("max.s32", EMU_MAX, true);
}
#undef SL_ATOM_SHARED

// Stores v where compare is.
SL_DEV uint32_t sl_atom_shared_cas(uint32_t addr, uint32_t compare, uint32_t v SL_SITE) {
#ifdef __CUDACC__
    uint32_t old;
    asm volatile("atom.shared.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(old)
                 : "r"(addr), "r"(compare), "r"(v)
                 : "memory");
    return old;
#else
    return emu_shared_atomic(addr, v, compare, EMU_CAS, false, SL_HERE);
#endif
}
