// Checks that the cache's operations share.
#ifndef SL_H2O_CHECK_H
#define SL_H2O_CHECK_H

#include "h2o.h"

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
