// Tiles and the shared-memory plan of a prompt's scores on sm_80: keys stay in registers, queries and their
// lse stream through two stages.
#pragma once

#include "../../core/portable.h"

enum {
    SL_SCORE_KEYS = 256,
    SL_SCORE_WARP_KEYS = 32,
    SL_SCORE_THREADS = SL_SCORE_KEYS / SL_SCORE_WARP_KEYS * 32,
};

// D: the head dimension, rounded up to a size that is instantiated. Blocks that have a multiprocessor to
// themselves wait for all their warps once a tile: tiles as large as 99 KB allow.
SL_HD constexpr int sl_score_queries(int d) {
    return d <= 192 ? 128 : 64;
}

SL_HD constexpr int sl_score_shared(int d) {
    return 2 * sl_score_queries(d) * (d * 2 + 4);
}

// Blocks of a multiprocessor: a warp's keys take d / 2 registers of each thread.
SL_HD constexpr int sl_score_blocks(int d) {
    return d <= 64 ? 2 : 1;
}
