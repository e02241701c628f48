// SF-Attn backward on CUDA: sequences, delta, the tiles, the sinks' sums.
#include "kernels.h"

#include "sm80/attention_backward_config.h"

static const int64_t SINK_CHUNK = 256; // queries, at least
static const int32_t NO_HEAD = INT32_MAX;

// How a call is cut: everything that follows from the arguments and the device.
struct cut {
    struct sl_sequence_source tiles, chunks;
    bool owner;
    int32_t mixed; // the key/value head whose query heads are shifted in part, or NO_HEAD
};

// Whether blocks own whole groups: five products a tile instead of seven, where that makes two blocks for
// every multiprocessor. Not where sink queries see the keys of all groups, nor where the sinks' sums would
// take more memory than those of dQ.
static bool owner_form(const struct sl_attention_args *a, const struct cut *cut, int n_processor) {
    const struct sl_pattern *pattern = &a->pattern;
    const int64_t n_batch = a->query.shape[0], n_head = a->query.shape[1], n_token = a->query.shape[2];
    const int64_t n_head_kv = a->key.shape[1], group = sl_min(pattern->group_size, n_token);
    const int64_t n_owned = n_head_kv - (cut->mixed != NO_HEAD);
    return (pattern->causal || pattern->n_sink == 0) && group >= cut->tiles.key_tile &&
           n_batch * n_owned * sl_ceil_div(n_token, group) >= 2 * (int64_t)n_processor &&
           2 * sl_min(pattern->n_sink, n_token) * sl_sequences_most_tiles(&cut->chunks, true) * n_head_kv <=
               n_batch * n_head * n_token;
}

static void cut_chunks(struct cut *cut, int64_t size) {
    cut->chunks = cut->tiles;
    cut->chunks.query_tile = cut->chunks.key_tile = (int)sl_min(size, cut->tiles.n_query);
}

static struct cut cut_of(const struct sl_attention_args *a, int n_processor) {
    const int64_t n_token = a->query.shape[2], n_head = a->query.shape[1], per_kv = n_head / a->key.shape[1];
    const int64_t first_shifted = sl_pattern_first_shifted_head(&a->pattern, n_head);
    const int d = sl_head_dim(a->query.shape[3]);
    struct cut cut;
    cut.tiles = sl_sequence_source{a->query.shape[0],
                                   n_token,
                                   n_token,
                                   &a->cu_seqlens,
                                   &a->padding_mask,
                                   &a->position_ids,
                                   sl_backward_queries(d),
                                   sl_backward_keys(d)};
    cut.mixed = first_shifted % per_kv ? (int32_t)(first_shifted / per_kv) : NO_HEAD;
    cut_chunks(&cut, a->pattern.group_size);
    cut.owner = owner_form(a, &cut, n_processor);
    if (!cut.owner) {
        cut_chunks(&cut, sl_max(SINK_CHUNK, 4 * sl_min(a->pattern.n_sink, n_token)));
    }
    return cut;
}

static void fill_params(const struct sl_attention_args *a, const struct cut *cut,
                        struct sl_device_scratch *scratch, struct sl_backward_params *p) {
    *p = sl_backward_params{};
    p->n_batch = (int32_t)a->query.shape[0];
    p->n_head = (int32_t)a->query.shape[1];
    p->n_head_kv = (int32_t)a->key.shape[1];
    p->n_token = (int32_t)a->query.shape[2];
    p->d_head = (int32_t)a->query.shape[3];
    p->query = sl_heads_of(&a->query, scratch);
    p->key = sl_heads_of(&a->key, scratch);
    p->value = sl_heads_of(&a->value, scratch);
    p->output = sl_heads_of(&a->output, scratch);
    p->grad_output = sl_heads_of(&a->grad_output, scratch);
    p->grad_query = sl_heads_of(&a->grad_query, scratch);
    p->grad_key = sl_heads_of(&a->grad_key, scratch);
    p->grad_value = sl_heads_of(&a->grad_value, scratch);
    p->lse = (const float *)a->lse.data;
    p->pattern = a->pattern;
    p->first_shifted = (int32_t)sl_pattern_first_shifted_head(&a->pattern, p->n_head);
    p->n_sink = (int32_t)sl_min(a->pattern.n_sink, p->n_token);
    p->owner = cut->owner;
    p->scale = (float)a->scale;
    p->scale2 = a->scale < 0 ? -sl_cuda_scale2(a->scale) : sl_cuda_scale2(a->scale);
    p->tiles = sl_sequences_of(&cut->tiles, scratch);
    p->chunks = sl_sequences_of(&cut->chunks, scratch);
    p->n_query_tile = sl_sequences_most_tiles(&cut->tiles, true);
    p->n_key_tile = sl_sequences_most_tiles(&cut->tiles, false);
    p->n_chunk = sl_sequences_most_tiles(&cut->chunks, true);
    const int64_t n_row = (int64_t)p->n_batch * p->n_head * p->n_token,
                  size = p->d_head * (int64_t)sizeof(float);
    p->delta = (float *)sl_device_take(scratch, n_row * (int64_t)sizeof(float));
    p->sum_query = (float *)sl_device_take(scratch, cut->owner ? n_row * size : 0);
    const int64_t n_slot =
        cut->owner ? p->n_chunk : p->n_batch * sl_backward_row_slots(p->n_token, cut->chunks.query_tile);
    p->partial = (float *)sl_device_take(scratch, n_slot * p->n_head_kv * 2 * p->n_sink * size);
}

extern "C" int64_t sl_cuda_attention_backward_workspace(const struct sl_attention_args *a) {
    if (a->query.dtype == SL_F32) {
        return sl_simt_attention_backward_workspace(a);
    }
    int n_processor = 0;
    (void)cudaDeviceGetAttribute(&n_processor, cudaDevAttrMultiProcessorCount, a->query.device_id);
    const struct cut cut = cut_of(a, n_processor);
    struct sl_device_scratch scratch = sl_device_scratch_in(NULL);
    struct sl_backward_params p;
    fill_params(a, &cut, &scratch, &p);
    return scratch.used + 256;
}

// The tiles of n_run key/value heads.
static enum sl_status run_tiles(const struct sl_cuda_call *call, enum sl_dtype dtype,
                                struct sl_backward_params *p, bool owner, int32_t first, int32_t n_run,
                                int32_t skip) {
    p->first_head_kv = first;
    p->n_run = n_run;
    p->skip_head_kv = skip;
    return dtype == SL_BF16 ? sl_sm80_attention_backward_bf16(call, p, owner)
                            : sl_sm80_attention_backward_f16(call, p, owner);
}

static enum sl_status run(const struct sl_cuda_call *call, const struct sl_attention_args *a,
                          const struct cut *cut, struct sl_backward_params *p) {
    const enum sl_dtype dtype = a->query.dtype;
    SL_TRY(sl_sequences_find(call, &cut->tiles, &p->tiles));
    SL_TRY(sl_sequences_find(call, &cut->chunks, &p->chunks));
    SL_TRY(sl_heads_load(call, &a->query, &p->query));
    SL_TRY(sl_heads_load(call, &a->key, &p->key));
    SL_TRY(sl_heads_load(call, &a->value, &p->value));
    SL_TRY(sl_heads_load(call, &a->output, &p->output));
    SL_TRY(sl_heads_load(call, &a->grad_output, &p->grad_output));
    SL_TRY(sl_backward_delta(call, p, dtype));
    if (!cut->owner) {
        SL_TRY(run_tiles(call, dtype, p, false, 0, p->n_head_kv, NO_HEAD));
    } else {
        const bool mixed = cut->mixed != NO_HEAD;
        SL_TRY(run_tiles(call, dtype, p, true, 0, p->n_head_kv - mixed, cut->mixed));
        if (mixed) {
            SL_TRY(run_tiles(call, dtype, p, false, cut->mixed, 1, NO_HEAD));
        }
    }
    if (p->n_sink > 0) {
        SL_TRY(sl_backward_sum_sinks(call, p, dtype));
    }
    const struct sl_tensor *gradients[3] = {&a->grad_query, &a->grad_key, &a->grad_value};
    const struct sl_heads *heads[3] = {&p->grad_query, &p->grad_key, &p->grad_value};
    for (int i = 0; i < 3; i++) {
        SL_TRY(sl_heads_store(call, gradients[i], heads[i]));
        SL_TRY(sl_sequences_clear_padding(call, &cut->tiles, gradients[i], NULL));
    }
    return SL_OK;
}

extern "C" enum sl_status sl_cuda_attention_backward(const struct sl_attention_args *a, void *workspace,
                                                     int64_t n_byte, struct sl_error *err) {
    struct sl_cuda_call call;
    (void)n_byte;
    SL_TRY(sl_cuda_begin(&call, &a->query, a->stream, err));
    if (a->query.dtype == SL_F32) {
        return sl_cuda_end(&call, sl_simt_attention_backward(&call, a, workspace));
    }
    const struct cut cut = cut_of(a, call.n_processor);
    struct sl_device_scratch scratch = sl_device_scratch_in(workspace);
    struct sl_backward_params p;
    fill_params(a, &cut, &scratch, &p);
    return sl_cuda_end(&call, run(&call, a, &cut, &p));
}
