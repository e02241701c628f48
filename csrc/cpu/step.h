// One step of a cache around the attention (use 3 in core/h2o.h): the new token's place before it, eviction
// and counting after it.
#ifndef SL_CPU_STEP_H
#define SL_CPU_STEP_H

#include "../core/h2o.h"
#include "kernels.h"

// The counts of a batch row, clamped to what the buffers hold.
struct sl_step {
    int64_t used; // before the step; less than n_key
    int64_t seen;
    int64_t budget;
    int64_t recent;
    bool kept; // the new token is no padding; else nothing below does anything
};

// Is the call such a step?
bool sl_step_wanted(const struct sl_h2o_decode_args *args);

struct sl_step sl_step_read(const struct sl_h2o_decode_args *args, int64_t b);

// a. The new token takes the free slot of each head of row b.
void sl_step_place(const struct sl_h2o_decode_args *args, int64_t b);

// c. Frees a slot of one head; where none may be evicted (counts that contradict each other) the new token's.
void sl_step_evict(const struct sl_h2o_decode_args *args, const struct sl_cpu_kernels *kernels, int64_t b,
                   int64_t hk);

// d. What the heads of row b share. After every head's eviction.
void sl_step_count(const struct sl_h2o_decode_args *args, int64_t b);

#endif
