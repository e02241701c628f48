// Scores as unsigned numbers of the same order: both zeros are one, NaN is above infinity. No score is 0.
#pragma once

#include "ptx/widen.cuh"

SL_DEV uint32_t sl_ordered(float score) {
    const uint32_t bits = sl_bits_of(score == 0.0f ? 0.0f : score);
    return score != score ? UINT32_MAX : bits >> 31 ? ~bits : bits | 0x80000000u;
}
