// The float32 backward: sequences, dQ and delta, dK and dV, the sinks' sums.
#include "../kernels.h"
#include "attention_backward_params.cuh"

enum { THREADS = 128 };

static struct sl_sequence_source source_of(const struct sl_attention_args *a) {
    const struct sl_sequence_source source = {a->query.shape[0], a->query.shape[2], a->query.shape[2],
                                              &a->cu_seqlens,    &a->padding_mask,  &a->position_ids,
                                              SL_SIMT_ROWS,      SL_SIMT_ROWS};
    return source;
}

static void fill_params(const struct sl_attention_args *a, struct sl_device_scratch *scratch,
                        struct sl_simt_backward_params *p) {
    const struct sl_sequence_source source = source_of(a);
    const int64_t n_batch = source.n_batch, n_token = source.n_query;
    p->query = sl_heads_of(&a->query, scratch);
    p->key = sl_heads_of(&a->key, scratch);
    p->value = sl_heads_of(&a->value, scratch);
    p->output = sl_heads_of(&a->output, scratch);
    p->grad_output = sl_heads_of(&a->grad_output, scratch);
    p->grad_query = sl_heads_of(&a->grad_query, scratch);
    p->grad_key = sl_heads_of(&a->grad_key, scratch);
    p->grad_value = sl_heads_of(&a->grad_value, scratch);
    p->lse = (const float *)a->lse.data;
    p->sequences = sl_sequences_of(&source, scratch);
    p->pattern = a->pattern;
    p->n_query_tile = sl_sequences_most_tiles(&source, true);
    p->n_key_tile = sl_sequences_most_tiles(&source, false);
    p->n_head = (int32_t)a->query.shape[1];
    p->n_head_kv = (int32_t)a->key.shape[1];
    p->n_token = (int32_t)n_token;
    p->d_head = (int32_t)a->query.shape[3];
    p->first_shifted = (int32_t)sl_pattern_first_shifted_head(&a->pattern, p->n_head);
    p->n_sink = (int32_t)sl_min(a->pattern.n_sink, n_token);
    p->n_sink_tile = (int32_t)sl_ceil_div(p->n_sink, SL_SIMT_ROWS);
    const int64_t n_tile = sl_max(1, sl_ceil_div(n_token, SL_SIMT_COLUMNS)); // longer windows change nothing
    p->window_tiles = (int32_t)sl_min(SL_SIMT_WINDOW * sl_max(1, p->n_sink_tile), n_tile);
    p->n_window = (int32_t)sl_ceil_div(n_tile, p->window_tiles);
    p->scale = (float)a->scale;
    p->scale2 = a->scale < 0 ? -sl_cuda_scale2(a->scale) : sl_cuda_scale2(a->scale);
    p->sinks = false;
    p->delta = (float *)sl_device_take(scratch, n_batch * p->n_head * n_token * 4);
    p->partial = NULL;
    if (p->n_sink > 0 && p->n_window > 1) {
        const int64_t n_slot = n_batch * p->n_window * 2;
        p->partial = (float *)sl_device_take(scratch, n_slot * p->n_head_kv * p->n_sink * 2 * p->d_head * 4);
    }
}

int64_t sl_simt_attention_backward_workspace(const struct sl_attention_args *a) {
    struct sl_device_scratch scratch = sl_device_scratch_in(NULL);
    struct sl_simt_backward_params p;
    fill_params(a, &scratch, &p);
    return scratch.used + 256;
}

// Adds the windows of one tile of sinks of a sequence, in order; a thread four columns of dK or of dV.
static __global__ void __launch_bounds__(THREADS)
    add_windows(const __grid_constant__ struct sl_simt_backward_params p) {
    const int64_t at = blockIdx.x / p.n_head_kv;
    const int hk = (int)(blockIdx.x % p.n_head_kv), k0 = (int)(at % p.n_sink_tile) * SL_SIMT_ROWS;
    struct sl_work work;
    if (!sl_work_find(&p.sequences, at / p.n_sink_tile, true, &work) || work.tile > 0 ||
        !sl_simt_split(&p, &work)) {
        return;
    }
    const int window_length = p.window_tiles * SL_SIMT_COLUMNS;
    const int n_window = (work.length + window_length - 1) / window_length;
    const int n_key = min(SL_SIMT_ROWS, p.n_sink - k0), chunks = p.d_head / 4;
    for (int i = threadIdx.x; i < n_key * 2 * chunks; i += THREADS) {
        const int k = k0 + i / (2 * chunks), of_value = i / chunks % 2, d = i % chunks * 4;
        float sum[4] = {0, 0, 0, 0};
        for (int window = 0; window < n_window; window++) {
            float x[4];
            sl_ld_global_floats(x, p.partial + sl_simt_partial(&p, sl_simt_slot(&p, &work, window), hk, k) +
                                       of_value * p.d_head + d);
            for (int j = 0; j < 4; j++) {
                sum[j] += x[j];
            }
        }
        const struct sl_heads *to = of_value ? &p.grad_value : &p.grad_key;
        for (int j = 0; j < 4; j++) {
            sum[j] *= of_value ? 1.0f : p.scale;
        }
        sl_st_global_floats((float *)to->data + sl_key_row(to, &work, hk, k) + d, sum);
    }
}

static enum sl_status run(const struct sl_cuda_call *call, const struct sl_attention_args *a,
                          const struct sl_simt_backward_params *p) {
    const struct sl_sequence_source source = source_of(a);
    SL_TRY(sl_sequences_find(call, &source, &p->sequences));
    SL_TRY(sl_heads_load(call, &a->query, &p->query));
    SL_TRY(sl_heads_load(call, &a->key, &p->key));
    SL_TRY(sl_heads_load(call, &a->value, &p->value));
    SL_TRY(sl_heads_load(call, &a->output, &p->output));
    SL_TRY(sl_heads_load(call, &a->grad_output, &p->grad_output));
    SL_TRY(sl_simt_backward_query(call, p));
    SL_TRY(sl_simt_backward_key(call, p));
    if (p->partial) {
        struct sl_simt_backward_params of_sinks = *p;
        of_sinks.sinks = true;
        SL_TRY(sl_simt_backward_key(call, &of_sinks));
        SL_TRY(sl_cuda_launch(call, "add_windows", add_windows,
                              p->n_query_tile * p->n_sink_tile * p->n_head_kv, THREADS, 0, *p));
    }
    SL_TRY(sl_heads_store(call, &a->grad_query, &p->grad_query));
    SL_TRY(sl_heads_store(call, &a->grad_key, &p->grad_key));
    SL_TRY(sl_heads_store(call, &a->grad_value, &p->grad_value));
    SL_TRY(sl_sequences_clear_padding(call, &source, &a->grad_query, NULL));
    SL_TRY(sl_sequences_clear_padding(call, &source, &a->grad_key, NULL));
    return sl_sequences_clear_padding(call, &source, &a->grad_value, NULL);
}

enum sl_status sl_simt_attention_backward(const struct sl_cuda_call *call, const struct sl_attention_args *a,
                                          void *workspace) {
    struct sl_device_scratch scratch = sl_device_scratch_in(workspace);
    struct sl_simt_backward_params p;
    fill_params(a, &scratch, &p);
    return run(call, a, &p);
}
