#include "live.h"

#include "../core/pattern.h"
#include "step.h"

#include <string.h>

// One past the last column that query i may see.
static int64_t visible_end(const struct sl_h2o_decode_args *args, int64_t i) {
    const int64_t n_key = args->key.shape[2], q = n_key - args->query.shape[2] + i;
    const struct sl_pattern causal = {.group_size = n_key, .causal = true};
    const struct sl_range query = {q, q + 1};
    struct sl_range keys[2];
    return sl_pattern_key_ranges(&causal, false, query, n_key, keys) ? keys[0].hi : 0;
}

// Lists the kept columns; a query whose own column is none of them is padding.
static void fill_masked(struct sl_live *live, const struct sl_h2o_decode_args *args, int64_t b,
                        int32_t *index) {
    const struct sl_tensor *mask = &args->padding_mask;
    const int64_t n_key = args->key.shape[2], n_query = args->query.shape[2];
    for (int64_t k = 0; k < n_key; k++) {
        if (sl_mask_at(mask, b, k)) {
            index[live->n++] = (int32_t)k;
        }
    }
    live->first = live->n > 0 ? index[0] : 0;
    live->index = live->n > 0 && index[live->n - 1] - index[0] + 1 != live->n ? index : NULL;
    for (int64_t i = 0; i < n_query; i++) {
        int64_t n_visible = live->n;
        while (n_visible > 0 && index[n_visible - 1] >= visible_end(args, i)) {
            n_visible--;
        }
        live->n_visible[i] = sl_mask_at(mask, b, n_key - n_query + i) ? n_visible : 0;
    }
}

void sl_live_fill(struct sl_live *live, const struct sl_h2o_decode_args *args, int64_t b, int32_t *index) {
    const int64_t n_query = args->query.shape[2];
    memset(live, 0, sizeof *live);
    if (sl_step_wanted(args)) {
        const struct sl_step step = sl_step_read(args, b);
        live->n = step.kept ? step.used + 1 : 0;
        live->n_visible[0] = live->n;
    } else if (sl_tensor_given(&args->padding_mask)) {
        fill_masked(live, args, b, index);
    } else {
        live->n = args->key.shape[2];
        for (int64_t i = 0; i < n_query; i++) {
            live->n_visible[i] = visible_end(args, i);
        }
    }
    int64_t counted = 0;
    for (int64_t i = n_query - 1; i >= 0; i--) {
        const bool kept = live->n_visible[i] > 0;
        live->counted[i] = kept && (n_query == 1 || args->window == 0 || counted < args->window);
        counted += kept;
    }
}
