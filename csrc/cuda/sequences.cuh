// Which sequences a call has, as kernels see them, and from a tile's number to its sequence. Kernels launch
// one block a tile and head; without cu_seqlens, padding mask or position_ids nothing is read from memory for
// it.
#pragma once

#include "host.h"

// Tokens of one batch row that make a sequence: position x is key column first + x, or index[x] where first
// is -1 (padding with holes); the positions n_past .. length-1 have queries. Tiles cover positions: query
// tile i the queries n_past + i * tile .., key tile i the keys i * tile .. . first_*_tile counts those of all
// sequences before.
struct sl_cuda_sequence {
    int32_t batch, first, n_past, length, first_query_tile, first_key_tile;
};

// By value among a kernel's parameters. Columns: n_key keys, of which the last n_query have queries.
struct sl_sequences {
    const struct sl_cuda_sequence *table; // NULL: every batch row is one sequence
    const int32_t *count;                 // entries of table; one more ends the sums of tiles
    const int32_t *index; // [n_batch, n_key], the kept columns in order, where there is a padding mask
    int32_t n_batch, n_query, n_key;
    int32_t query_tile, key_tile; // rows of a tile
};

// One tile of one sequence.
struct sl_work {
    int64_t batch;
    const int32_t *index;
    int32_t first, n_past, length;
    int32_t tile; // of this sequence
};

// Where a call's sequences come from; tensors that were not given are absent or NULL.
struct sl_sequence_source {
    int64_t n_batch, n_query, n_key;
    const struct sl_tensor *cu_seqlens, *padding_mask, *position_ids;
    int query_tile, key_tile;
};

// Takes what sl_sequences_find needs from scratch, and says what kernels will be given.
struct sl_sequences sl_sequences_of(const struct sl_sequence_source *source,
                                    struct sl_device_scratch *scratch);
// Finds the sequences on the device, clamped to the columns whatever the tensors hold.
enum sl_status sl_sequences_find(const struct sl_cuda_call *call, const struct sl_sequence_source *source,
                                 const struct sl_sequences *sequences) SL_MUST_CHECK;
// At least the number of query or key tiles of all sequences: blocks beyond the true number find no work.
int64_t sl_sequences_most_tiles(const struct sl_sequence_source *source, bool of_queries);
// Where there is a padding mask, zeroes the padded rows of t (queries' or keys' columns), and fills lse (may
// be NULL, [n_batch, n_head, n_query]) with -infinity there.
enum sl_status sl_sequences_clear_padding(const struct sl_cuda_call *call,
                                          const struct sl_sequence_source *source, const struct sl_tensor *t,
                                          float *lse) SL_MUST_CHECK;

SL_DEV int sl_work_find(const struct sl_sequences *s, int64_t item, bool of_queries, struct sl_work *work) {
    const int tile = of_queries ? s->query_tile : s->key_tile;
    if (!s->table) {
        const int rows = of_queries ? s->n_query : s->n_key, per_row = (rows + tile - 1) / tile;
        work->batch = item / per_row;
        work->index = NULL;
        work->first = 0;
        work->n_past = s->n_key - s->n_query;
        work->length = s->n_key;
        work->tile = (int)(item % per_row);
        return work->batch < s->n_batch;
    }
    // The last entry whose sum of tiles before it is at most item; empty sequences have no tiles.
    int lo = 0, hi = *s->count;
    if (item >= (of_queries ? s->table[hi].first_query_tile : s->table[hi].first_key_tile)) {
        return 0;
    }
    while (hi - lo > 1) {
        const int middle = lo + (hi - lo) / 2;
        const int before = of_queries ? s->table[middle].first_query_tile : s->table[middle].first_key_tile;
        lo = item >= before ? middle : lo;
        hi = item >= before ? hi : middle;
    }
    const struct sl_cuda_sequence *entry = &s->table[lo];
    work->batch = entry->batch;
    work->index = entry->first < 0 ? s->index + work->batch * s->n_key : NULL;
    work->first = entry->first;
    work->n_past = entry->n_past;
    work->length = entry->length;
    work->tile = (int)item - (of_queries ? entry->first_query_tile : entry->first_key_tile);
    return 1;
}

// The sequence of a batch row, where each has one: no cu_seqlens, no position_ids. Sets no tile.
SL_DEV void sl_work_of_row(const struct sl_sequences *s, int batch, struct sl_work *work) {
    work->batch = batch;
    work->index = NULL;
    work->first = 0;
    work->n_past = s->n_key - s->n_query;
    work->length = s->n_key;
    if (s->table) {
        const struct sl_cuda_sequence *entry = &s->table[batch];
        work->index = entry->first < 0 ? s->index + work->batch * s->n_key : NULL;
        work->first = entry->first;
        work->n_past = entry->n_past;
        work->length = entry->length;
    }
}

// The key column of a position of the sequence, 0 <= position < length; as a row of queries it is this minus
// (n_key - n_query).
SL_DEV int64_t sl_work_column(const struct sl_work *work, int position) {
    return work->index ? work->index[position] : work->first + position;
}
