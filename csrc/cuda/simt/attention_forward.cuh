// SF-Attn forward in float32, for any device: one block a tile of queries of one head. Products and sums are
// float32; slices of queries and keys pass through the ring for the scores, then rows of the values.
#pragma once

#include "../ptx/convert.cuh"
#include "../ptx/widen.cuh"
#include "copy.cuh"
#include "seen.cuh"

struct forward_block {
    struct sl_work work;
    struct sl_simt_source query, key, value;
    struct sl_feed feed;
    int h, q0, q_end;
    uint32_t weights, table;
    bool with_value;
};

// The next slice; the one after it is on its way.
template <int D, int R> SL_DEV void copy_next(struct forward_block *b, int d_head) {
    if (b->feed.more) {
        if (b->feed.stage == 0) {
            sl_feed_slices<R>(&b->feed, &b->work, &b->query, b->q0, b->q_end, &b->key, d_head);
        } else {
            sl_feed_rows<D, R>(&b->feed, &b->work, &b->value, d_head);
        }
        sl_feed_end(&b->feed, b->with_value ? 2 : 1);
    }
    sl_cp_async_commit();
}

template <int D, int R> SL_DEV uint32_t next_slice(struct forward_block *b, int d_head) {
    const uint32_t at = sl_ring_read(&b->feed.ring);
    copy_next<D, R>(b, d_head);
    return at;
}

// The running softmax of a thread's rows, in base 2; its sums are the thread's own part.
template <int R> struct softmax {
    float max[R], sum[R];
};

// Scores to probabilities; rescale is what earlier sums and outputs are to be multiplied with.
template <int R>
SL_DEV void softmax_step(struct softmax<R> *state, float s[R][SL_SIMT_SCORES], float rescale[R]) {
    SL_UNROLL for (int i = 0; i < R; i++) {
        float m = state->max[i];
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            m = fmaxf(m, s[i][j]);
        }
        m = sl_row_max(m);
        const float base = m == -INFINITY ? 0.0f : m;
        rescale[i] = sl_exp2(state->max[i] - base);
        float sum = 0;
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            s[i][j] = sl_exp2(s[i][j] - base);
            sum += s[i][j];
        }
        state->sum[i] = state->sum[i] * rescale[i] + sum;
        state->max[i] = m;
    }
}

// Scales the scores, and selects away what a row does not see.
template <int R>
SL_DEV void finish_scores(float s[R][SL_SIMT_SCORES], float scale2, uint32_t table, int k0, int k_end,
                          bool masked) {
    SL_UNROLL for (int i = 0; i < R; i++) {
        struct sl_seen seen = {0, 0, 0};
        if (masked) {
            seen = sl_seen_in_tile<R>(table, i, k_end);
        }
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            const int k = k0 + sl_score_column(j);
            s[i][j] = masked && !sl_sees(&seen, k) ? -INFINITY : sl_mul(s[i][j], scale2);
        }
    }
}

SL_DEV bool start_block(struct forward_block *b, const struct sl_attention_params *p) {
    if (!sl_attention_work(p, true, &b->work, &b->h)) {
        return false;
    }
    const int hk = b->h / (p->n_head / p->n_head_kv), past = p->sequences.n_key - p->sequences.n_query;
    const bool shifted = b->h >= p->first_shifted;
    b->q0 = b->work.n_past + b->work.tile * SL_SIMT_ROWS;
    b->q_end = min(b->q0 + SL_SIMT_ROWS, b->work.length);
    b->query = sl_simt_source_of(&p->query, &b->work, b->h, past);
    b->key = sl_simt_source_of(&p->key, &b->work, hk, 0);
    b->value = sl_simt_source_of(&p->value, &b->work, hk, 0);
    b->with_value = p->value.data != NULL;
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

template <int D, int R>
SL_DEV void store_block(const struct forward_block *b, const struct sl_attention_params *p,
                        const struct softmax<R> *state, const float o[R][D / 8]) {
    SL_UNROLL for (int i = 0; i < R; i++) {
        const int q = b->q0 + sl_row_group() * R + i;
        const float sum = sl_row_sum(state->sum[i]);
        if (q >= b->q_end) {
            continue;
        }
        const int64_t n = sl_work_column(&b->work, q) - (p->sequences.n_key - p->sequences.n_query);
        if (sl_lane() == 0) {
            p->lse[(b->work.batch * p->n_head + b->h) * p->sequences.n_query + n] =
                (state->max[i] + log2f(sum)) * 0.69314718056f;
        }
        if (b->with_value) {
            const int64_t to = b->work.batch * p->output.batch + b->h * p->output.head + n * p->output.token;
            sl_store_row<D>((float *)p->output.data + to, o[i], 1.0f / sum, p->d_head);
        }
    }
}

template <int D, int R>
static __global__ void __launch_bounds__(sl_simt_threads<R>, 1)
    attention_forward_f32(const __grid_constant__ struct sl_attention_params p) {
    struct forward_block b;
    if (!start_block(&b, &p)) {
        return; // the whole block
    }
    float o[R][D / 8];
    struct softmax<R> state;
    sl_clear<R>(o);
    SL_UNROLL for (int i = 0; i < R; i++) {
        state.max[i] = -INFINITY;
        state.sum[i] = 0;
    }
    struct sl_simt_walk walk = b.feed.walk;
    bool more = b.feed.more;
    copy_next<D, R>(&b, p.d_head);
    while (more) {
        const int k0 = walk.lo, k_end = sl_simt_walk_hi(&walk);
        float s[R][SL_SIMT_SCORES], rescale[R];
        sl_clear<R>(s);
        for (int d = 0; d < p.d_head; d += SL_SIMT_SLICE) {
            const uint32_t at = next_slice<D, R>(&b, p.d_head);
            sl_add_scores<R>(s, at, at + SL_SIMT_SLOT / 2);
        }
        finish_scores<R>(s, p.negative ? -p.scale2 : p.scale2, b.table, k0, k_end,
                         !sl_seen_by_all(b.table, k0, k_end));
        softmax_step<R>(&state, s, rescale);
        SL_UNROLL for (int i = 0; i < R; i++) {
            SL_UNROLL for (int j = 0; j < D / 8; j++) {
                o[i][j] *= rescale[i];
            }
        }
        if (b.with_value) {
            sl_store_weights<R>(b.weights, s);
            for (int k = 0; k < k_end - k0; k += sl_simt_slot_rows<D>) {
                sl_add_rows<D, R>(o, b.weights, k, next_slice<D, R>(&b, p.d_head));
            }
        }
        more = sl_simt_walk_next(&walk);
    }
    store_block<D, R>(&b, &p, &state, o);
}
