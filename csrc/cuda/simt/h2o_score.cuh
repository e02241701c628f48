// Scores of a prompt in float32: one block a tile of keys of a key/value head, over the chunks of queries and
// their query heads. Sums as h2o_score_params.cuh says.
#pragma once

#include "../h2o_score_params.cuh"
#include "../ptx/convert.cuh"
#include "../ptx/minimum.cuh"
#include "copy.cuh"

// A tile of queries of a head: heads of a chunk, chunk after chunk.
struct score_tile {
    int chunk, h, q0, hi;
};

struct score_block {
    struct sl_score_item item;
    struct sl_simt_source key, query; // query: of head 0
    struct sl_ring ring;
    struct score_tile copied; // of which slice `slice` is copied next
    int slice;
    uint32_t negated_lse2; // of the columns of two tiles in turn
};

SL_DEV bool tile_exists(const struct score_block *b, const struct score_tile *t) {
    return t->chunk < b->item.c_end;
}

SL_DEV void start_chunk(const struct score_block *b, int group, struct score_tile *t, int chunk) {
    const struct sl_range queries = sl_score_chunk(&b->item, chunk);
    *t = score_tile{chunk, b->item.hk * group, (int)queries.lo, (int)queries.hi};
}

SL_DEV void next_tile(const struct score_block *b, int group, struct score_tile *t) {
    t->q0 += SL_SIMT_COLUMNS;
    if (t->q0 < t->hi) {
        return;
    }
    const int h = t->h + 1, chunk = t->chunk;
    start_chunk(b, group, t, h < (b->item.hk + 1) * group ? chunk : chunk + 1);
    t->h = t->chunk == chunk ? h : t->h;
}

template <int R> SL_DEV void copy_next(struct score_block *b, const struct sl_score_params *p) {
    if (tile_exists(b, &b->copied)) {
        const struct score_tile *t = &b->copied;
        const uint32_t to = sl_ring_copy(&b->ring);
        struct sl_simt_source query = b->query;
        query.data += t->h * p->query.head;
        sl_copy_slice<SL_SIMT_ROWS, sl_simt_threads<R>, R>(to, &b->key, &b->item.work, b->item.k0,
                                                           b->item.k_end, b->slice, p->d_head);
        sl_copy_slice<SL_SIMT_COLUMNS, sl_simt_threads<R>, 4>(to + SL_SIMT_SLOT / 2, &query, &b->item.work,
                                                              t->q0, t->hi, b->slice, p->d_head);
        b->slice++;
        if (b->slice * SL_SIMT_SLICE >= p->d_head) {
            b->slice = 0;
            next_tile(b, p->n_head / p->n_head_kv, &b->copied);
        }
    }
    sl_cp_async_commit();
}

// To be read after the next slice's barrier.
SL_DEV void load_columns(const struct score_block *b, const struct sl_score_params *p,
                         const struct score_tile *t, uint32_t to) {
    if (threadIdx.x < SL_SIMT_COLUMNS) {
        const int q = t->q0 + (int)threadIdx.x;
        float x = -INFINITY;
        if (q < t->hi) {
            const int64_t n = sl_work_column(&b->item.work, q) - b->query.past;
            x = sl_score_negated_lse2(
                p->lse[(b->item.work.batch * p->n_head + t->h) * p->sequences.n_query + n]);
        }
        sl_st_shared_float(to + threadIdx.x * 4, x);
    }
}

// Adds the probabilities of the thread's part of a tile to the sums of its rows.
template <int R>
SL_DEV void add_tile(const struct score_block *b, const struct sl_score_params *p, const struct score_tile *t,
                     uint32_t columns, const float s[R][SL_SIMT_SCORES], float sum[R]) {
    const float scale2 = p->negative ? -p->scale2 : p->scale2;
    const struct sl_pattern pattern = sl_score_pattern(p);
    float negated_lse2[SL_SIMT_SCORES];
    SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j += 4) {
        sl_ld_shared_floats(negated_lse2 + j, columns + sl_score_column(j) * 4);
    }
    SL_UNROLL for (int i = 0; i < R; i++) {
        const int k = b->item.k0 + sl_row_group() * R + i;
        const int first = (int)sl_pattern_first_query(&pattern, false, k);
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            const float x = s[i][j] * scale2 + negated_lse2[j];
            sum[i] += t->q0 + sl_score_column(j) >= first ? sl_exp2(sl_min_nan(x, 0)) : 0.0f;
        }
    }
}

template <int R>
static __global__ void __launch_bounds__(sl_simt_threads<R>, 1)
    h2o_score_f32(const __grid_constant__ struct sl_score_params p) {
    struct score_block b;
    if (!sl_score_item_find(&p, &b.item)) {
        return; // the whole block
    }
    const int group = p.n_head / p.n_head_kv;
    b.key = sl_simt_source_of(&p.key, &b.item.work, b.item.hk, 0);
    b.query = sl_simt_source_of(&p.query, &b.item.work, 0, p.sequences.n_key - p.sequences.n_query);
    b.ring = sl_ring_start();
    b.negated_lse2 = b.ring.base + 2 * SL_SIMT_SLOT;
    b.slice = 0;
    start_chunk(&b, group, &b.copied, b.item.c0);

    struct score_tile t = b.copied;
    double total[R];
    float sum[R];
    SL_UNROLL for (int i = 0; i < R; i++) {
        total[i] = 0;
        sum[i] = 0;
    }
    copy_next<R>(&b, &p);
    for (int parity = 0; tile_exists(&b, &t); parity ^= 1) {
        const uint32_t columns = b.negated_lse2 + parity * (SL_SIMT_COLUMNS * 4);
        float s[R][SL_SIMT_SCORES];
        sl_clear<R>(s);
        load_columns(&b, &p, &t, columns);
        for (int d = 0; d < p.d_head; d += SL_SIMT_SLICE) {
            const uint32_t at = sl_ring_read(&b.ring);
            copy_next<R>(&b, &p);
            sl_add_scores<R>(s, at, at + SL_SIMT_SLOT / 2);
        }
        add_tile<R>(&b, &p, &t, columns, s, sum);
        const int chunk = t.chunk;
        next_tile(&b, group, &t);
        if (t.chunk != chunk) {
            SL_UNROLL for (int i = 0; i < R; i++) {
                const float all = sl_row_sum(sum[i]);
                if (sl_lane() == 0) {
                    sl_score_add_chunk(&p, &b.item, b.item.k0 + sl_row_group() * R + i, chunk, all,
                                       &total[i]);
                }
                sum[i] = 0;
            }
        }
    }
    SL_UNROLL for (int i = 0; i < R; i++) {
        if (sl_lane() == 0) {
            sl_score_finish(&p, &b.item, b.item.k0 + sl_row_group() * R + i, total[i]);
        }
    }
}
