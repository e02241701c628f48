// Sums and maxima over the lanes of a warp, or of each aligned group of WIDTH lanes. All 32 lanes take part,
// and all lanes of a group get the same bits. CUDA's own __shfl_*_sync, __ballot_sync, __any_sync,
// __all_sync, __reduce_*_sync and __match_any_sync work on the host too.
#pragma once
#include "platform.cuh"

template <int WIDTH> SL_DEV float sl_warp_sum(float v SL_SITE) {
    SL_UNROLL for (int lanes = WIDTH / 2; lanes > 0; lanes /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, lanes, 32 SL_PASS);
    }
    return v;
}

template <int WIDTH> SL_DEV float sl_warp_max(float v SL_SITE) {
    SL_UNROLL for (int lanes = WIDTH / 2; lanes > 0; lanes /= 2) {
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lanes, 32 SL_PASS));
    }
    return v;
}

// Sum of the integers of the lanes before this one in the warp.
SL_DEV int sl_warp_sum_before(int v SL_SITE) {
    const int lane = threadIdx.x & 31, own = v;
    SL_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, v, lanes, 32 SL_PASS);
        v += lane >= lanes ? other : 0;
    }
    return v - own;
}
