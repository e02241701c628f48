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
