// Sums over a block of THREADS threads, through THREADS / 32 * 32 bytes of its shared memory. Every thread
// calls them and gets the result; there is a barrier before the memory is written and none after it is read.
#pragma once

#include "ptx/memory.cuh"

// Sum (or maximum) of v, which is not negative, over the threads before this one, and over all.
struct sl_scanned {
    int before, all;
};

template <int THREADS, bool MAXIMUM = false> SL_DEV struct sl_scanned sl_block_scan(int v, uint32_t shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    SL_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, v, lanes);
        v = lane < lanes ? v : MAXIMUM ? max(v, other) : v + other;
    }
    const int left = __shfl_up_sync(0xffffffffu, v, 1);
    __syncthreads();
    if (lane == 31) {
        sl_st_shared_b32(shared + warp * 4, (uint32_t)v);
    }
    __syncthreads();
    struct sl_scanned out = {lane ? left : 0, 0};
    for (int w = 0; w < THREADS / 32; w++) {
        const int sum = (int)sl_ld_shared_b32(shared + w * 4), before = w < warp ? sum : 0;
        out.before = MAXIMUM ? max(out.before, before) : out.before + before;
        out.all = MAXIMUM ? max(out.all, sum) : out.all + sum;
    }
    return out;
}

// The largest v of the block.
template <int THREADS> SL_DEV int sl_block_max(int v, uint32_t shared) {
    v = __reduce_max_sync(0xffffffffu, v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) {
        sl_st_shared_b32(shared + (threadIdx.x >> 5) * 4, (uint32_t)v);
    }
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) {
        v = max(v, (int)sl_ld_shared_b32(shared + w * 4));
    }
    return v;
}

// Each of eight numbers summed over the block.
template <int THREADS> SL_DEV void sl_block_sum_8(int v[8], uint32_t shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    SL_UNROLL for (int i = 0; i < 8; i++) {
        v[i] = __reduce_add_sync(0xffffffffu, v[i]);
    }
    __syncthreads();
    SL_UNROLL for (int i = 0; i < 8; i++) {
        if (lane == i) {
            sl_st_shared_b32(shared + (warp * 8 + i) * 4, (uint32_t)v[i]);
        }
    }
    __syncthreads();
    // Lane i of every warp sums number i, then tells the others.
    int sum = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        sum += (int)sl_ld_shared_b32(shared + (w * 8 + (lane & 7)) * 4);
    }
    SL_UNROLL for (int i = 0; i < 8; i++) {
        v[i] = __shfl_sync(0xffffffffu, sum, i);
    }
}
