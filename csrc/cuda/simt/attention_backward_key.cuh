// dK and dV in float32: one block a tile of keys of a key/value head, over its query heads and the queries
// that see them. A second launch sums the sinks' over windows of queries.
#pragma once

#include "../ptx/convert.cuh"
#include "attention_backward_params.cuh"

struct key_block {
    struct sl_work work;
    struct sl_simt_source query, key, value, grad; // query and grad: of the head in progress
    struct sl_feed feed;
    int hk, k0, k_end;
    int first, end;                // queries that count
    uint32_t weights, lse2, delta; // in shared memory
    uint32_t tables, ranges;       // of heads that are not shifted, and of those that are
    uint32_t rare;                 // batch, hk, slot: read where they are needed, the sums fill the registers
    uint32_t table;                // of the head in progress
    int slot;                      // of partial, where the sums of a window go; else -1
};

// Stages of a tile of queries: K Q^T, rows of dO, V dO^T, rows of Q.
template <int D, int R> SL_DEV void copy_next(struct key_block *b, int d_head) {
    if (b->feed.more) {
        const bool first = b->feed.stage < 2;
        if (b->feed.stage % 2) {
            const struct sl_simt_source columns = first ? b->grad : b->query;
            sl_feed_rows<D, R>(&b->feed, &b->work, &columns, d_head);
        } else {
            const struct sl_simt_source rows = first ? b->key : b->value,
                                        columns = first ? b->query : b->grad;
            sl_feed_slices<R>(&b->feed, &b->work, &rows, b->k0, b->k_end, &columns, d_head);
        }
        sl_feed_end(&b->feed, 4);
    }
    sl_cp_async_commit();
}

template <int D, int R> SL_DEV uint32_t next_slice(struct key_block *b, int d_head) {
    const uint32_t at = sl_ring_read(&b->feed.ring);
    copy_next<D, R>(b, d_head);
    return at;
}

template <int D, int R> SL_DEV void scores(struct key_block *b, float s[R][SL_SIMT_SCORES], int d_head) {
    sl_clear<R>(s);
    for (int d = 0; d < d_head; d += SL_SIMT_SLICE) {
        const uint32_t at = next_slice<D, R>(b, d_head);
        sl_add_scores<R>(s, at, at + SL_SIMT_SLOT / 2);
    }
}

// The block's keys, the queries that count for them, and where the sums of a window go: slot of partial, or
// -1.
SL_DEV bool find_keys(struct key_block *b, const struct sl_simt_backward_params *p, struct sl_range *queries,
                      int *slot) {
    const int64_t at = blockIdx.x / p->n_head_kv;
    *slot = -1;
    if (!p->sinks) {
        if (!sl_work_find(&p->sequences, at, false, &b->work)) {
            return false;
        }
        const int first = b->work.tile * SL_SIMT_ROWS;
        b->k0 = sl_simt_split(p, &b->work) ? max(first, p->n_sink) : first;
        b->k_end = min(first + SL_SIMT_ROWS, b->work.length);
        *queries = sl_range{0, b->work.length};
        return b->k0 < b->k_end;
    }
    // The block of a window's first query tile sums it.
    if (!sl_work_find(&p->sequences, at / p->n_sink_tile, true, &b->work) || !sl_simt_split(p, &b->work) ||
        b->work.tile % p->window_tiles != 0) {
        return false;
    }
    b->k0 = (int)(at % p->n_sink_tile) * SL_SIMT_ROWS;
    b->k_end = min(b->k0 + SL_SIMT_ROWS, p->n_sink);
    const int first = b->work.tile * SL_SIMT_COLUMNS;
    *queries = sl_range{first, min(first + p->window_tiles * SL_SIMT_COLUMNS, b->work.length)};
    *slot = sl_simt_slot(p, &b->work, b->work.tile / p->window_tiles);
    return b->k0 < b->k_end;
}

SL_DEV bool start_block(struct key_block *b, const struct sl_simt_backward_params *p) {
    struct sl_range queries;
    const int hk = (int)(blockIdx.x % p->n_head_kv);
    int slot;
    if (!find_keys(b, p, &queries, &slot)) {
        return false;
    }
    b->key = sl_simt_source_of(&p->key, &b->work, hk, 0);
    b->value = sl_simt_source_of(&p->value, &b->work, hk, 0);
    b->feed.ring = sl_ring_start();
    b->weights = b->feed.ring.base + 2 * SL_SIMT_SLOT;
    b->tables = b->weights + SL_SIMT_WEIGHTS;
    b->lse2 = b->tables + 2 * SL_SIMT_SEEN;
    b->delta = b->lse2 + SL_SIMT_COLUMNS * 4;
    b->ranges = b->delta + SL_SIMT_COLUMNS * 4;
    b->rare = b->ranges + 2 * 16;
    if (threadIdx.x == 0) {
        sl_st_shared_b32(b->rare, (uint32_t)b->work.batch);
        sl_st_shared_b32(b->rare + 4, (uint32_t)hk);
        sl_st_shared_b32(b->rare + 8, (uint32_t)slot);
    }
    if (threadIdx.x < 2 * SL_SIMT_ROWS) {
        const int shifted = threadIdx.x / SL_SIMT_ROWS, row = threadIdx.x % SL_SIMT_ROWS;
        const int k = min(b->k0 + row, b->k_end - 1), n = b->work.length;
        sl_seen_store(b->tables + shifted * SL_SIMT_SEEN, row, sl_queries_seeing(&p->pattern, shifted, k, n));
        struct sl_range ranges[2];
        const int n_range =
            sl_pattern_query_ranges(&p->pattern, shifted, sl_range{b->k0, b->k_end}, n, ranges);
        struct sl_simt_walk walk;
        sl_simt_walk_start(&walk, n_range, ranges, (int)queries.lo, (int)queries.hi);
        if (row == 0) {
            const uint32_t at = b->ranges + shifted * 16;
            sl_st_shared_b32(at, (uint32_t)walk.lo);
            sl_st_shared_b32(at + 4, (uint32_t)walk.end);
            sl_st_shared_b32(at + 8, (uint32_t)walk.next_lo);
            sl_st_shared_b32(at + 12, (uint32_t)walk.next_end);
        }
    }
    __syncthreads();
    if (threadIdx.x < 2 * 32) {
        sl_seen_close(b->tables + threadIdx.x / 32 * SL_SIMT_SEEN);
    }
    return true;
}

// The ring goes on: its next slot is not the one that other threads may still read.
SL_DEV void start_head(struct key_block *b, const struct sl_simt_backward_params *p, int h) {
    const bool shifted = h >= p->first_shifted;
    b->work.batch = (int)sl_ld_shared_b32(b->rare);
    b->query = sl_simt_source_of(&p->query, &b->work, h, 0);
    b->grad = sl_simt_source_of(&p->grad_output, &b->work, h, 0);
    b->table = b->tables + shifted * SL_SIMT_SEEN;
    const uint4 walk = sl_ld_shared_v4(b->ranges + shifted * 16);
    b->feed.walk = sl_simt_walk{(int)walk.x, (int)walk.y, (int)walk.z, (int)walk.w};
    b->feed.more = b->feed.walk.lo < b->feed.walk.end;
    b->feed.stage = b->feed.step = 0;
}

// lse * log2(e) and delta of the tile's queries, to be read after the next slice's barrier.
SL_DEV void load_columns(const struct key_block *b, const struct sl_simt_backward_params *p, int h, int q0,
                         int q_end) {
    if (threadIdx.x < 2 * SL_SIMT_COLUMNS) {
        const bool of_lse = threadIdx.x < SL_SIMT_COLUMNS;
        const int column = threadIdx.x % SL_SIMT_COLUMNS, q = q0 + column;
        float x = 0;
        if (q < q_end) {
            const int64_t batch = (int)sl_ld_shared_b32(b->rare);
            const int64_t row = (batch * p->n_head + h) * p->n_token + sl_work_column(&b->work, q);
            x = of_lse ? p->lse[row] * 1.44269504088896341f : p->delta[row];
        }
        sl_st_shared_float((of_lse ? b->lse2 : b->delta) + column * 4, x);
    }
}

// A thread's columns of lse2 or delta.
SL_DEV void of_columns(uint32_t at, float x[SL_SIMT_SCORES]) {
    SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j += 4) {
        sl_ld_shared_floats(x + j, at + sl_score_column(j) * 4);
    }
}

// What a row does not see, or s: P or dS.
template <int R>
SL_DEV void select_seen(const struct key_block *b, float s[R][SL_SIMT_SCORES], int q0, int q_end) {
    if (sl_seen_by_all(b->table, q0, q_end)) {
        return;
    }
    SL_UNROLL for (int i = 0; i < R; i++) {
        const struct sl_seen seen = sl_seen_in_tile<R>(b->table, i, q_end);
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            s[i][j] = sl_sees(&seen, q0 + sl_score_column(j)) ? s[i][j] : 0.0f;
        }
    }
}

template <int D, int R>
SL_DEV void add_tile(struct key_block *b, const struct sl_simt_backward_params *p, int h, int q0, int q_end,
                     float dk[R][D / 8], float dv[R][D / 8]) {
    float s[R][SL_SIMT_SCORES], x[SL_SIMT_SCORES];
    load_columns(b, p, h, q0, q_end);
    scores<D, R>(b, s, p->d_head);
    of_columns(b->lse2, x);
    SL_UNROLL for (int i = 0; i < R; i++) {
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            s[i][j] = sl_exp2(s[i][j] * p->scale2 - x[j]);
        }
    }
    select_seen<R>(b, s, q0, q_end);
    sl_store_weights<R>(b->weights, s);
    for (int q = 0; q < q_end - q0; q += sl_simt_slot_rows<D>) {
        sl_add_rows<D, R>(dv, b->weights, q, next_slice<D, R>(b, p->d_head));
    }
    scores<D, R>(b, s, p->d_head);
    of_columns(b->delta, x);
    SL_UNROLL for (int i = 0; i < R; i++) {
        float w[SL_SIMT_SCORES];
        sl_load_weights<R>(b->weights, i, w);
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            s[i][j] = w[j] * (s[i][j] - x[j]);
        }
    }
    select_seen<R>(b, s, q0, q_end);
    sl_store_weights<R>(b->weights, s);
    for (int q = 0; q < q_end - q0; q += sl_simt_slot_rows<D>) {
        sl_add_rows<D, R>(dk, b->weights, q, next_slice<D, R>(b, p->d_head));
    }
}

template <int D, int R>
SL_DEV void store_block(struct key_block *b, const struct sl_simt_backward_params *p,
                        const float dk[R][D / 8], const float dv[R][D / 8]) {
    b->work.batch = (int)sl_ld_shared_b32(b->rare);
    const int hk = (int)sl_ld_shared_b32(b->rare + 4), slot = (int)sl_ld_shared_b32(b->rare + 8);
    SL_UNROLL for (int i = 0; i < R; i++) {
        const int k = b->k0 + sl_row_group() * R + i;
        if (k >= b->k_end) {
            continue;
        }
        if (slot >= 0) {
            float *to = p->partial + sl_simt_partial(p, slot, hk, k);
            sl_store_row<D>(to, dk[i], 1.0f, p->d_head);
            sl_store_row<D>(to + p->d_head, dv[i], 1.0f, p->d_head);
            continue;
        }
        const int64_t to_k = sl_key_row(&p->grad_key, &b->work, hk, k);
        const int64_t to_v = sl_key_row(&p->grad_value, &b->work, hk, k);
        sl_store_row<D>((float *)p->grad_key.data + to_k, dk[i], p->scale, p->d_head);
        sl_store_row<D>((float *)p->grad_value.data + to_v, dv[i], 1.0f, p->d_head);
    }
}

template <int D, int R>
static __global__ void __launch_bounds__(sl_simt_threads<R>, 1)
    attention_backward_key_f32(const __grid_constant__ struct sl_simt_backward_params p) {
    struct key_block b;
    if (!start_block(&b, &p)) {
        return; // the whole block
    }
    float dk[R][D / 8], dv[R][D / 8];
    sl_clear<R>(dk);
    sl_clear<R>(dv);
    const int group = p.n_head / p.n_head_kv;
    const int h0 = (int)(blockIdx.x % p.n_head_kv) * group;
    for (int h = h0; h < h0 + group; h++) {
        start_head(&b, &p, h);
        struct sl_simt_walk walk = b.feed.walk;
        bool more = b.feed.more;
        copy_next<D, R>(&b, p.d_head);
        while (more) {
            add_tile<D, R>(&b, &p, h, walk.lo, sl_simt_walk_hi(&walk), dk, dv);
            more = sl_simt_walk_next(&walk);
        }
    }
    store_block<D, R>(&b, &p, dk, dv);
}
