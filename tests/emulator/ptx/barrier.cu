// in: 128 words. out: [what][thread] for 128 threads.
#include "../../../csrc/cuda/ptx/barrier.cuh"
#include "../../../csrc/cuda/ptx/memory.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(128) barrier(const __grid_constant__ unit_params p) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const uint32_t base = sl_shared_addr(SL_SHARED_BASE());
    // Warps 0 and 1 hand words to warps 2 and 3: full on barriers 1 and 2, empty on 3 and 4.
    const int pair = warp & 1;
    uint32_t sum = 0;
    for (int round = 0; round < 3; round++) {
        if (warp < 2) {
            if (round > 0) {
                sl_barrier_sync(3 + pair, 64);
            }
            sl_st_shared_b32(base + (pair * 32 + lane) * 4, p.in[thread] + (uint32_t)round);
            sl_barrier_arrive(1 + pair, 64);
        } else {
            sl_barrier_sync(1 + pair, 64);
            sum = sum * 3 + sl_ld_shared_b32(base + (pair * 32 + 31 - lane) * 4);
            if (round < 2) {
                sl_barrier_arrive(3 + pair, 64);
            }
        }
    }
    p.out[thread] = sum;
    const uint32_t v = p.in[thread];
    p.out[512 + thread] = (uint32_t)sl_barrier_any(v == p.in[50]) + 2 * (uint32_t)sl_barrier_any(false);
    p.out[128 + thread] = (uint32_t)__syncthreads_count((int)(v & 1));
    p.out[256 + thread] =
        (uint32_t)(__syncthreads_or(v == p.in[77]) != 0) + 2 * (uint32_t)(__syncthreads_or(0) != 0);
    p.out[384 + thread] =
        (uint32_t)(__syncthreads_and(1) != 0) + 2 * (uint32_t)(__syncthreads_and((int)(v & 1)) != 0);
}

UNIT(barrier, barrier, 128, 256)
