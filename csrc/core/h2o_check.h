// Checks that the cache's operations share.
#ifndef SL_H2O_CHECK_H
#define SL_H2O_CHECK_H

#include "h2o.h"

// dtype, shape and contiguous memory of an array that stands beside the keys.
static inline enum sl_status sl_check_array(const char *name, const struct sl_tensor *t, enum sl_dtype dtype,
                                            int32_t n_dim, const int64_t *shape, const struct sl_tensor *like,
                                            bool written, struct sl_error *err) {
    SL_TRY(sl_check_dtype(name, t, dtype, err));
    SL_TRY(sl_check_shape(name, t, n_dim, shape, err));
    return sl_check_dense(name, t, like, written, err);
}

static inline enum sl_status sl_check_rows(const struct sl_tensor *rows, const struct sl_tensor *like,
                                           struct sl_error *err) {
    const int64_t shape[2] = {like->shape[0], SL_ROW_FIELDS};
    return sl_check_array("rows", rows, SL_I32, 2, shape, like, true, err);
}

static inline enum sl_status sl_check_sinks(int64_t n_sink, struct sl_error *err) {
    if (n_sink < 0) {
        return sl_error_set(err, SL_INVALID, "num_sinks: expected at least 0, got %lld", (long long)n_sink);
    }
    return SL_OK;
}

#endif
