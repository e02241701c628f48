// SF-Attn forward on CUDA: sequences, then one kernel over tiles of queries.
#include "kernels.h"

#include "simt/tile_config.h"
#include "sm80/attention_forward_config.h"

static struct sl_sequence_source source_of(const struct sl_attention_args *a) {
    const int d = sl_head_dim(a->query.shape[3]);
    const bool f32 = a->query.dtype == SL_F32;
    const struct sl_sequence_source source = {a->query.shape[0],
                                              a->query.shape[2],
                                              a->key.shape[2],
                                              &a->cu_seqlens,
                                              &a->padding_mask,
                                              &a->position_ids,
                                              f32 ? SL_SIMT_ROWS : sl_forward_queries(d),
                                              f32 ? SL_SIMT_COLUMNS : sl_forward_keys(d)};
    return source;
}

static void fill_params(const struct sl_attention_args *a, struct sl_device_scratch *scratch,
                        struct sl_attention_params *p) {
    const struct sl_sequence_source source = source_of(a);
    p->query = sl_heads_of(&a->query, scratch);
    p->key = sl_heads_of(&a->key, scratch);
    p->value = sl_heads_of(&a->value, scratch);
    p->output = sl_heads_of(&a->output, scratch);
    p->lse = (float *)a->lse.data;
    p->sequences = sl_sequences_of(&source, scratch);
    p->pattern = a->pattern;
    p->n_tile = sl_sequences_most_tiles(&source, true);
    p->n_head = (int32_t)a->query.shape[1];
    p->n_head_kv = (int32_t)a->key.shape[1];
    p->d_head = (int32_t)a->query.shape[3];
    p->first_shifted = (int32_t)sl_pattern_first_shifted_head(&a->pattern, p->n_head);
    p->scale2 = sl_cuda_scale2(a->scale);
    p->negative = a->scale < 0;
}

extern "C" int64_t sl_cuda_attention_forward_workspace(const struct sl_attention_args *a) {
    struct sl_device_scratch scratch = sl_device_scratch_in(NULL);
    struct sl_attention_params p;
    fill_params(a, &scratch, &p);
    return scratch.used + 256;
}

static enum sl_status run(const struct sl_cuda_call *call, const struct sl_attention_args *a,
                          const struct sl_attention_params *p) {
    const struct sl_sequence_source source = source_of(a);
    SL_TRY(sl_sequences_find(call, &source, &p->sequences));
    SL_TRY(sl_heads_load(call, &a->query, &p->query));
    SL_TRY(sl_heads_load(call, &a->key, &p->key));
    SL_TRY(sl_heads_load(call, &a->value, &p->value));
    SL_TRY(a->query.dtype == SL_BF16  ? sl_sm80_attention_forward_bf16(call, p)
           : a->query.dtype == SL_F16 ? sl_sm80_attention_forward_f16(call, p)
                                      : sl_simt_attention_forward(call, p));
    SL_TRY(sl_heads_store(call, &a->output, &p->output));
    struct sl_tensor rows = a->output;
    if (!sl_tensor_given(&rows)) {
        rows = a->query;
        rows.data = NULL;
    }
    return sl_sequences_clear_padding(call, &source, &rows, p->lse);
}

extern "C" enum sl_status sl_cuda_attention_forward(const struct sl_attention_args *a, void *workspace,
                                                    int64_t n_byte, struct sl_error *err) {
    (void)n_byte;
    struct sl_cuda_call call;
    SL_TRY(sl_cuda_begin(&call, &a->query, a->stream, err));
    struct sl_device_scratch scratch = sl_device_scratch_in(workspace);
    struct sl_attention_params p;
    fill_params(a, &scratch, &p);
    return sl_cuda_end(&call, run(&call, a, &p));
}
