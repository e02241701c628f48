#include "step.h"

#include "../core/pattern.h"

#include <string.h>

bool sl_step_wanted(const struct sl_h2o_decode_args *args) {
    return sl_tensor_given(&args->rows);
}

struct sl_step sl_step_read(const struct sl_h2o_decode_args *args, int64_t b) {
    const int32_t *row = (const int32_t *)args->rows.data + b * SL_ROW_FIELDS;
    const struct sl_tensor *mask = &args->new_mask;
    struct sl_step step;
    step.used = sl_max(0, sl_min(row[SL_ROW_USED], args->key.shape[2] - 1));
    step.seen = sl_max(0, sl_min(row[SL_ROW_SEEN], INT32_MAX - 1));
    step.budget = row[SL_ROW_BUDGET];
    step.recent = sl_max(1, row[SL_ROW_RECENT]);
    step.kept = !sl_tensor_given(mask) || sl_mask_at(mask, b, 0);
    return step;
}

static int64_t clamp_slot(int32_t slot, int64_t used) {
    return sl_max(0, sl_min(slot, used));
}

void sl_step_place(const struct sl_h2o_decode_args *args, int64_t b) {
    const struct sl_step step = sl_step_read(args, b);
    const int64_t n_head_kv = args->key.shape[1], n_key = args->key.shape[2];
    const size_t bytes = (size_t)(args->key.shape[3] * sl_dtype_size(args->key.dtype));
    for (int64_t hk = 0; step.kept && hk < n_head_kv; hk++) {
        const int64_t head = b * n_head_kv + hk;
        int32_t *free_slot = (int32_t *)args->free_slot.data + head;
        const int64_t slot = clamp_slot(*free_slot, step.used);
        *free_slot = (int32_t)slot;
        memcpy(sl_tensor_row(&args->key, b, hk, slot), sl_tensor_row(&args->new_key, b, hk, 0), bytes);
        memcpy(sl_tensor_row(&args->value, b, hk, slot), sl_tensor_row(&args->new_value, b, hk, 0), bytes);
        ((int32_t *)args->positions.data)[head * n_key + slot] = (int32_t)step.seen;
        ((float *)args->scores.data)[head * n_key + slot] = 0.0f;
    }
}

void sl_step_evict(const struct sl_h2o_decode_args *args, const struct sl_cpu_kernels *kernels, int64_t b,
                   int64_t hk) {
    const struct sl_step step = sl_step_read(args, b);
    const int64_t head = b * args->key.shape[1] + hk, n_key = args->key.shape[2];
    int32_t *free_slot = (int32_t *)args->free_slot.data + head;
    int32_t *positions = (int32_t *)args->positions.data + head * n_key;
    float *scores = (float *)args->scores.data + head * n_key;
    if (!step.kept) {
        return;
    }
    if (step.used + 1 <= step.budget) {
        *free_slot = (int32_t)(step.used + 1);
        return;
    }
    const int32_t lowest = (int32_t)sl_min(args->n_sink, INT32_MAX);
    const int32_t highest = (int32_t)sl_max(-1, step.seen - step.recent);
    const int64_t found = kernels->decode_evict(scores, positions, step.used + 1, lowest, highest);
    // Clamped again: another thread may have written to free_slot since the token was placed.
    const int64_t slot = found >= 0 ? found : clamp_slot(*free_slot, step.used);
    *free_slot = (int32_t)slot;
    positions[slot] = -1;
    scores[slot] = 0.0f;
}

void sl_step_count(const struct sl_h2o_decode_args *args, int64_t b) {
    const struct sl_step step = sl_step_read(args, b);
    int32_t *row = (int32_t *)args->rows.data + b * SL_ROW_FIELDS;
    if (step.kept) {
        row[SL_ROW_USED] = (int32_t)(step.used + (step.used + 1 <= step.budget));
        row[SL_ROW_SEEN] = (int32_t)(step.seen + 1);
    }
}
