#include "attention.h"

#include "check.h"
#include "device.h"
#include "pattern_check.h"

#include <math.h>

static enum sl_status check_query_key(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(sl_check_query_key(&a->query, &a->key, err));
    const int64_t *q = a->query.shape, *k = a->key.shape;
    if (a->n_past < 0) {
        return sl_error_set(err, SL_INVALID, "key: expected at least the query's %lld tokens, got %lld",
                            (long long)q[2], (long long)k[2]);
    }
    const int64_t with_past[4] = {q[0], k[1], a->n_past + q[2], q[3]};
    return sl_check_shape("key", &a->key, 4, with_past, err);
}

static enum sl_status check_cu_seqlens_shape(const struct sl_tensor *t, struct sl_error *err) {
    char got[SL_SHAPE_TEXT];
    SL_TRY(sl_check_dtype("cu_seqlens", t, SL_I32, err));
    if (t->n_dim != 1 || t->shape[0] < 2) {
        return sl_error_set(err, SL_INVALID,
                            "cu_seqlens: expected one dimension of at least 2 elements, got shape %s",
                            sl_shape_text(t, got));
    }
    return SL_OK;
}

enum sl_status sl_cu_seqlens_check(const struct sl_tensor *t, int64_t n_token, struct sl_error *err) {
    SL_TRY(check_cu_seqlens_shape(t, err));
    SL_TRY(sl_check_memory("cu_seqlens", t, t, true, false, err));
    if (t->device_type != SL_DEVICE_CPU) {
        return SL_OK; // reading values would wait for the device; its kernels clamp them
    }
    const int32_t *starts = t->data;
    const int64_t n = t->shape[0];
    if (starts[0] != 0) {
        return sl_error_set(err, SL_INVALID, "cu_seqlens: expected to start with 0, got %d", (int)starts[0]);
    }
    for (int64_t i = 1; i < n; i++) {
        if (starts[i] < starts[i - 1]) {
            return sl_error_set(err, SL_INVALID,
                                "cu_seqlens: expected non-decreasing values, got %d after %d at %lld",
                                (int)starts[i], (int)starts[i - 1], (long long)i);
        }
    }
    if (starts[n - 1] != n_token) {
        return sl_error_set(err, SL_INVALID,
                            "cu_seqlens: expected to end with the number of tokens %lld, got %d",
                            (long long)n_token, (int)starts[n - 1]);
    }
    return SL_OK;
}

static enum sl_status check_cu_seqlens(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(check_cu_seqlens_shape(&a->cu_seqlens, err));
    if (a->query.shape[0] != 1) {
        return sl_error_set(err, SL_INVALID,
                            "cu_seqlens: expected a batch of 1 packed row, got a batch of %lld",
                            (long long)a->query.shape[0]);
    }
    SL_TRY(sl_check_memory("cu_seqlens", &a->cu_seqlens, &a->query, true, false, err));
    return sl_cu_seqlens_check(&a->cu_seqlens, a->query.shape[2], err);
}

static enum sl_status check_sequences(const struct sl_attention_args *a, struct sl_error *err) {
    const int given = sl_tensor_given(&a->cu_seqlens) + sl_tensor_given(&a->padding_mask) +
                      sl_tensor_given(&a->position_ids);
    if (given > 1) {
        return sl_error_set(
            err, SL_INVALID,
            "%s: expected at most one of cu_seqlens, padding_mask and position_ids, got %d of them",
            sl_tensor_given(&a->cu_seqlens) ? "cu_seqlens" : "padding_mask", given);
    }
    if (a->n_past > 0 && (sl_tensor_given(&a->cu_seqlens) || sl_tensor_given(&a->position_ids))) {
        return sl_error_set(err, SL_INVALID, "%s: expected as many queries as keys, got %lld and %lld",
                            sl_tensor_given(&a->cu_seqlens) ? "cu_seqlens" : "position_ids",
                            (long long)a->query.shape[2], (long long)a->key.shape[2]);
    }
    if (sl_tensor_given(&a->cu_seqlens)) {
        return check_cu_seqlens(a, err);
    }
    int64_t shape[2] = {a->query.shape[0], a->key.shape[2]};
    if (sl_tensor_given(&a->padding_mask)) {
        return sl_check_mask("padding_mask", &a->padding_mask, shape[0], shape[1], &a->query, err);
    }
    if (sl_tensor_given(&a->position_ids)) {
        if (a->position_ids.n_dim == 2 && a->position_ids.shape[0] == 1) {
            shape[0] = 1;
        }
        SL_TRY(sl_check_dtype("position_ids", &a->position_ids, SL_I64, err));
        SL_TRY(sl_check_shape("position_ids", &a->position_ids, 2, shape, err));
        return sl_check_memory("position_ids", &a->position_ids, &a->query, false, false, err);
    }
    return SL_OK;
}

static enum sl_status check_settings(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(sl_pattern_check(&a->pattern, err));
    return sl_check_scale(a->scale, err);
}

static enum sl_status check_lse(const struct sl_attention_args *a, bool written, struct sl_error *err) {
    return sl_check_array("lse", &a->lse, SL_F32, 3, a->query.shape, &a->query, written, err);
}

enum sl_status sl_attention_forward_check(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(check_settings(a, err));
    SL_TRY(check_query_key(a, err));
    if (sl_tensor_given(&a->value) != sl_tensor_given(&a->output)) {
        const bool value = sl_tensor_given(&a->value);
        return sl_error_set(err, SL_INVALID, "%s: expected an array, as %s is given, got none",
                            value ? "output" : "value", value ? "value" : "output");
    }
    if (sl_tensor_given(&a->value)) {
        SL_TRY(sl_check_like("value", &a->value, &a->key, false, err));
    }
    SL_TRY(check_sequences(a, err));
    if (sl_tensor_given(&a->output)) {
        SL_TRY(sl_check_like("output", &a->output, &a->query, true, err));
    }
    return check_lse(a, true, err);
}

enum sl_status sl_attention_backward_check(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(check_settings(a, err));
    SL_TRY(check_query_key(a, err));
    if (a->n_past > 0) {
        return sl_error_set(err, SL_INVALID, "key: expected the query's %lld tokens, got %lld",
                            (long long)a->query.shape[2], (long long)a->key.shape[2]);
    }
    SL_TRY(sl_check_like("value", &a->value, &a->key, false, err));
    SL_TRY(check_sequences(a, err));
    SL_TRY(sl_check_like("output", &a->output, &a->query, false, err));
    SL_TRY(check_lse(a, false, err));
    SL_TRY(sl_check_like("grad_output", &a->grad_output, &a->query, false, err));
    SL_TRY(sl_check_like("grad_query", &a->grad_query, &a->query, true, err));
    SL_TRY(sl_check_like("grad_key", &a->grad_key, &a->key, true, err));
    return sl_check_like("grad_value", &a->grad_value, &a->value, true, err);
}

// No batch rows or no tokens: nothing to compute, and the other sizes may be anything, so that sizing scratch
// memory by them would ask for terabytes or overflow.
static bool is_empty(const struct sl_attention_args *args) {
    return sl_tensor_count(&args->query) == 0;
}

int64_t sl_attention_forward_workspace(const struct sl_attention_args *args, int n_thread) {
    return is_empty(args) ? 0
                          : SL_BY_DEVICE(&args->query, sl_cuda_attention_forward_workspace(args),
                                         sl_cpu_attention_forward_workspace(args, n_thread));
}

int64_t sl_attention_backward_workspace(const struct sl_attention_args *args, int n_thread) {
    return is_empty(args) ? 0
                          : SL_BY_DEVICE(&args->query, sl_cuda_attention_backward_workspace(args),
                                         sl_cpu_attention_backward_workspace(args, n_thread));
}

enum sl_status sl_attention_forward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                    int n_thread, struct sl_error *err) {
    return is_empty(args)
               ? SL_OK
               : SL_BY_DEVICE(&args->query, sl_cuda_attention_forward(args, workspace, n_byte, err),
                              sl_cpu_attention_forward(args, workspace, n_byte, n_thread, err));
}

enum sl_status sl_attention_backward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                     int n_thread, struct sl_error *err) {
    return is_empty(args)
               ? SL_OK
               : SL_BY_DEVICE(&args->query, sl_cuda_attention_backward(args, workspace, n_byte, err),
                              sl_cpu_attention_backward(args, workspace, n_byte, n_thread, err));
}
