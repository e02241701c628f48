#include "attention.h"

#include "pattern_check.h"

#include <math.h>
#include <stdio.h>

// Shapes as people write them: "(2, 8, 16, 64)".
static const char *shape_text(const struct sl_tensor *t, char text[160]) {
    size_t used = 0;
    used += (size_t)snprintf(text, 160, "(");
    for (int32_t i = 0; i < t->n_dim && used < 130; i++) {
        used += (size_t)snprintf(text + used, 160 - used, i ? ", %lld" : "%lld", (long long)t->shape[i]);
    }
    snprintf(text + used, 160 - used, t->n_dim == 1 ? ",)" : ")");
    return text;
}

static enum sl_status check_shape(const char *name, const struct sl_tensor *t, int32_t n_dim,
                                  const int64_t *shape, struct sl_error *err) {
    bool same = t->n_dim == n_dim;
    for (int32_t i = 0; same && i < n_dim; i++) {
        same = t->shape[i] == shape[i];
    }
    if (!same) {
        struct sl_tensor expected = {.n_dim = n_dim};
        char want[160], got[160];
        for (int32_t i = 0; i < n_dim; i++) {
            expected.shape[i] = shape[i];
        }
        return sl_error_set(err, SL_INVALID, "%s: expected shape %s, got %s", name,
                            shape_text(&expected, want), shape_text(t, got));
    }
    return SL_OK;
}

static enum sl_status check_dtype(const char *name, const struct sl_tensor *t, enum sl_dtype dtype,
                                  struct sl_error *err) {
    if (t->dtype != dtype) {
        return sl_error_set(err, SL_TYPE, "%s: expected dtype %s, got %s", name, sl_dtype_name(dtype),
                            sl_dtype_name(t->dtype));
    }
    return SL_OK;
}

// What every tensor of a call must satisfy, given the query's device. Element strides of the last dimension
// are checked for tensors of rows (last_contiguous).
static enum sl_status check_memory(const char *name, const struct sl_tensor *t, const struct sl_tensor *query,
                                   bool last_contiguous, bool written, struct sl_error *err) {
    if (t->device_type != query->device_type || t->device_id != query->device_id) {
        return sl_error_set(err, SL_INVALID, "%s: expected the query's device (%d:%d), got %d:%d", name,
                            (int)query->device_type, (int)query->device_id, (int)t->device_type,
                            (int)t->device_id);
    }
    if (sl_tensor_count(t) == 0) {
        return SL_OK;
    }
    if (!t->data) {
        return sl_error_set(err, SL_EXCHANGE, "%s: expected memory, got a NULL pointer", name);
    }
    if (written && t->read_only) {
        return sl_error_set(err, SL_EXCHANGE, "%s: expected writable memory, got read-only memory", name);
    }
    const int32_t last = t->n_dim - 1;
    if (last_contiguous && t->shape[last] > 1 && t->stride[last] != 1) {
        return sl_error_set(err, SL_INVALID, "%s: expected a contiguous last dimension, got stride %lld",
                            name, (long long)t->stride[last]);
    }
    return SL_OK;
}

static enum sl_status check_like(const char *name, const struct sl_tensor *t, const struct sl_tensor *like,
                                 bool written, struct sl_error *err) {
    SL_TRY(check_dtype(name, t, like->dtype, err));
    SL_TRY(check_shape(name, t, like->n_dim, like->shape, err));
    return check_memory(name, t, like, true, written, err);
}

static enum sl_status check_query_key_value(const struct sl_attention_args *a, struct sl_error *err) {
    const struct sl_tensor *q = &a->query, *k = &a->key;
    char got[160];
    if (!sl_dtype_is_compute(q->dtype)) {
        return sl_error_set(err, SL_TYPE, "query: expected dtype float32, bfloat16 or float16, got %s",
                            sl_dtype_name(q->dtype));
    }
    if (q->n_dim != 4) {
        return sl_error_set(err, SL_INVALID,
                            "query: expected 4 dimensions (batch, heads, tokens, head_dim), got shape %s",
                            shape_text(q, got));
    }
    SL_TRY(check_dtype("key", k, q->dtype, err));
    SL_TRY(check_dtype("value", &a->value, q->dtype, err));
    if (k->n_dim != 4) {
        return sl_error_set(
            err, SL_INVALID,
            "key: expected 4 dimensions (batch, key/value heads, tokens, head_dim), got shape %s",
            shape_text(k, got));
    }
    if (q->shape[1] < 1) {
        return sl_error_set(err, SL_INVALID, "query: expected at least one head, got shape %s",
                            shape_text(q, got));
    }
    if (k->shape[1] < 1 || q->shape[1] % k->shape[1] != 0) {
        return sl_error_set(err, SL_INVALID,
                            "key: expected a number of heads that divides the query's %lld, got %lld",
                            (long long)q->shape[1], (long long)k->shape[1]);
    }
    const int64_t like_query[4] = {q->shape[0], k->shape[1], q->shape[2], q->shape[3]};
    SL_TRY(check_shape("key", k, 4, like_query, err));
    SL_TRY(check_shape("value", &a->value, 4, k->shape, err));
    if (q->shape[3] < 8 || q->shape[3] > SL_MAX_HEAD_DIM || q->shape[3] % 8 != 0) {
        return sl_error_set(err, SL_UNSUPPORTED,
                            "query: head_dim must be a multiple of 8 from 8 to %d, got %lld", SL_MAX_HEAD_DIM,
                            (long long)q->shape[3]);
    }
    if (q->device_type != SL_DEVICE_CPU) {
        return sl_error_set(err, SL_UNSUPPORTED,
                            "query: this build computes on CPU memory only, got DLPack device type %d",
                            (int)q->device_type);
    }
    SL_TRY(check_memory("query", q, q, true, false, err));
    SL_TRY(check_memory("key", k, q, true, false, err));
    return check_memory("value", &a->value, q, true, false, err);
}

static enum sl_status check_cu_seqlens(const struct sl_attention_args *a, struct sl_error *err) {
    const struct sl_tensor *t = &a->cu_seqlens;
    char got[160];
    SL_TRY(check_dtype("cu_seqlens", t, SL_I32, err));
    if (t->n_dim != 1 || t->shape[0] < 2) {
        return sl_error_set(err, SL_INVALID,
                            "cu_seqlens: expected one dimension of at least 2 elements, got shape %s",
                            shape_text(t, got));
    }
    if (a->query.shape[0] != 1) {
        return sl_error_set(err, SL_INVALID,
                            "cu_seqlens: expected a batch of 1 packed row, got a batch of %lld",
                            (long long)a->query.shape[0]);
    }
    SL_TRY(check_memory("cu_seqlens", t, &a->query, true, false, err));
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
    if (starts[n - 1] != a->query.shape[2]) {
        return sl_error_set(err, SL_INVALID,
                            "cu_seqlens: expected to end with the number of tokens %lld, got %d",
                            (long long)a->query.shape[2], (int)starts[n - 1]);
    }
    return SL_OK;
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
    if (sl_tensor_given(&a->cu_seqlens)) {
        return check_cu_seqlens(a, err);
    }
    const int64_t n_batch = a->query.shape[0];
    int64_t shape[2] = {n_batch, a->query.shape[2]};
    if (sl_tensor_given(&a->padding_mask)) {
        SL_TRY(check_dtype("padding_mask", &a->padding_mask, SL_BOOL, err));
        SL_TRY(check_shape("padding_mask", &a->padding_mask, 2, shape, err));
        return check_memory("padding_mask", &a->padding_mask, &a->query, false, false, err);
    }
    if (sl_tensor_given(&a->position_ids)) {
        if (a->position_ids.n_dim == 2 && a->position_ids.shape[0] == 1) {
            shape[0] = 1;
        }
        SL_TRY(check_dtype("position_ids", &a->position_ids, SL_I64, err));
        SL_TRY(check_shape("position_ids", &a->position_ids, 2, shape, err));
        return check_memory("position_ids", &a->position_ids, &a->query, false, false, err);
    }
    return SL_OK;
}

static enum sl_status check_settings(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(sl_pattern_check(&a->pattern, err));
    if (!isfinite(a->scale) || !isfinite((float)a->scale)) {
        return sl_error_set(err, SL_INVALID, "scale: expected a finite float32 number, got %g", a->scale);
    }
    return SL_OK;
}

static enum sl_status check_lse(const struct sl_attention_args *a, bool written, struct sl_error *err) {
    SL_TRY(check_dtype("lse", &a->lse, SL_F32, err));
    SL_TRY(check_shape("lse", &a->lse, 3, a->query.shape, err));
    SL_TRY(check_memory("lse", &a->lse, &a->query, true, written, err));
    const int64_t dense[3] = {a->lse.shape[1] * a->lse.shape[2], a->lse.shape[2], 1};
    for (int32_t i = 0; i < 3; i++) {
        if (a->lse.shape[i] > 1 && sl_tensor_count(&a->lse) > 0 && a->lse.stride[i] != dense[i]) {
            return sl_error_set(err, SL_INVALID,
                                "lse: expected contiguous memory, got stride %lld in dimension %d",
                                (long long)a->lse.stride[i], (int)i);
        }
    }
    return SL_OK;
}

enum sl_status sl_attention_forward_check(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(check_settings(a, err));
    SL_TRY(check_query_key_value(a, err));
    SL_TRY(check_sequences(a, err));
    SL_TRY(check_like("output", &a->output, &a->query, true, err));
    return check_lse(a, true, err);
}

enum sl_status sl_attention_backward_check(const struct sl_attention_args *a, struct sl_error *err) {
    SL_TRY(check_settings(a, err));
    SL_TRY(check_query_key_value(a, err));
    SL_TRY(check_sequences(a, err));
    SL_TRY(check_like("output", &a->output, &a->query, false, err));
    SL_TRY(check_lse(a, false, err));
    SL_TRY(check_like("grad_output", &a->grad_output, &a->query, false, err));
    SL_TRY(check_like("grad_query", &a->grad_query, &a->query, true, err));
    SL_TRY(check_like("grad_key", &a->grad_key, &a->key, true, err));
    return check_like("grad_value", &a->grad_value, &a->value, true, err);
}

// No batch rows or no tokens: nothing to compute, and the other sizes may be anything, so that sizing scratch
// memory by them would ask for terabytes or overflow.
static bool is_empty(const struct sl_attention_args *args) {
    return sl_tensor_count(&args->query) == 0;
}

// One device so far: the check refuses every other.
int64_t sl_attention_forward_workspace(const struct sl_attention_args *args, int n_thread) {
    return is_empty(args) ? 0 : sl_cpu_attention_forward_workspace(args, n_thread);
}

int64_t sl_attention_backward_workspace(const struct sl_attention_args *args, int n_thread) {
    return is_empty(args) ? 0 : sl_cpu_attention_backward_workspace(args, n_thread);
}

enum sl_status sl_attention_forward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                    int n_thread, struct sl_error *err) {
    return is_empty(args) ? SL_OK : sl_cpu_attention_forward(args, workspace, n_byte, n_thread, err);
}

enum sl_status sl_attention_backward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                     int n_thread, struct sl_error *err) {
    return is_empty(args) ? SL_OK : sl_cpu_attention_backward(args, workspace, n_byte, n_thread, err);
}
