// Finds the sequences of a call on the device: one block a batch row reads the mask or the starts, then one
// block lists the sequences and sums their tiles.
#include "sequences.cuh"

#include "block.cuh"

enum { THREADS = 512, SCAN_BYTES = (THREADS / 32 + 1) * 4 };

struct find_params {
    struct sl_sequences sequences;
    struct sl_cuda_sequence *table; // to be written: what sequences holds as const
    int32_t *count, *index;
    int32_t *starts;    // [n_row, per_row + 1], sorted, of sequences that lie side by side; else NULL
    int32_t *row_count; // [n_row] sequences of a row of starts
    int32_t n_row, per_row;
    const int32_t *cu_seqlens;
    const uint8_t *mask;
    const int64_t *position_ids;
    int64_t stride[2]; // of mask or position_ids
};

static int64_t rows_of(const struct sl_sequence_source *s) {
    return s->cu_seqlens && sl_tensor_given(s->cu_seqlens) ? 1 : s->n_batch;
}

static bool given(const struct sl_tensor *t) {
    return t && sl_tensor_given(t);
}

static int64_t most_per_row(const struct sl_sequence_source *s) {
    return given(s->cu_seqlens) ? s->cu_seqlens->shape[0] - 1 : given(s->position_ids) ? s->n_query : 1;
}

static bool whole_rows(const struct sl_sequence_source *s) {
    return !given(s->cu_seqlens) && !given(s->padding_mask) && !given(s->position_ids);
}

struct sl_sequences sl_sequences_of(const struct sl_sequence_source *s, struct sl_device_scratch *scratch) {
    struct sl_sequences out = {
        NULL,          NULL,       NULL, (int32_t)s->n_batch, (int32_t)s->n_query, (int32_t)s->n_key,
        s->query_tile, s->key_tile};
    if (whole_rows(s)) {
        return out;
    }
    const int64_t n_row = rows_of(s), per_row = most_per_row(s);
    out.table = (const struct sl_cuda_sequence *)sl_device_take(
        scratch, (n_row * per_row + 1) * (int64_t)sizeof(struct sl_cuda_sequence));
    out.count = (const int32_t *)sl_device_take(scratch, (1 + n_row) * 4);
    out.index = (const int32_t *)sl_device_take(scratch, given(s->padding_mask) ? s->n_batch * s->n_key * 4
                                                                                : n_row * (per_row + 1) * 4);
    return out;
}

int64_t sl_sequences_most_tiles(const struct sl_sequence_source *s, bool of_queries) {
    const int64_t n = of_queries ? s->n_query : s->n_key, tile = of_queries ? s->query_tile : s->key_tile;
    const int64_t sequences = rows_of(s) * most_per_row(s);
    // Every sequence may end in a tile of its own, but no more tiles than tokens.
    return sl_min(s->n_batch * n, s->n_batch * sl_ceil_div(n, tile) + (whole_rows(s) ? 0 : sequences));
}

template <bool MAXIMUM> SL_DEV struct sl_scanned scan(int v) {
    return sl_block_scan<THREADS, MAXIMUM>(v, sl_shared_addr(SL_SHARED_BASE()));
}

// The columns that this thread looks after: a run of n / THREADS.
SL_DEV struct sl_range run_of(int n) {
    const int each = (n + THREADS - 1) / THREADS, lo = min((int)threadIdx.x * each, n);
    return sl_range{lo, min(lo + each, n)};
}

SL_DEV void find_kept(const struct find_params *p, int64_t b) {
    const int n_key = p->sequences.n_key, n_past = n_key - p->sequences.n_query;
    const uint8_t *mask = p->mask + b * p->stride[0];
    int32_t *index = p->index + b * n_key;
    const struct sl_range run = run_of(n_key);
    int kept = 0, kept_past = 0;
    for (int64_t n = run.lo; n < run.hi; n++) {
        const int keep = mask[n * p->stride[1]] != 0;
        kept += keep;
        kept_past += keep && n < n_past;
    }
    const struct sl_scanned columns = scan<false>(kept);
    const int length = columns.all, length_past = scan<false>(kept_past).all;
    int at = columns.before;
    for (int64_t n = run.lo; n < run.hi; n++) {
        if (mask[n * p->stride[1]] != 0) {
            index[at++] = (int32_t)n;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool holes = length > 0 && index[length - 1] - index[0] + 1 != length;
        p->table[b] =
            sl_cuda_sequence{(int32_t)b, holes ? -1 : length > 0 ? index[0] : 0, length_past, length, 0, 0};
    }
}

SL_DEV void find_starts(const struct find_params *p, int64_t b) {
    const int n_token = p->sequences.n_query;
    int32_t *starts = p->starts + b * (p->per_row + 1);
    if (p->cu_seqlens) {
        const struct sl_range run = run_of(p->per_row + 1);
        int most = 0;
        for (int64_t i = run.lo; i < run.hi; i++) {
            most = max(most, i == 0 ? 0 : min(max(p->cu_seqlens[i], 0), n_token));
        }
        int before = scan<true>(most).before;
        for (int64_t i = run.lo; i < run.hi; i++) {
            before = max(before, i == 0 ? 0 : min(max(p->cu_seqlens[i], 0), n_token));
            starts[i] = before;
        }
        if (threadIdx.x == 0) {
            p->row_count[b] = p->per_row;
        }
        return;
    }
    const int64_t *ids = p->position_ids + b * p->stride[0];
    const struct sl_range run = run_of(n_token);
    int found = 0;
    for (int64_t n = run.lo; n < run.hi; n++) {
        found += n == 0 || ids[n * p->stride[1]] <= ids[(n - 1) * p->stride[1]];
    }
    const struct sl_scanned founds = scan<false>(found);
    int at = founds.before;
    for (int64_t n = run.lo; n < run.hi; n++) {
        if (n == 0 || ids[n * p->stride[1]] <= ids[(n - 1) * p->stride[1]]) {
            starts[at++] = (int32_t)n;
        }
    }
    if (threadIdx.x == 0) {
        starts[founds.all] = n_token;
        p->row_count[b] = founds.all;
    }
}

static __global__ void __launch_bounds__(THREADS) find_rows(const __grid_constant__ struct find_params p) {
    if (p.mask) {
        find_kept(&p, blockIdx.x);
    } else {
        find_starts(&p, blockIdx.x);
    }
}

static __global__ void __launch_bounds__(THREADS)
    list_sequences(const __grid_constant__ struct find_params p) {
    int listed = 0, query_tiles = 0, key_tiles = 0;
    const struct sl_sequences *s = &p.sequences;
    for (int b = 0; b < p.n_row; b++) {
        const int32_t *starts = p.starts ? p.starts + (int64_t)b * (p.per_row + 1) : NULL;
        const int count = starts ? p.row_count[b] : 1;
        for (int i0 = 0; i0 < count; i0 += THREADS) {
            const int i = i0 + (int)threadIdx.x;
            sl_cuda_sequence entry = {b, 0, 0, 0, 0, 0};
            if (i < count && starts) {
                entry.first = starts[i];
                entry.length = starts[i + 1] - starts[i];
            } else if (i < count) {
                entry = p.table[b];
            }
            const int q = (entry.length - entry.n_past + s->query_tile - 1) / s->query_tile;
            const int k = (entry.length + s->key_tile - 1) / s->key_tile;
            const struct sl_scanned of_queries = scan<false>(q), of_keys = scan<false>(k);
            entry.first_query_tile = query_tiles + of_queries.before;
            entry.first_key_tile = key_tiles + of_keys.before;
            if (i < count) {
                p.table[listed + i] = entry;
            }
            query_tiles += of_queries.all;
            key_tiles += of_keys.all;
        }
        listed += count;
    }
    if (threadIdx.x == 0) {
        p.table[listed] = sl_cuda_sequence{0, 0, 0, 0, query_tiles, key_tiles};
        *p.count = listed;
    }
}

enum sl_status sl_sequences_find(const struct sl_cuda_call *call, const struct sl_sequence_source *source,
                                 const struct sl_sequences *sequences) {
    if (whole_rows(source)) {
        return SL_OK;
    }
    struct find_params p = {};
    p.sequences = *sequences;
    p.table = (struct sl_cuda_sequence *)sequences->table;
    p.count = (int32_t *)sequences->count;
    p.row_count = p.count + 1;
    p.n_row = (int32_t)rows_of(source);
    p.per_row = (int32_t)most_per_row(source);
    if (given(source->padding_mask)) {
        p.mask = (const uint8_t *)source->padding_mask->data;
        p.index = (int32_t *)sequences->index;
        p.stride[0] = source->padding_mask->stride[0];
        p.stride[1] = source->padding_mask->stride[1];
    } else if (given(source->cu_seqlens)) {
        p.cu_seqlens = (const int32_t *)source->cu_seqlens->data;
        p.starts = (int32_t *)sequences->index;
    } else {
        p.position_ids = (const int64_t *)source->position_ids->data;
        p.starts = (int32_t *)sequences->index;
        p.stride[0] = source->position_ids->shape[0] == 1 ? 0 : source->position_ids->stride[0];
        p.stride[1] = source->position_ids->stride[1];
    }
    SL_TRY(sl_cuda_launch(call, "find_rows", find_rows, p.n_row, THREADS, SCAN_BYTES, p));
    return sl_cuda_launch(call, "list_sequences", list_sequences, 1, THREADS, SCAN_BYTES, p);
}

// ---- padded rows ----

struct clear_params {
    struct sl_tensor t;
    const uint8_t *mask;
    int64_t stride[2];
    float *lse;
    int64_t n_row; // rows of t
};

// A warp a row.
static __global__ void __launch_bounds__(THREADS) clear_rows(const __grid_constant__ struct clear_params p) {
    const int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int64_t n_token = p.t.shape[2], n = row % n_token;
    const int64_t h = row / n_token % p.t.shape[1], b = row / n_token / p.t.shape[1];
    if (row >= p.n_row || p.mask[b * p.stride[0] + n * p.stride[1]] != 0) {
        return;
    }
    const int64_t at = b * p.t.stride[0] + h * p.t.stride[1] + n * p.t.stride[2];
    for (int64_t d = threadIdx.x % 32; p.t.data && d < p.t.shape[3]; d += 32) {
        if (p.t.dtype == SL_F32) {
            ((float *)p.t.data)[at + d] = 0;
        } else {
            ((uint16_t *)p.t.data)[at + d] = 0;
        }
    }
    if (p.lse && threadIdx.x % 32 == 0) {
        p.lse[row] = -INFINITY;
    }
}

enum sl_status sl_sequences_clear_padding(const struct sl_cuda_call *call,
                                          const struct sl_sequence_source *source, const struct sl_tensor *t,
                                          float *lse) {
    if (!given(source->padding_mask)) {
        return SL_OK;
    }
    const struct sl_tensor *mask = source->padding_mask;
    struct clear_params p = {};
    p.t = *t;
    p.stride[0] = mask->stride[0];
    p.stride[1] = mask->stride[1];
    p.mask = (const uint8_t *)mask->data + (source->n_key - t->shape[2]) * mask->stride[1];
    p.lse = lse;
    p.n_row = t->shape[0] * t->shape[1] * t->shape[2];
    return sl_cuda_launch(call, "clear_rows", clear_rows, sl_ceil_div(p.n_row, THREADS / 32), THREADS, 0, p);
}
