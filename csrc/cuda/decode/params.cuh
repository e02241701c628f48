// What the kernels of decode share: a call's arguments as they see them, which slots a batch row has live,
// and the cut of these into chunks.
//
// A chunk's length depends on the length of a row of keys alone, and chunks are counted from the first live
// slot: what a query row gets depends on neither batch, strides, capacity nor the other queries.
#pragma once

#include "../sequences.cuh"

enum {
    SL_DECODE_THREADS = 256,
    SL_DECODE_SPAN = 256,         // slots of a block that adds to the scores
    SL_DECODE_KEY_BYTES = 1 << 15 // keys of a chunk; shorter rows than 128 bytes fill less
};

// A slot that may be evicted: the smallest (score, age) goes. Where there is none, slot is -1.
struct sl_decode_candidate {
    uint32_t score, age; // in order; age counts from the newest
    int32_t slot;
    int32_t unused;
};

// Rows of a head are its query heads' queries: row (h - hk * ratio) * n_query + i.
struct sl_decode_params {
    struct sl_heads query, key, value, output, new_key, new_value;
    struct sl_heads key_to, value_to; // the cache, where key and value are copies of it
    float *lse;
    float *scores, *weights; // weights [b, hk, row, weight_stride]: exp2(logit - chunk's maximum)
    float *max, *sum;        // [b, hk, row, n_chunk]
    float *parts;            // [b, hk, row, n_chunk, d_head]
    struct sl_decode_candidate *candidates; // [b, hk, n_span]
    int32_t *positions, *free_slot, *rows;
    const uint8_t *mask, *new_mask;
    int64_t mask_stride[2], new_mask_stride;
    struct sl_sequences sequences; // with a mask
    int64_t weight_stride, window, n_sink;
    int32_t n_batch, n_head, n_head_kv, n_query, n_key, d_head;
    int32_t ratio, n_row, n_tile; // n_tile blocks for the rows of a chunk
    int32_t chunk_shift, n_chunk, n_span;
    enum sl_dtype dtype;
    float scale2, share;
    bool negative;
};

static inline int sl_decode_chunk_shift(int64_t row_bytes) {
    int shift = 8;
    while (shift > 5 && row_bytes << shift > SL_DECODE_KEY_BYTES) {
        shift--;
    }
    return shift;
}

// The live slots of one head: live slot x is slot first + x, or index[x] where the mask has holes. In a step
// the counts too, clamped to what the buffers hold.
struct sl_decode_live {
    const int32_t *index;
    int n, first;
    int n_past; // with a mask: live slots before the first query's column
    int free;   // the new token's slot, or -1
    int used, seen, budget, recent;
};

SL_DEV int sl_clamp(int v, int lo, int hi) {
    return min(max(v, lo), hi);
}

// What the heads of a row share: all but the free slot.
SL_DEV struct sl_decode_live sl_decode_row_of(const struct sl_decode_params *p, int64_t b) {
    struct sl_decode_live live = {NULL, p->n_key, 0, p->n_key - p->n_query, -1, 0, 0, 0, 0};
    if (p->rows) {
        const int32_t *row = p->rows + b * SL_ROW_FIELDS;
        const bool kept = !p->new_mask || p->new_mask[b * p->new_mask_stride] != 0;
        live.used = sl_clamp(row[SL_ROW_USED], 0, p->n_key - 1);
        live.seen = sl_clamp(row[SL_ROW_SEEN], 0, INT32_MAX - 1);
        live.budget = row[SL_ROW_BUDGET];
        live.recent = max(1, row[SL_ROW_RECENT]);
        live.n = kept ? live.used + 1 : 0;
    } else if (p->mask) {
        const struct sl_cuda_sequence *entry = &p->sequences.table[b];
        live.index = entry->first < 0 ? p->sequences.index + b * p->n_key : NULL;
        live.n = entry->length;
        live.first = max(entry->first, 0);
        live.n_past = entry->n_past;
    }
    return live;
}

SL_DEV struct sl_decode_live sl_decode_live_of(const struct sl_decode_params *p, int64_t b, int64_t hk) {
    struct sl_decode_live live = sl_decode_row_of(p, b);
    if (p->rows && live.n > 0) {
        live.free = sl_clamp(p->free_slot[b * p->n_head_kv + hk], 0, live.used);
    }
    return live;
}

SL_DEV int sl_decode_slot(const struct sl_decode_live *live, int x) {
    return live->index ? live->index[x] : live->first + x;
}

SL_DEV bool sl_decode_query_kept(const struct sl_decode_params *p, int64_t b, int i) {
    return !p->mask || p->mask[b * p->mask_stride[0] + (p->n_key - p->n_query + i) * p->mask_stride[1]] != 0;
}

// Query i sees live slots 0 .. this - 1; 0: it is padding.
SL_DEV int sl_decode_visible(const struct sl_decode_params *p, const struct sl_decode_live *live, int64_t b,
                             int i) {
    if (p->rows || !sl_decode_query_kept(p, b, i)) {
        return p->rows ? live->n : 0;
    }
    int64_t q = live->n_past;
    for (int j = 0; j < i; j++) {
        q += sl_decode_query_kept(p, b, j);
    }
    struct sl_pattern causal = {};
    causal.group_size = p->n_key;
    causal.causal = true;
    struct sl_range keys[2];
    return sl_pattern_key_ranges(&causal, false, sl_range{q, q + 1}, live->n, keys) ? (int)keys[0].hi : 0;
}

// Does query i, which is not padding, add to the scores?
SL_DEV bool sl_decode_counted(const struct sl_decode_params *p, int64_t b, int i) {
    int64_t later = 0;
    for (int j = i + 1; j < p->n_query; j++) {
        later += sl_decode_query_kept(p, b, j);
    }
    return p->n_query == 1 || p->window == 0 || later < p->window;
}

enum sl_status sl_decode_chunks_f32(const struct sl_cuda_call *call,
                                    const struct sl_decode_params *p) SL_MUST_CHECK;
enum sl_status sl_decode_chunks_bf16(const struct sl_cuda_call *call,
                                     const struct sl_decode_params *p) SL_MUST_CHECK;
enum sl_status sl_decode_chunks_f16(const struct sl_cuda_call *call,
                                    const struct sl_decode_params *p) SL_MUST_CHECK;
enum sl_status sl_decode_merge(const struct sl_cuda_call *call,
                               const struct sl_decode_params *p) SL_MUST_CHECK;
enum sl_status sl_decode_step(const struct sl_cuda_call *call,
                              const struct sl_decode_params *p) SL_MUST_CHECK;
