// What the kernels that score a prompt are given, for every architecture, and how the work is cut.
//
// A block owns a tile of keys of a key/value head and walks the queries that see them, in chunks that are
// counted from the sequence's last query backwards: blocks that run together read the same queries. A chunk's
// sum over the query heads is float32, chunks are added in double, in order; where there are too few blocks,
// each takes a part of the chunks and leaves their sums in `partial`, for a second kernel to add in the same
// order. So the bits of a score depend on nothing but its sequence.
#pragma once

#include "sequences.cuh"

enum {
    SL_SCORE_CHUNK = 512, // queries
};

struct sl_score_params {
    struct sl_heads query, key;
    const float *lse;              // [n_batch, n_head, n_query]
    float *scores;                 // [n_batch, n_head_kv, n_key]
    float *partial;                // [n_chunk, n_batch, n_head_kv, n_key], or NULL: blocks write scores
    struct sl_sequences sequences; // one a batch row; key_tile is the kernel's
    int32_t window;                // the last queries of a sequence, which count; at most n_query
    int32_t n_tile;                // key tiles of the longest sequence
    int32_t n_part, part_chunk;    // parts of a key tile, chunks of a part
    int32_t n_head, n_head_kv, d_head;
    double factor; // of the sums: 1, or n_head_kv / n_head for their mean
    float scale2;  // > 0, see sl_cuda_scale2
    bool negative; // the scale is: keys are negated
};

// A block's work; all are positions of the sequence.
struct sl_score_item {
    struct sl_work work;
    int hk;
    int k0, k_end; // keys
    int q0, q_end; // queries that count and see some of the keys
    int c0, c_end; // chunks of this part; chunk c is sl_score_chunk
};

// The plain causal mask: one group.
SL_DEV struct sl_pattern sl_score_pattern(const struct sl_score_params *p) {
    return sl_pattern{p->sequences.n_key, 0, 0, 0.0, true};
}

// The grid.
static inline int64_t sl_score_blocks_of(const struct sl_score_params *p) {
    return (int64_t)p->n_part * p->n_tile * p->sequences.n_batch * p->n_head_kv;
}

// This block's item. The first keys are seen by the most queries: they come
// first. False where there is nothing to do, for the whole block.
SL_DEV bool sl_score_item_find(const struct sl_score_params *p, struct sl_score_item *item) {
    const struct sl_sequences *s = &p->sequences;
    const int at = (int)(blockIdx.x / p->n_head_kv), batch = at % s->n_batch;
    const int tile = at / s->n_batch % p->n_tile, part = at / s->n_batch / p->n_tile;
    item->hk = (int)(blockIdx.x % p->n_head_kv);
    sl_work_of_row(s, batch, &item->work);
    item->work.tile = tile;
    const int length = item->work.length;
    item->k0 = tile * s->key_tile;
    item->k_end = min(item->k0 + s->key_tile, length);
    if (item->k0 >= item->k_end) {
        return false;
    }
    const struct sl_pattern pattern = sl_score_pattern(p);
    struct sl_range seeing[2];
    sl_pattern_query_ranges(&pattern, false, sl_range{item->k0, item->k_end}, length, seeing);
    item->q0 = max((int)seeing[0].lo, max(item->work.n_past, length - p->window));
    item->q_end = length;
    const int n_chunk = item->q0 < length ? (length - item->q0 - 1) / SL_SCORE_CHUNK + 1 : 0;
    item->c0 = part * p->part_chunk;
    item->c_end = min(item->c0 + p->part_chunk, n_chunk);
    return item->c0 < item->c_end || part == 0;
}

// The queries of chunk c.
SL_DEV struct sl_range sl_score_chunk(const struct sl_score_item *item, int c) {
    const int hi = item->q_end - c * SL_SCORE_CHUNK;
    return sl_range{max(item->q0, hi - SL_SCORE_CHUNK), hi};
}

// Key k's place in scores and in a chunk of partial.
SL_DEV int64_t sl_score_at(const struct sl_score_params *p, const struct sl_score_item *item, int k) {
    return (item->work.batch * p->n_head_kv + item->hk) * p->sequences.n_key + sl_work_column(&item->work, k);
}

SL_DEV int64_t sl_score_chunk_stride(const struct sl_score_params *p) {
    return (int64_t)p->sequences.n_batch * p->n_head_kv * p->sequences.n_key;
}

// A thread that looks after key k has the sum of chunk c: chunks c0, c0 + 1 .. are given in order.
SL_DEV void sl_score_add_chunk(const struct sl_score_params *p, const struct sl_score_item *item, int k,
                               int c, float sum, double *total) {
    *total += (double)sum;
    if (p->partial && k < item->k_end) {
        p->partial[c * sl_score_chunk_stride(p) + sl_score_at(p, item, k)] = sum;
    }
}

// And has the total of all chunks.
SL_DEV void sl_score_finish(const struct sl_score_params *p, const struct sl_score_item *item, int k,
                            double total) {
    if (!p->partial && k < item->k_end) {
        p->scores[sl_score_at(p, item, k)] = (float)(total * p->factor);
    }
}

// -lse * log2(e) of a row that counts, for p = exp2(min(0, scale2 * q.k + this)). Where the row saw nothing,
// and for rows that do not count, -infinity makes it 0.
SL_DEV float sl_score_negated_lse2(float lse) {
    return lse == -INFINITY ? lse : lse * -1.44269504088896341f;
}
