#include "h2o.h"

#include "check.h"
#include "device.h"
#include "h2o_check.h"
#include "pattern.h"

static enum sl_status check_key(const struct sl_tensor *key, struct sl_error *err) {
    char got[SL_SHAPE_TEXT];
    if (!sl_dtype_is_compute(key->dtype)) {
        return sl_error_set(err, SL_TYPE, "key: expected dtype float32, bfloat16 or float16, got %s",
                            sl_dtype_name(key->dtype));
    }
    if (key->n_dim != 4) {
        return sl_error_set(
            err, SL_INVALID,
            "key: expected 4 dimensions (batch, key/value heads, slots, head_dim), got shape %s",
            sl_shape_text(key, got));
    }
    if (key->shape[2] > INT32_MAX) {
        return sl_error_set(err, SL_INVALID, "key: expected fewer than 2^31 slots, got %lld",
                            (long long)key->shape[2]);
    }
    SL_TRY(sl_check_device("key", key, err));
    return sl_check_memory("key", key, key, true, false, err);
}

// In place means exactly in place: with other strides one head's rows would fall on another's.
static enum sl_status check_alias(const char *name, const struct sl_tensor *out, const struct sl_tensor *in,
                                  struct sl_error *err) {
    for (int32_t i = 0; i < in->n_dim - 1 && out->data == in->data && sl_tensor_count(out) > 0; i++) {
        if (in->shape[i] > 1 && out->shape[i] > 1 && out->stride[i] != in->stride[i]) {
            return sl_error_set(err, SL_INVALID,
                                "%s: expected the input's strides, as it is the input's memory, got stride "
                                "%lld for %lld in dimension %d",
                                name, (long long)out->stride[i], (long long)in->stride[i], (int)i);
        }
    }
    return SL_OK;
}

static enum sl_status check_outputs(const struct sl_h2o_select_args *a, struct sl_error *err) {
    const int64_t *k = a->key.shape;
    char got[SL_SHAPE_TEXT];
    if (a->key_out.n_dim != 4) {
        return sl_error_set(err, SL_INVALID, "key_out: expected 4 dimensions, got shape %s",
                            sl_shape_text(&a->key_out, got));
    }
    const int64_t shape[4] = {k[0], k[1], a->key_out.shape[2], k[3]};
    SL_TRY(sl_check_dtype("key_out", &a->key_out, a->key.dtype, err));
    SL_TRY(sl_check_shape("key_out", &a->key_out, 4, shape, err));
    SL_TRY(sl_check_memory("key_out", &a->key_out, &a->key, true, true, err));
    SL_TRY(sl_check_like("value_out", &a->value_out, &a->key_out, true, err));
    SL_TRY(sl_check_array("scores_out", &a->scores_out, SL_F32, 3, shape, &a->key, true, err));
    SL_TRY(sl_check_array("positions_out", &a->positions_out, SL_I32, 3, shape, &a->key, true, err));
    SL_TRY(check_alias("key_out", &a->key_out, &a->key, err));
    SL_TRY(check_alias("value_out", &a->value_out, &a->value, err));
    SL_TRY(check_alias("scores_out", &a->scores_out, &a->scores, err));
    return check_alias("positions_out", &a->positions_out, &a->positions, err);
}

// What is kept must fit: the one check that reads values, and so is made on the CPU only.
static enum sl_status check_capacity(const struct sl_h2o_select_args *a, struct sl_error *err) {
    const int64_t n_head = a->key.shape[0] * a->key.shape[1], n_key = a->key.shape[2];
    const int64_t n_slot = a->key_out.shape[2];
    for (int64_t head = 0; head < n_head; head++) {
        const int64_t b = head / a->key.shape[1];
        const int32_t budget = ((const int32_t *)a->rows.data)[b * SL_ROW_FIELDS + SL_ROW_BUDGET];
        const int32_t *positions = (const int32_t *)a->positions.data + head * n_key;
        int64_t used = 0;
        for (int64_t k = 0; k < n_key && budget > n_slot; k++) {
            used += positions[k] >= 0;
        }
        if (sl_min(used, budget) > n_slot) {
            return sl_error_set(err, SL_INVALID, "key_out: expected at least %lld slots, got %lld",
                                (long long)sl_min(used, budget), (long long)n_slot);
        }
    }
    return SL_OK;
}

enum sl_status sl_h2o_select_check(const struct sl_h2o_select_args *a, struct sl_error *err) {
    SL_TRY(check_key(&a->key, err));
    SL_TRY(sl_check_like("value", &a->value, &a->key, false, err));
    SL_TRY(sl_check_array("scores", &a->scores, SL_F32, 3, a->key.shape, &a->key, false, err));
    SL_TRY(sl_check_array("positions", &a->positions, SL_I32, 3, a->key.shape, &a->key, false, err));
    SL_TRY(sl_check_rows(&a->rows, &a->key, err));
    SL_TRY(check_outputs(a, err));
    SL_TRY(sl_check_sinks(a->n_sink, err));
    return a->key.device_type == SL_DEVICE_CPU ? check_capacity(a, err) : SL_OK;
}

// Without slots there is still USED to write.
static bool is_empty(const struct sl_h2o_select_args *args) {
    return args->key.shape[0] == 0 || args->key.shape[1] == 0;
}

int64_t sl_h2o_select_workspace(const struct sl_h2o_select_args *args, int n_thread) {
    return is_empty(args) ? 0
                          : SL_BY_DEVICE(&args->key, sl_cuda_h2o_select_workspace(args),
                                         sl_cpu_h2o_select_workspace(args, n_thread));
}

enum sl_status sl_h2o_select(const struct sl_h2o_select_args *args, void *workspace, int64_t n_byte,
                             int n_thread, struct sl_error *err) {
    return is_empty(args) ? SL_OK
                          : SL_BY_DEVICE(&args->key, sl_cuda_h2o_select(args, workspace, n_byte, err),
                                         sl_cpu_h2o_select(args, workspace, n_byte, n_thread, err));
}
