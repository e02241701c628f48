// Which slots of a cache each query of a decode call sees: from the padding mask, or from the cache's counts.
#ifndef SL_CPU_LIVE_H
#define SL_CPU_LIVE_H

#include "../core/h2o.h"

// One batch row. Live slot x is slot first + x, or index[x] where the mask has holes. What is computed
// depends on live slots only, in their order: dead ones are never read.
struct sl_live {
    int64_t n;
    int64_t first;
    const int32_t *index;
    int64_t n_visible[SL_MAX_DECODE_QUERIES]; // query i sees live slots 0 .. n_visible[i]-1; 0: it is padding
    bool counted[SL_MAX_DECODE_QUERIES];      // query i adds to the scores
};

// Batch row b. index holds n_key elements, or is NULL without a padding mask.
void sl_live_fill(struct sl_live *live, const struct sl_h2o_decode_args *args, int64_t b, int32_t *index);

#endif
