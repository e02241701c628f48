#include "h2o.h"

#include "check.h"
#include "device.h"
#include "h2o_check.h"

static enum sl_status check_attention(const struct sl_h2o_decode_args *a, struct sl_error *err) {
    SL_TRY(sl_check_query_key(&a->query, &a->key, err));
    const int64_t *q = a->query.shape, *k = a->key.shape;
    if (q[2] < 1 || q[2] > SL_MAX_DECODE_QUERIES) {
        return sl_error_set(err, SL_INVALID, "query: expected 1 to %d tokens, got %lld",
                            SL_MAX_DECODE_QUERIES, (long long)q[2]);
    }
    if (k[2] < q[2] || k[2] > INT32_MAX) {
        return sl_error_set(err, SL_INVALID,
                            "key: expected from the query's %lld to 2^31 - 1 tokens, got %lld",
                            (long long)q[2], (long long)k[2]);
    }
    SL_TRY(sl_check_like("value", &a->value, &a->key, false, err));
    SL_TRY(sl_check_like("output", &a->output, &a->query, true, err));
    if (sl_tensor_given(&a->lse)) {
        SL_TRY(sl_check_array("lse", &a->lse, SL_F32, 3, q, &a->query, true, err));
    }
    if (sl_tensor_given(&a->padding_mask)) {
        SL_TRY(sl_check_mask("padding_mask", &a->padding_mask, k[0], k[2], &a->query, err));
    }
    if (sl_tensor_given(&a->scores)) {
        SL_TRY(sl_check_array("scores", &a->scores, SL_F32, 3, k, &a->query, true, err));
    }
    return SL_OK;
}

// A step of a cache takes all of its arguments or none.
static enum sl_status check_step_given(const struct sl_h2o_decode_args *a, bool *step, struct sl_error *err) {
    const struct {
        const char *name;
        const struct sl_tensor *tensor;
    } needed[] = {{"new_key", &a->new_key},     {"new_value", &a->new_value}, {"positions", &a->positions},
                  {"free_slot", &a->free_slot}, {"rows", &a->rows},           {"scores", &a->scores}};
    const int n = sizeof needed / sizeof *needed;
    const char *given = sl_tensor_given(&a->new_mask) ? "new_mask" : NULL;
    for (int i = 0; i < n - 1; i++) { // scores are for every use
        given = sl_tensor_given(needed[i].tensor) ? needed[i].name : given;
    }
    *step = given != NULL;
    for (int i = 0; given && i < n; i++) {
        if (!sl_tensor_given(needed[i].tensor)) {
            return sl_error_set(err, SL_INVALID, "%s: expected an array, as %s is given, got none",
                                needed[i].name, given);
        }
    }
    return SL_OK;
}

static enum sl_status check_step(const struct sl_h2o_decode_args *a, struct sl_error *err) {
    const int64_t *q = a->query.shape, *k = a->key.shape;
    const int64_t new_shape[4] = {k[0], k[1], 1, k[3]};
    if (q[2] != 1) {
        return sl_error_set(err, SL_INVALID, "query: expected one token, as new_key is given, got %lld",
                            (long long)q[2]);
    }
    if (sl_tensor_given(&a->padding_mask)) {
        return sl_error_set(err, SL_INVALID,
                            "padding_mask: expected none, as rows says which slots are used, got an array");
    }
    SL_TRY(sl_check_memory("key", &a->key, &a->query, true, true, err));
    SL_TRY(sl_check_memory("value", &a->value, &a->query, true, true, err));
    SL_TRY(sl_check_dtype("new_key", &a->new_key, a->key.dtype, err));
    SL_TRY(sl_check_shape("new_key", &a->new_key, 4, new_shape, err));
    SL_TRY(sl_check_memory("new_key", &a->new_key, &a->query, true, false, err));
    SL_TRY(sl_check_like("new_value", &a->new_value, &a->new_key, false, err));
    if (sl_tensor_given(&a->new_mask)) {
        SL_TRY(sl_check_mask("new_mask", &a->new_mask, k[0], 1, &a->query, err));
    }
    SL_TRY(sl_check_array("positions", &a->positions, SL_I32, 3, k, &a->query, true, err));
    SL_TRY(sl_check_array("free_slot", &a->free_slot, SL_I32, 2, k, &a->query, true, err));
    return sl_check_rows(&a->rows, &a->query, err);
}

enum sl_status sl_h2o_decode_check(const struct sl_h2o_decode_args *a, struct sl_error *err) {
    bool step;
    SL_TRY(check_attention(a, err));
    SL_TRY(check_step_given(a, &step, err));
    if (step) {
        SL_TRY(check_step(a, err));
    }
    if (a->window < 0) {
        return sl_error_set(err, SL_INVALID, "window: expected at least 0, got %lld", (long long)a->window);
    }
    SL_TRY(sl_check_sinks(a->n_sink, err));
    return sl_check_scale(a->scale, err);
}

int64_t sl_h2o_decode_workspace(const struct sl_h2o_decode_args *args, int n_thread) {
    return sl_tensor_count(&args->query) == 0 ? 0
                                              : SL_BY_DEVICE(&args->query, sl_cuda_h2o_decode_workspace(args),
                                                             sl_cpu_h2o_decode_workspace(args, n_thread));
}

enum sl_status sl_h2o_decode(const struct sl_h2o_decode_args *args, void *workspace, int64_t n_byte,
                             int n_thread, struct sl_error *err) {
    return sl_tensor_count(&args->query) == 0
               ? SL_OK
               : SL_BY_DEVICE(&args->query, sl_cuda_h2o_decode(args, workspace, n_byte, err),
                              sl_cpu_h2o_decode(args, workspace, n_byte, n_thread, err));
}
