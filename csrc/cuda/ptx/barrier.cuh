// Named barriers 1-15 (0 is __syncthreads) of `count` threads. sync arrives and waits; arrive only arrives.
// Whole warps.
#pragma once
#include "platform.cuh"

SL_DEV void sl_barrier_sync(int id, int count SL_SITE) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#else
    emu_barrier(id, count, true, SL_HERE);
#endif
}
SL_DEV void sl_barrier_arrive(int id, int count SL_SITE) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
#else
    emu_barrier(id, count, false, SL_HERE);
#endif
}

// __syncthreads for every thread of the block; does any of them say yes?
SL_DEV bool sl_barrier_any(bool yes SL_SITE) {
#ifdef __CUDACC__
    return __syncthreads_or(yes);
#else
    return emu_barrier_reduce(yes, EMU_OR, SL_HERE) != 0;
#endif
}
