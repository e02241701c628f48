#include "check.h"

#include <math.h>
#include <stdio.h>

const char *sl_shape_text(const struct sl_tensor *t, char text[SL_SHAPE_TEXT]) {
    size_t used = 0;
    used += (size_t)snprintf(text, SL_SHAPE_TEXT, "(");
    for (int32_t i = 0; i < t->n_dim && used < SL_SHAPE_TEXT - 30; i++) {
        used += (size_t)snprintf(text + used, SL_SHAPE_TEXT - used, i ? ", %lld" : "%lld",
                                 (long long)t->shape[i]);
    }
    snprintf(text + used, SL_SHAPE_TEXT - used, t->n_dim == 1 ? ",)" : ")");
    return text;
}

enum sl_status sl_check_shape(const char *name, const struct sl_tensor *t, int32_t n_dim,
                              const int64_t *shape, struct sl_error *err) {
    bool same = t->n_dim == n_dim;
    for (int32_t i = 0; same && i < n_dim; i++) {
        same = t->shape[i] == shape[i];
    }
    if (!same) {
        struct sl_tensor expected = {.n_dim = n_dim};
        char want[SL_SHAPE_TEXT], got[SL_SHAPE_TEXT];
        for (int32_t i = 0; i < n_dim; i++) {
            expected.shape[i] = shape[i];
        }
        return sl_error_set(err, SL_INVALID, "%s: expected shape %s, got %s", name,
                            sl_shape_text(&expected, want), sl_shape_text(t, got));
    }
    return SL_OK;
}

enum sl_status sl_check_dtype(const char *name, const struct sl_tensor *t, enum sl_dtype dtype,
                              struct sl_error *err) {
    if (t->dtype != dtype) {
        return sl_error_set(err, SL_TYPE, "%s: expected dtype %s, got %s", name, sl_dtype_name(dtype),
                            sl_dtype_name(t->dtype));
    }
    return SL_OK;
}

enum sl_status sl_check_device(const char *name, const struct sl_tensor *t, struct sl_error *err) {
    if (t->device_type == SL_DEVICE_CPU) {
        return SL_OK;
    }
#ifdef SL_WITH_CUDA
    if (t->device_type == SL_DEVICE_CUDA) {
        for (int32_t i = 0; i < t->n_dim; i++) {
            if (t->shape[i] > INT32_MAX / 2) {
                return sl_error_set(err, SL_UNSUPPORTED, "%s: expected sizes below 2^30 on CUDA, got %lld",
                                    name, (long long)t->shape[i]);
            }
        }
        return SL_OK;
    }
    const char *devices = "CPU and CUDA memory";
#else
    const char *devices = "CPU memory";
#endif
    return sl_error_set(err, SL_UNSUPPORTED, "%s: this build computes on %s only, got DLPack device type %d",
                        name, devices, (int)t->device_type);
}

enum sl_status sl_check_memory(const char *name, const struct sl_tensor *t, const struct sl_tensor *query,
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

enum sl_status sl_check_like(const char *name, const struct sl_tensor *t, const struct sl_tensor *like,
                             bool written, struct sl_error *err) {
    SL_TRY(sl_check_dtype(name, t, like->dtype, err));
    SL_TRY(sl_check_shape(name, t, like->n_dim, like->shape, err));
    return sl_check_memory(name, t, like, true, written, err);
}

enum sl_status sl_check_dense(const char *name, const struct sl_tensor *t, const struct sl_tensor *query,
                              bool written, struct sl_error *err) {
    SL_TRY(sl_check_memory(name, t, query, true, written, err));
    int64_t dense = 1;
    for (int32_t i = t->n_dim - 1; i >= 0; i--) {
        if (t->shape[i] > 1 && sl_tensor_count(t) > 0 && t->stride[i] != dense) {
            return sl_error_set(err, SL_INVALID,
                                "%s: expected contiguous memory, got stride %lld in dimension %d", name,
                                (long long)t->stride[i], (int)i);
        }
        dense *= t->shape[i];
    }
    return SL_OK;
}

enum sl_status sl_check_array(const char *name, const struct sl_tensor *t, enum sl_dtype dtype, int32_t n_dim,
                              const int64_t *shape, const struct sl_tensor *query, bool written,
                              struct sl_error *err) {
    SL_TRY(sl_check_dtype(name, t, dtype, err));
    SL_TRY(sl_check_shape(name, t, n_dim, shape, err));
    return sl_check_dense(name, t, query, written, err);
}

enum sl_status sl_check_mask(const char *name, const struct sl_tensor *t, int64_t n_batch, int64_t n_token,
                             const struct sl_tensor *query, struct sl_error *err) {
    const int64_t shape[2] = {n_batch, n_token};
    SL_TRY(sl_check_dtype(name, t, SL_BOOL, err));
    SL_TRY(sl_check_shape(name, t, 2, shape, err));
    return sl_check_memory(name, t, query, false, false, err);
}

enum sl_status sl_check_scale(double scale, struct sl_error *err) {
    if (!isfinite(scale) || !isfinite((float)scale)) {
        return sl_error_set(err, SL_INVALID, "scale: expected a finite float32 number, got %g", scale);
    }
    return SL_OK;
}

enum sl_status sl_check_query_key(const struct sl_tensor *query, const struct sl_tensor *key,
                                  struct sl_error *err) {
    const struct sl_tensor *q = query, *k = key;
    char got[SL_SHAPE_TEXT];
    if (!sl_dtype_is_compute(q->dtype)) {
        return sl_error_set(err, SL_TYPE, "query: expected dtype float32, bfloat16 or float16, got %s",
                            sl_dtype_name(q->dtype));
    }
    if (q->n_dim != 4) {
        return sl_error_set(err, SL_INVALID,
                            "query: expected 4 dimensions (batch, heads, tokens, head_dim), got shape %s",
                            sl_shape_text(q, got));
    }
    SL_TRY(sl_check_dtype("key", k, q->dtype, err));
    if (k->n_dim != 4) {
        return sl_error_set(
            err, SL_INVALID,
            "key: expected 4 dimensions (batch, key/value heads, tokens, head_dim), got shape %s",
            sl_shape_text(k, got));
    }
    if (q->shape[1] < 1) {
        return sl_error_set(err, SL_INVALID, "query: expected at least one head, got shape %s",
                            sl_shape_text(q, got));
    }
    if (k->shape[1] < 1 || q->shape[1] % k->shape[1] != 0) {
        return sl_error_set(err, SL_INVALID,
                            "key: expected a number of heads that divides the query's %lld, got %lld",
                            (long long)q->shape[1], (long long)k->shape[1]);
    }
    const int64_t like_query[4] = {q->shape[0], k->shape[1], k->shape[2], q->shape[3]};
    SL_TRY(sl_check_shape("key", k, 4, like_query, err));
    if (q->shape[3] < 8 || q->shape[3] > SL_MAX_HEAD_DIM || q->shape[3] % 8 != 0) {
        return sl_error_set(err, SL_UNSUPPORTED,
                            "query: head_dim must be a multiple of 8 from 8 to %d, got %lld", SL_MAX_HEAD_DIM,
                            (long long)q->shape[3]);
    }
    SL_TRY(sl_check_device("query", q, err));
    SL_TRY(sl_check_device("key", k, err));
    SL_TRY(sl_check_memory("query", q, q, true, false, err));
    return sl_check_memory("key", k, q, true, false, err);
}
