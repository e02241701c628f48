#include "h2o.h"

#include "device.h"

static enum sl_status check_sizes(const struct sl_h2o_score_args *a, struct sl_error *err) {
    const int64_t *q = a->query.shape, *k = a->key.shape;
    if (k[2] < q[2]) {
        return sl_error_set(err, SL_INVALID, "key: expected at least the query's %lld tokens, got %lld",
                            (long long)q[2], (long long)k[2]);
    }
    SL_TRY(sl_check_array("lse", &a->lse, SL_F32, 3, q, &a->query, false, err));
    SL_TRY(sl_check_array("scores", &a->scores, SL_F32, 3, k, &a->query, true, err));
    return sl_tensor_given(&a->padding_mask)
               ? sl_check_mask("padding_mask", &a->padding_mask, q[0], k[2], &a->query, err)
               : SL_OK;
}

enum sl_status sl_h2o_score_check(const struct sl_h2o_score_args *a, struct sl_error *err) {
    SL_TRY(sl_check_scale(a->scale, err));
    if (a->window < 0) {
        return sl_error_set(err, SL_INVALID, "window: expected an integer >= 0, got %lld",
                            (long long)a->window);
    }
    SL_TRY(sl_check_query_key(&a->query, &a->key, err));
    return check_sizes(a, err);
}

// Without batch rows there is nothing to write, and the other sizes may be anything.
int64_t sl_h2o_score_workspace(const struct sl_h2o_score_args *args, int n_thread) {
    return sl_tensor_count(&args->query) == 0 ? 0
                                              : SL_BY_DEVICE(&args->query, sl_cuda_h2o_score_workspace(args),
                                                             sl_cpu_h2o_score_workspace(args, n_thread));
}

enum sl_status sl_h2o_score(const struct sl_h2o_score_args *args, void *workspace, int64_t n_byte,
                            int n_thread, struct sl_error *err) {
    return sl_tensor_count(&args->scores) == 0
               ? SL_OK
               : SL_BY_DEVICE(&args->query, sl_cuda_h2o_score(args, workspace, n_byte, err),
                              sl_cpu_h2o_score(args, workspace, n_byte, n_thread, err));
}
