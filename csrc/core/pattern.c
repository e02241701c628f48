#include "pattern_check.h"

enum sl_status sl_pattern_check(const struct sl_pattern *p, struct sl_error *err) {
    if (p->group_size < 1) {
        return sl_error_set(err, SL_INVALID, "group_size: expected an integer >= 1, got %lld",
                            (long long)p->group_size);
    }
    if (p->shift < 0 || p->shift > p->group_size) {
        return sl_error_set(err, SL_INVALID, "shift: expected 0 <= shift <= group_size (%lld), got %lld",
                            (long long)p->group_size, (long long)p->shift);
    }
    if (p->n_sink < 0) {
        return sl_error_set(err, SL_INVALID, "num_sink_tokens: expected an integer >= 0, got %lld",
                            (long long)p->n_sink);
    }
    if (!(p->shifted_fraction >= 0.0 && p->shifted_fraction <= 1.0)) {
        return sl_error_set(err, SL_INVALID, "shifted_fraction: expected a number in [0, 1], got %g",
                            p->shifted_fraction);
    }
    return SL_OK;
}
