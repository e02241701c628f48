// What the float32 kernels of SF-Attn's backward are given.
//
// With P and lse as in the forward, delta = rowsum(dO O) and dS = P (dO V^T - delta): dV = P^T dO,
// dK = scale dS^T Q, dQ = scale dS K. A block owns a tile of queries of a head (dQ) or of keys of a key/value
// head (dK and dV, over all its query heads), so nothing is added to by two blocks.
//
// The first n_sink keys of a sequence are seen by all its queries after them. Where a sequence is long, their
// dK and dV are sums over windows of queries, each in memory of its own and added in order by another kernel;
// the other keys are left to blocks that begin after the sinks.
#pragma once

#include "copy.cuh"
#include "seen.cuh"

// Windows are SL_SIMT_WINDOW query tiles long for each tile of sinks, which bounds the memory for their sums.
enum { SL_SIMT_WINDOW = 8 };

struct sl_simt_backward_params {
    struct sl_heads query, key, value, output, grad_output, grad_query, grad_key, grad_value;
    const float *lse; // [n_batch, n_head, n_token]
    float *delta;     // like lse
    float *partial;   // [slot, n_head_kv, n_sink, 2, d_head]: dK / scale and dV
    struct sl_sequences sequences;
    struct sl_pattern pattern;
    int64_t n_query_tile, n_key_tile; // at least the numbers over all sequences
    int32_t n_head, n_head_kv, n_token, d_head, first_shifted;
    int32_t n_sink, n_sink_tile;    // of the longest possible sequence
    int32_t window_tiles, n_window; // query tiles of a window, windows of a batch row
    float scale, scale2;            // scale2: scale * log2(e), signed
    bool sinks;                     // this launch sums the sinks' windows
};

// Has the sequence several windows?
SL_DEV bool sl_simt_split(const struct sl_simt_backward_params *p, const struct sl_work *work) {
    return p->n_sink > 0 && work->length > p->window_tiles * SL_SIMT_COLUMNS;
}

// Where in partial a window of a sequence is. Places are counted from the batch row's first column, in
// windows, so that no list of sequences is needed: the last window of one that has several and the first of
// the next may meet in a place, therefore first windows have their own.
SL_DEV int sl_simt_slot(const struct sl_simt_backward_params *p, const struct sl_work *work, int window) {
    const int first = max(work->first, 0) / SL_SIMT_COLUMNS / p->window_tiles;
    return ((int)work->batch * p->n_window + first + window) * 2 + (window == 0);
}

// Element of partial where the sums of a sink begin: dK, and d_head further dV.
SL_DEV int64_t sl_simt_partial(const struct sl_simt_backward_params *p, int slot, int hk, int k) {
    return (((int64_t)slot * p->n_head_kv + hk) * p->n_sink + k) * 2 * p->d_head;
}

// The launchers; the rest of the operation is simt/attention_backward.cu.
enum sl_status sl_simt_backward_query(const struct sl_cuda_call *call,
                                      const struct sl_simt_backward_params *p) SL_MUST_CHECK;
enum sl_status sl_simt_backward_key(const struct sl_cuda_call *call,
                                    const struct sl_simt_backward_params *p) SL_MUST_CHECK;
