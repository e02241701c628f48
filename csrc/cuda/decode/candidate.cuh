// Which slot a step frees: of the evictable ones that with the smallest score, the newest of equals.
#pragma once

#include "../ordered.cuh"
#include "params.cuh"

SL_DEV struct sl_decode_candidate sl_no_candidate() {
    return sl_decode_candidate{UINT32_MAX, UINT32_MAX, -1, 0};
}

SL_DEV struct sl_decode_candidate sl_candidate(const struct sl_decode_params *p,
                                               const struct sl_decode_live *live, int slot, int position,
                                               float score) {
    const bool evictable = position >= p->n_sink && position <= live->seen - live->recent && position >= 0;
    return evictable ? sl_decode_candidate{sl_ordered(score), (uint32_t)(INT32_MAX - position), slot, 0}
                     : sl_no_candidate();
}

SL_DEV bool sl_goes_before(const struct sl_decode_candidate &a, const struct sl_decode_candidate &b) {
    return a.score != b.score ? a.score < b.score : a.age != b.age ? a.age < b.age : a.slot < b.slot;
}

// The first to go of a warp's.
SL_DEV struct sl_decode_candidate sl_first_candidate(struct sl_decode_candidate a) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        struct sl_decode_candidate b;
        b.score = __shfl_xor_sync(0xffffffffu, a.score, lanes);
        b.age = __shfl_xor_sync(0xffffffffu, a.age, lanes);
        b.slot = __shfl_xor_sync(0xffffffffu, a.slot, lanes);
        b.unused = 0;
        a = sl_goes_before(b, a) ? b : a;
    }
    return a;
}
