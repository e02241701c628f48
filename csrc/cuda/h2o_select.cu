// Select on CUDA: one kernel chooses, one moves.
#include "select/params.cuh"

enum {
    SLICE_BYTES = 128, // of a row that a block moves
    SPLIT_ROWS = 512,  // and rows, where it need not be in place
};

static bool in_place(const struct sl_h2o_select_args *a) {
    return a->key.data == a->key_out.data || a->value.data == a->value_out.data;
}

static int word_bytes(const struct sl_h2o_select_args *a) {
    const int64_t size = sl_dtype_size(a->key.dtype);
    const bool wide = sl_heads_aligned(&a->key) && sl_heads_aligned(&a->value) &&
                      sl_heads_aligned(&a->key_out) && sl_heads_aligned(&a->value_out) &&
                      a->key.shape[3] * size % 16 == 0;
    return wide ? 16 : (int)size;
}

static struct sl_heads words_of(const struct sl_tensor *t, int bytes) {
    const int64_t per = bytes / sl_dtype_size(t->dtype);
    const struct sl_heads heads = {(char *)t->data, t->stride[0] / per, t->stride[1] / per,
                                   t->stride[2] / per};
    return heads;
}

static void fill_params(const struct sl_h2o_select_args *a, struct sl_device_scratch *scratch,
                        struct sl_select_params *p) {
    const int64_t *k = a->key.shape, heads = k[0] * k[1];
    const int bytes = word_bytes(a);
    p->scores = (const float *)a->scores.data;
    p->positions = (const int32_t *)a->positions.data;
    p->scores_out = (float *)a->scores_out.data;
    p->positions_out = (int32_t *)a->positions_out.data;
    p->rows = (int32_t *)a->rows.data;
    p->n_sink = a->n_sink;
    p->n_batch = (int32_t)k[0];
    p->n_head_kv = (int32_t)k[1];
    p->n_key = (int32_t)k[2];
    p->n_slot = (int32_t)sl_min(a->key_out.shape[2], INT32_MAX);
    p->n_quad = (int32_t)sl_ceil_div(k[2], 4);
    p->n_list = (int32_t)sl_min(k[2], a->key_out.shape[2]);
    p->from[0] = words_of(&a->key, bytes);
    p->from[1] = words_of(&a->value, bytes);
    p->to[0] = words_of(&a->key_out, bytes);
    p->to[1] = words_of(&a->value_out, bytes);
    p->n_word = (int32_t)(k[3] * sl_dtype_size(a->key.dtype) / bytes);
    p->n_lane = 1;
    while (p->n_lane * 2 <= p->n_word && p->n_lane * 2 * bytes <= SLICE_BYTES) {
        p->n_lane *= 2;
    }
    p->n_slice = (int32_t)sl_max(1, sl_ceil_div(p->n_word, p->n_lane));
    p->n_rows = in_place(a) ? p->n_list : SPLIT_ROWS;
    p->n_split = in_place(a) ? 1 : (int32_t)sl_max(1, sl_ceil_div(p->n_list, SPLIT_ROWS));
    p->keys = (uint32_t *)sl_device_take(scratch, heads * p->n_quad * 16);
    p->list = (int32_t *)sl_device_take(scratch, heads * p->n_list * 4);
    p->n_kept = (int32_t *)sl_device_take(scratch, heads * 4);
}

extern "C" int64_t sl_cuda_h2o_select_workspace(const struct sl_h2o_select_args *a) {
    struct sl_device_scratch scratch = sl_device_scratch_in(NULL);
    struct sl_select_params p;
    fill_params(a, &scratch, &p);
    return scratch.used + 256;
}

extern "C" enum sl_status sl_cuda_h2o_select(const struct sl_h2o_select_args *a, void *workspace,
                                             int64_t n_byte, struct sl_error *err) {
    (void)n_byte;
    struct sl_cuda_call call;
    SL_TRY(sl_cuda_begin(&call, &a->key, a->stream, err));
    struct sl_device_scratch scratch = sl_device_scratch_in(workspace);
    struct sl_select_params p;
    fill_params(a, &scratch, &p);
    enum sl_status status = sl_select_choose(&call, &p);
    status = status == SL_OK ? sl_select_move(&call, &p, word_bytes(a)) : status;
    return sl_cuda_end(&call, status);
}
