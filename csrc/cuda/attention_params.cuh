// What the kernels of SF-Attn are given, for every architecture.
#pragma once

#include "sequences.cuh"

struct sl_attention_params {
    struct sl_heads query, key, value, output; // value and output NULL: lse alone
    float *lse;                                // [n_batch, n_head, n_query]
    struct sl_sequences sequences;
    struct sl_pattern pattern;
    int64_t n_tile; // at least the number of tiles of all sequences; grid: n_tile * n_head blocks
    int32_t n_head, n_head_kv, d_head, first_shifted;
    float scale2;  // > 0, see sl_cuda_scale2
    bool negative; // scale is: queries are negated
};

// A block's tile and query head: heads that share keys run side by side, late tiles (the long ones under a
// causal mask) first.
SL_DEV int sl_attention_work(const struct sl_attention_params *p, bool of_queries, struct sl_work *work,
                             int *h) {
    const int group = p->n_head / p->n_head_kv;
    const int64_t at = blockIdx.x / group;
    *h = (int)(at / p->n_tile) * group + (int)(blockIdx.x % group);
    return sl_work_find(&p->sequences, p->n_tile - 1 - at % p->n_tile, of_queries, work);
}

SL_DEV int64_t sl_query_row(const struct sl_heads *t, const struct sl_attention_params *p,
                            const struct sl_work *work, int h, int position) {
    const int64_t n = sl_work_column(work, position) - (p->sequences.n_key - p->sequences.n_query);
    return work->batch * t->batch + h * t->head + n * t->token;
}

SL_DEV int64_t sl_key_row(const struct sl_heads *t, const struct sl_work *work, int hk, int position) {
    return work->batch * t->batch + hk * t->head + sl_work_column(work, position) * t->token;
}
