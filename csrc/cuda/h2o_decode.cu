// Decode on CUDA: chunks of the live slots, then what puts them together, then in a step the counts. Grids
// depend on shapes alone; what rows, free_slot and masks say is read on the device.
#include "decode/params.cuh"

static struct sl_sequence_source source_of(const struct sl_h2o_decode_args *a) {
    const struct sl_sequence_source source = {
        a->query.shape[0], a->query.shape[2], a->key.shape[2], NULL, &a->padding_mask, NULL, 64, 64};
    return source;
}

static struct sl_heads plain_heads(const struct sl_tensor *t) {
    const struct sl_heads heads = {(char *)t->data, t->stride[0], t->stride[1], t->stride[2]};
    return heads;
}

static void fill_sizes(const struct sl_h2o_decode_args *a, struct sl_decode_params *p) {
    const int64_t *q = a->query.shape, *k = a->key.shape;
    p->n_batch = (int32_t)q[0];
    p->n_head = (int32_t)q[1];
    p->n_query = (int32_t)q[2];
    p->d_head = (int32_t)q[3];
    p->n_head_kv = (int32_t)k[1];
    p->n_key = (int32_t)k[2];
    p->ratio = p->n_head / p->n_head_kv;
    p->n_row = p->ratio * p->n_query;
    p->dtype = a->query.dtype;
    p->chunk_shift = sl_decode_chunk_shift(q[3] * sl_dtype_size(p->dtype));
    p->n_chunk = (int32_t)sl_ceil_div(k[2], (int64_t)1 << p->chunk_shift);
    p->n_span = (int32_t)sl_ceil_div(k[2], SL_DECODE_SPAN);
    p->weight_stride = (int64_t)p->n_chunk << p->chunk_shift;
    p->window = a->window;
    p->n_sink = a->n_sink;
    p->scale2 = sl_cuda_scale2(a->scale);
    p->negative = a->scale < 0;
    p->share = a->mean ? 1.0f / (float)p->ratio : 1.0f;
}

static void fill_params(const struct sl_h2o_decode_args *a, struct sl_device_scratch *scratch,
                        struct sl_decode_params *p) {
    const struct sl_sequence_source source = source_of(a);
    const bool scores = sl_tensor_given(&a->scores), step = sl_tensor_given(&a->rows);
    *p = sl_decode_params();
    fill_sizes(a, p);
    p->query = plain_heads(&a->query); // read in single elements
    p->key = sl_heads_of(&a->key, scratch);
    p->value = sl_heads_of(&a->value, scratch);
    p->output = sl_heads_of(&a->output, scratch);
    p->new_key = sl_heads_of(&a->new_key, scratch);
    p->new_value = sl_heads_of(&a->new_value, scratch);
    p->key_to = plain_heads(&a->key);
    p->value_to = plain_heads(&a->value);
    p->lse = (float *)a->lse.data;
    p->scores = (float *)a->scores.data;
    p->positions = (int32_t *)a->positions.data;
    p->free_slot = (int32_t *)a->free_slot.data;
    p->rows = (int32_t *)a->rows.data;
    p->mask = (const uint8_t *)a->padding_mask.data;
    p->mask_stride[0] = a->padding_mask.stride[0];
    p->mask_stride[1] = a->padding_mask.stride[1];
    p->new_mask = (const uint8_t *)a->new_mask.data;
    p->new_mask_stride = a->new_mask.stride[0];
    if (sl_tensor_given(&a->padding_mask)) {
        p->sequences = sl_sequences_of(&source, scratch);
    }
    const int64_t heads = (int64_t)p->n_batch * p->n_head_kv, rows = heads * p->n_row;
    const int64_t parts = rows * p->n_chunk, size = sizeof(float);
    p->max = (float *)sl_device_take(scratch, parts * size);
    p->sum = (float *)sl_device_take(scratch, parts * size);
    p->parts = (float *)sl_device_take(scratch, parts * p->d_head * size);
    p->weights = scores ? (float *)sl_device_take(scratch, rows * p->weight_stride * size) : NULL;
    p->candidates = step ? (struct sl_decode_candidate *)sl_device_take(
                               scratch, heads * p->n_span * (int64_t)sizeof *p->candidates)
                         : NULL;
}

extern "C" int64_t sl_cuda_h2o_decode_workspace(const struct sl_h2o_decode_args *a) {
    struct sl_device_scratch scratch = sl_device_scratch_in(NULL);
    struct sl_decode_params p;
    fill_params(a, &scratch, &p);
    return scratch.used + 256;
}

static enum sl_status run(const struct sl_cuda_call *call, const struct sl_h2o_decode_args *a,
                          const struct sl_decode_params *p) {
    const struct sl_sequence_source source = source_of(a);
    if (p->mask) {
        SL_TRY(sl_sequences_find(call, &source, &p->sequences));
    }
    SL_TRY(sl_heads_load(call, &a->key, &p->key));
    SL_TRY(sl_heads_load(call, &a->value, &p->value));
    SL_TRY(sl_heads_load(call, &a->new_key, &p->new_key));
    SL_TRY(sl_heads_load(call, &a->new_value, &p->new_value));
    SL_TRY(p->dtype == SL_BF16  ? sl_decode_chunks_bf16(call, p)
           : p->dtype == SL_F16 ? sl_decode_chunks_f16(call, p)
                                : sl_decode_chunks_f32(call, p));
    SL_TRY(sl_decode_merge(call, p));
    SL_TRY(sl_heads_store(call, &a->output, &p->output));
    return p->rows ? sl_decode_step(call, p) : SL_OK;
}

extern "C" enum sl_status sl_cuda_h2o_decode(const struct sl_h2o_decode_args *a, void *workspace,
                                             int64_t n_byte, struct sl_error *err) {
    (void)n_byte;
    struct sl_cuda_call call;
    SL_TRY(sl_cuda_begin(&call, &a->query, a->stream, err));
    struct sl_device_scratch scratch = sl_device_scratch_in(workspace);
    struct sl_decode_params p;
    fill_params(a, &scratch, &p);
    return sl_cuda_end(&call, run(&call, a, &p));
}
