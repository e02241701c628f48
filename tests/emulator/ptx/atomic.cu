// in: 256 words. out: 16 counts of in % 16 from shared memory and 16 from global (which must hold 0), then
// the extremes (unsigned min and max, signed min and max, or), and words from exchanges and compare-and-swaps
// of one thread.
#include "../../../csrc/cuda/ptx/atomic.cuh"
#include "../../../csrc/cuda/ptx/memory.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(256) atomic(const __grid_constant__ unit_params p) {
    const int thread = threadIdx.x;
    const uint32_t base = sl_shared_addr(SL_SHARED_BASE()), v = p.in[thread];
    const uint32_t start[24] = {0, 0, 0, 0, 0,           0, 0,           0,           0, 0, 0, 0,
                                0, 0, 0, 0, 0xffffffffu, 0, 0x7fffffffu, 0x80000000u, 0, 7, 7, 7};
    if (thread < 24) {
        sl_st_shared_b32(base + thread * 4, start[thread]);
    }
    __syncthreads();
    sl_atom_shared_add(base + v % 16 * 4, 1);
    atomicAdd(p.out + 16 + v % 16, 1u);
    sl_atom_shared_min(base + 64, v);
    sl_atom_shared_max(base + 68, v);
    sl_atom_shared_min(base + 72, (int)v);
    sl_atom_shared_max(base + 76, (int)v);
    sl_atom_shared_or(base + 80, 1u << v % 32);
    if (thread == 0) {
        p.out[40] = sl_atom_shared_exchange(base + 84, 9);
        p.out[41] = sl_atom_shared_cas(base + 88, 7, 11);
        p.out[42] = sl_atom_shared_cas(base + 92, 8, 11);
        p.out[43] = atomicCAS(p.out + 44, 0u, 5u);
    }
    __syncthreads();
    if (thread < 24) {
        p.out[thread < 16 ? thread : 16 + thread] = sl_ld_shared_b32(base + thread * 4);
    }
}

UNIT(atomic, atomic, 256, 96)
