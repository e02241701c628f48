// What the kernels of SF-Attn's backward are given, for every architecture.
//
// delta = rowsum(dO O), then for every allowed pair P = exp2(S c - lse log2(e)) and dS = P (dO V^T - delta),
// and of these dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K. Nothing is added to by two blocks. Two forms:
// - owner: one block owns the keys and queries of a group of a key/value head, for all its query heads. dQ is
// summed in
//   float32 memory, tile of keys after tile of keys, and rounded at the last one.
// - apart: one kernel for dK and dV, a block a tile of keys, and one for dQ, a block a tile of queries.
// The first n_sink keys of a sequence are seen by all its later queries. Their dK and dV are sums over chunks
// of queries (in the owner form: over groups), each in memory of its own, added in order by a kernel at the
// end. Apart, a sequence of one chunk needs no sums.
#pragma once

#include "sequences.cuh"

struct sl_backward_params {
    struct sl_heads query, key, value, output, grad_output, grad_query, grad_key, grad_value;
    const float *lse; // [n_batch, n_head, n_token]
    float *delta;     // like lse
    float *sum_query; // [n_batch, n_head, n_token, d_head], owner form: dQ before its last tile of keys
    float *partial;   // [slot, n_head_kv, 2, n_sink, d_head]: dK / scale and dV of sinks
    struct sl_sequences tiles;  // tiles of queries and of keys
    struct sl_sequences chunks; // its tiles of queries are the chunks that sinks' gradients are summed over
    struct sl_pattern pattern;
    int64_t n_query_tile, n_key_tile, n_chunk; // at least the numbers over all sequences
    int32_t n_batch, n_head, n_head_kv, n_token, d_head, first_shifted;
    int32_t n_sink; // of the longest possible sequence
    int32_t owner;  // the form of the call: chunks are groups
    int32_t first_head_kv, n_run,
        skip_head_kv; // key/value heads of this launch: n_run from the first, without skip
    float scale;
    float scale2; // scale * log2(e), never 0
};

// The i-th key/value head of a launch.
SL_DEV int sl_backward_head_kv(const struct sl_backward_params *p, int i) {
    const int hk = p->first_head_kv + i;
    return hk + (hk >= p->skip_head_kv);
}

// Elements of a sequence's row 0 of head h, and the row of lse and delta there.
SL_DEV int64_t sl_backward_base(const struct sl_heads *t, const struct sl_work *work, int h) {
    return work->batch * t->batch + h * t->head;
}

SL_DEV int64_t sl_backward_row(const struct sl_backward_params *p, const struct sl_work *work, int h, int q) {
    return (work->batch * p->n_head + h) * p->n_token + sl_work_column(work, q);
}

// The queries of chunk `work->tile` in the owner form: its i-th run of a group. Shifted groups may be one
// more than the chunks: the first and the last of them are both shorter and belong to the first chunk. False
// where there is none.
SL_DEV bool sl_backward_group(const struct sl_backward_params *p, const struct sl_work *work, bool shifted,
                              int i, struct sl_range *group) {
    const int64_t n = work->length, n_chunk = (n + p->chunks.query_tile - 1) / p->chunks.query_tile;
    const int64_t n_group = sl_pattern_group_count(&p->pattern, shifted, n);
    const int64_t at = i == 0 ? work->tile : n_chunk;
    if (at >= n_group || (i > 0 && work->tile > 0) || i > 1) {
        return false;
    }
    *group = sl_pattern_group_at(&p->pattern, shifted, at, n);
    return true;
}

// Slots of partial: in the owner form one for each chunk. Apart, where there may be many sequences and only
// those of several chunks need any, by the columns of the chunks: intervals of so many columns that do not
// meet have different numbers, and the last chunk of a sequence, which may be shorter, goes with the one
// before.
static SL_HD inline int64_t sl_backward_row_slots(int64_t n_token, int chunk) {
    return 2 * ((n_token + chunk - 1) / chunk);
}

SL_DEV bool sl_backward_has_sums(const struct sl_backward_params *p, const struct sl_work *work) {
    return p->owner || work->length > p->chunks.query_tile;
}

// chunk: number over all sequences, used in the owner form; work->tile: in the sequence.
SL_DEV float *sl_backward_partial(const struct sl_backward_params *p, const struct sl_work *work,
                                  int64_t chunk, int hk) {
    int64_t slot = chunk;
    if (!p->owner) {
        const int size = p->chunks.query_tile, whole = (work->tile + 1) * (int64_t)size <= work->length;
        const int64_t column = max(work->first, 0) + (int64_t)(work->tile - !whole) * size;
        slot =
            work->batch * sl_backward_row_slots(p->n_token, size) + 2 * ((column + size - 1) / size) + !whole;
    }
    return p->partial + (slot * p->n_head_kv + hk) * 2 * p->n_sink * p->d_head;
}

// The work before and after the tiles, for every architecture and dtype.
enum sl_status sl_backward_delta(const struct sl_cuda_call *call, const struct sl_backward_params *p,
                                 enum sl_dtype dtype) SL_MUST_CHECK;
enum sl_status sl_backward_sum_sinks(const struct sl_cuda_call *call, const struct sl_backward_params *p,
                                     enum sl_dtype dtype) SL_MUST_CHECK;
