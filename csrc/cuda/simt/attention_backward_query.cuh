// dQ in float32: one block a tile of queries of one head, over the keys that they see. It also computes the
// rows' delta, for the kernel of dK and dV.
#pragma once

#include "../ptx/convert.cuh"
#include "attention_backward_params.cuh"

struct query_block {
    struct sl_work work;
    struct sl_simt_source query, key, value, grad;
    struct sl_feed feed;
    int h, q0, q_end;
    uint32_t weights, table;
};

// Stages of a tile of keys: Q K^T, dO V^T, rows of K.
template <int D, int R> SL_DEV void copy_next(struct query_block *b, int d_head) {
    if (b->feed.more) {
        if (b->feed.stage == 2) {
            sl_feed_rows<D, R>(&b->feed, &b->work, &b->key, d_head);
        } else {
            const bool first = b->feed.stage == 0;
            const struct sl_simt_source rows = first ? b->query : b->grad,
                                        columns = first ? b->key : b->value;
            sl_feed_slices<R>(&b->feed, &b->work, &rows, b->q0, b->q_end, &columns, d_head);
        }
        sl_feed_end(&b->feed, 3);
    }
    sl_cp_async_commit();
}

template <int D, int R> SL_DEV uint32_t next_slice(struct query_block *b, int d_head) {
    const uint32_t at = sl_ring_read(&b->feed.ring);
    copy_next<D, R>(b, d_head);
    return at;
}

template <int D, int R> SL_DEV void scores(struct query_block *b, float s[R][SL_SIMT_SCORES], int d_head) {
    sl_clear<R>(s);
    for (int d = 0; d < d_head; d += SL_SIMT_SLICE) {
        const uint32_t at = next_slice<D, R>(b, d_head);
        sl_add_scores<R>(s, at, at + SL_SIMT_SLOT / 2);
    }
}

SL_DEV bool start_block(struct query_block *b, const struct sl_simt_backward_params *p) {
    const int group = p->n_head / p->n_head_kv;
    const int64_t at = blockIdx.x / group;
    b->h = (int)(at / p->n_query_tile) * group + (int)(blockIdx.x % group);
    if (!sl_work_find(&p->sequences, p->n_query_tile - 1 - at % p->n_query_tile, true, &b->work)) {
        return false;
    }
    const int hk = b->h / group;
    const bool shifted = b->h >= p->first_shifted;
    b->q0 = b->work.tile * SL_SIMT_ROWS;
    b->q_end = min(b->q0 + SL_SIMT_ROWS, b->work.length);
    b->query = sl_simt_source_of(&p->query, &b->work, b->h, 0);
    b->key = sl_simt_source_of(&p->key, &b->work, hk, 0);
    b->value = sl_simt_source_of(&p->value, &b->work, hk, 0);
    b->grad = sl_simt_source_of(&p->grad_output, &b->work, b->h, 0);
    struct sl_range ranges[2];
    const int n_range =
        sl_pattern_key_ranges(&p->pattern, shifted, sl_range{b->q0, b->q_end}, b->work.length, ranges);
    sl_feed_start(&b->feed, n_range, ranges, 0, b->work.length);
    b->weights = b->feed.ring.base + 2 * SL_SIMT_SLOT;
    b->table = b->weights + SL_SIMT_WEIGHTS;
    if (threadIdx.x < SL_SIMT_ROWS) {
        const int q = min(b->q0 + (int)threadIdx.x, b->q_end - 1);
        sl_seen_store(b->table, threadIdx.x, sl_keys_seen(&p->pattern, shifted, q, b->work.length));
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        sl_seen_close(b->table); // read after the first slice's barrier
    }
    return true;
}

// delta and lse * log2(e) of the thread's rows.
template <int R>
SL_DEV void load_rows(const struct query_block *b, const struct sl_simt_backward_params *p, float delta[R],
                      float lse2[R]) {
    const struct sl_simt_source output = sl_simt_source_of(&p->output, &b->work, b->h, 0);
    SL_UNROLL for (int i = 0; i < R; i++) {
        const int q = b->q0 + sl_row_group() * R + i;
        const int64_t n = sl_work_column(&b->work, min(q, b->q_end - 1));
        const int64_t row = (b->work.batch * p->n_head + b->h) * p->n_token + n;
        const float *o = output.data + n * output.token, *g = b->grad.data + n * b->grad.token;
        float sum = 0;
        for (int d = sl_lane() * 4; d < p->d_head; d += SL_SIMT_LANES * 4) {
            float x[4], y[4];
            sl_ld_global_floats(x, o + d);
            sl_ld_global_floats(y, g + d);
            sum += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
        }
        delta[i] = sl_row_sum(sum);
        lse2[i] = p->lse[row] * 1.44269504088896341f;
        if (sl_lane() == 0 && q < b->q_end) {
            p->delta[row] = delta[i];
        }
    }
}

template <int D, int R>
static __global__ void __launch_bounds__(sl_simt_threads<R>, 1)
    attention_backward_query_f32(const __grid_constant__ struct sl_simt_backward_params p) {
    struct query_block b;
    if (!start_block(&b, &p)) {
        return; // the whole block
    }
    float dq[R][D / 8], delta[R], lse2[R];
    sl_clear<R>(dq);
    struct sl_simt_walk walk = b.feed.walk;
    bool more = b.feed.more;
    copy_next<D, R>(&b, p.d_head);
    load_rows<R>(&b, &p, delta, lse2);
    while (more) {
        const int k0 = walk.lo, k_end = sl_simt_walk_hi(&walk);
        float s[R][SL_SIMT_SCORES];
        scores<D, R>(&b, s, p.d_head);
        SL_UNROLL for (int i = 0; i < R; i++) {
            SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
                s[i][j] = sl_exp2(s[i][j] * p.scale2 - lse2[i]);
            }
        }
        sl_store_weights<R>(b.weights, s);
        scores<D, R>(&b, s, p.d_head);
        const bool masked = !sl_seen_by_all(b.table, k0, k_end);
        SL_UNROLL for (int i = 0; i < R; i++) {
            const struct sl_seen seen = masked ? sl_seen_in_tile<R>(b.table, i, k_end) : sl_seen{0, 0, 0};
            float w[SL_SIMT_SCORES]; // P, selected with dS below
            sl_load_weights<R>(b.weights, i, w);
            SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
                s[i][j] =
                    masked && !sl_sees(&seen, k0 + sl_score_column(j)) ? 0.0f : w[j] * (s[i][j] - delta[i]);
            }
        }
        sl_store_weights<R>(b.weights, s);
        for (int k = 0; k < k_end - k0; k += sl_simt_slot_rows<D>) {
            sl_add_rows<D, R>(dq, b.weights, k, next_slice<D, R>(&b, p.d_head));
        }
        more = sl_simt_walk_next(&walk);
    }
    SL_UNROLL for (int i = 0; i < R; i++) {
        const int q = b.q0 + sl_row_group() * R + i;
        if (q < b.q_end) {
            const int64_t to = b.work.batch * p.grad_query.batch + b.h * p.grad_query.head +
                               sl_work_column(&b.work, q) * p.grad_query.token;
            sl_store_row<D>((float *)p.grad_query.data + to, dq[i], p.scale, p.d_head);
        }
    }
}
