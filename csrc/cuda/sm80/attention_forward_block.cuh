// A block of the forward: its registers and shared memory, and the copies that are made with care.
#pragma once

#include "../attention_params.cuh"
#include "attention_forward_config.h"
#include "attention_forward_plan.cuh"
#include "copy.cuh"

enum { THREADS = SL_FORWARD_THREADS };

// Of a warp's rows a thread has R = 2 M: g and g + 8 of every 16, as mma's accumulators do.
template <int D> struct forward_shape {
    static constexpr int M = sl_forward_rows(D) / 16, R = 2 * M, KEYS = sl_forward_keys(D);
    static constexpr int QUERIES = sl_forward_queries(D);
};

struct forward_params {
    struct sl_attention_params call;
    int64_t key_pass, value_pass; // sl_copy_pass
};

enum { STEADY_TILE = 16 }; // one in forward_block's `left`

// What a thread takes through the loop; the rest lies in shared memory (attention_forward_plan.cuh).
struct forward_block {
    const char *key, *value;   // where this thread copies from
    uint32_t copy_to;          // and to, in Q's tile
    uint32_t q_at, k_at, v_at; // what this lane gives ldmatrix
    float scale;               // of scores, for exp2; its sign is the scale's
    int k0;                    // the tile's first key
    int left;                  // steady tiles from here on, times STEADY_TILE, and sl_copy_chunks
};

// Shared memory: byte offsets of what follows Q.
template <int D> struct forward_shared {
    static constexpr int KEY = forward_shape<D>::QUERIES * D * 2,
                         VALUE = KEY + forward_shape<D>::KEYS * D * 2;
    static constexpr int PLAN = VALUE + forward_shape<D>::KEYS * D * 2, SEEN = PLAN + 64;
};

SL_DEV uint32_t shared_at(int offset) {
    return sl_shared_addr(SL_SHARED_BASE()) + offset;
}

template <int D>
SL_DEV void block_begin(const struct sl_attention_params *p, const struct forward_plan *plan,
                        struct forward_block *b) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    b->copy_to = sl_copy_to<D>(shared_at(0));
    b->q_at = sl_tile_at<D>(shared_at(0), warp * (forward_shape<D>::M * 16) + (lane & 15), lane >> 4);
    b->k_at =
        sl_tile_at<D>(shared_at(forward_shared<D>::KEY), (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
    b->v_at = sl_tile_at<D>(shared_at(forward_shared<D>::VALUE), lane & 15, lane >> 4);
    b->scale = p->negative ? -p->scale2 : p->scale2;
    b->k0 = plan->range[0].lo;
    sl_keep(b->copy_to);
    sl_keep(b->q_at);
    sl_keep(b->k_at);
    sl_keep(b->v_at);
}

// The tile of keys or values that begins at k0, up to its range's end.
template <int D>
SL_DEV void copy_carefully(const struct sl_attention_params *p, const struct forward_plan *plan,
                           const struct sl_heads *t, uint32_t to, int k0) {
    const char *from = sl_copy_from<D>(t, plan->batch, plan->hk, max(plan->first, 0));
    sl_copy_ragged<D, forward_shape<D>::KEYS, THREADS>(to, from, t->token, plan_index(p, plan), k0,
                                                       plan_end(plan, k0), p->d_head);
}

// The plan, what each row sees, and the copies of Q and of the first keys.
template <int D>
SL_DEV void load_first(const struct sl_attention_params *p, const struct sl_work *work, int h,
                       struct forward_block *b) {
    using S = forward_shape<D>;
    struct forward_plan plan;
    plan_make(p, work, h, S::QUERIES, S::KEYS, &plan);
    block_begin<D>(p, &plan, b);
    const int before = p->sequences.n_key - p->sequences.n_query;
    const char *query = sl_copy_from<D>(&p->query, plan.batch, h, max(plan.first, 0) - before);
    sl_copy_ragged<D, S::QUERIES, THREADS>(b->copy_to, query, p->query.token, work->index, plan.q0,
                                           plan.q_end, p->d_head);
    copy_carefully<D>(p, &plan, &p->key, b->copy_to + forward_shared<D>::KEY, b->k0);
    sl_cp_async_commit();
    if (threadIdx.x == 0) {
        plan_store(shared_at(forward_shared<D>::PLAN), &plan);
    }
    if ((int)threadIdx.x < S::QUERIES) {
        seen_store(shared_at(forward_shared<D>::SEEN) + threadIdx.x * 16, p, h >= p->first_shifted,
                   min(plan.q0 + (int)threadIdx.x, plan.q_end - 1), work->length);
    }
}
