// Which sequences a call has, and where their rows lie.
#include "plan.h"

#include <string.h>

bool sl_plan_kept(const struct sl_plan *plan, int64_t b, int64_t n) {
    const struct sl_tensor *mask = &plan->args->padding_mask;
    return !sl_tensor_given(mask) || sl_mask_at(mask, b, n);
}

// Does a sequence start at token n of batch row b, by position_ids?
static bool starts_at(const struct sl_tensor *ids, int64_t b, int64_t n) {
    const int64_t *row = (const int64_t *)ids->data + (ids->shape[0] == 1 ? 0 : b) * ids->stride[0];
    return n == 0 || row[n * ids->stride[1]] <= row[(n - 1) * ids->stride[1]];
}

int64_t sl_plan_count_sequences(const struct sl_plan *plan) {
    const struct sl_attention_args *a = plan->args;
    const int64_t n_batch = a->query.shape[0];
    if (sl_tensor_given(&a->cu_seqlens)) {
        return a->cu_seqlens.shape[0] - 1;
    }
    if (!sl_tensor_given(&a->position_ids)) {
        return n_batch;
    }
    int64_t count = 0;
    const int64_t n_row = a->position_ids.shape[0];
    for (int64_t b = 0; b < n_row; b++) {
        for (int64_t n = 0; n < plan->n_token; n++) {
            count += starts_at(&a->position_ids, b, n);
        }
    }
    return n_row == n_batch ? count : count * n_batch;
}

int64_t sl_plan_bytes(const struct sl_plan *plan) {
    const int64_t gathered =
        sl_tensor_given(&plan->args->padding_mask) ? plan->args->query.shape[0] * plan->n_key : 0;
    return plan->max_sequence * (int64_t)sizeof(struct sl_sequence) + gathered * (int64_t)sizeof(int32_t) +
           128;
}

static bool add_sequence(struct sl_plan *plan, int64_t batch, int64_t first, int64_t n_past, int64_t length,
                         const int32_t *index) {
    if (plan->n_sequence == plan->max_sequence) {
        return false;
    }
    struct sl_sequence *s = &plan->sequence[plan->n_sequence++];
    const int64_t sink = sl_min(plan->args->pattern.n_sink, length);
    const int64_t items = sl_plan_item_count(plan, length, length - n_past);
    s->batch = batch;
    s->first = first;
    s->n_past = n_past;
    s->length = length;
    s->index = index;
    s->first_item = plan->n_item;
    s->first_partial = plan->n_partial;
    plan->n_item += items;
    plan->n_partial += plan->backward ? items * 2 * sink * plan->d_pad : 0;
    return true;
}

static bool add_kept(struct sl_plan *plan, int64_t b) {
    int32_t *index = plan->index + b * plan->n_key;
    int64_t length = 0, n_past = 0;
    for (int64_t n = 0; n < plan->n_key; n++) {
        n_past = n == plan->args->n_past ? length : n_past;
        if (sl_plan_kept(plan, b, n)) {
            index[length++] = (int32_t)n;
        }
    }
    const bool holes = length > 0 && index[length - 1] - index[0] + 1 != length;
    return add_sequence(plan, b, length > 0 && !holes ? index[0] : 0, n_past, length, holes ? index : NULL);
}

static bool add_restarts(struct sl_plan *plan, int64_t b) {
    int64_t first = 0;
    for (int64_t n = 1; n <= plan->n_token; n++) {
        if (n == plan->n_token || starts_at(&plan->args->position_ids, b, n)) {
            if (!add_sequence(plan, b, first, 0, n - first, NULL)) {
                return false;
            }
            first = n;
        }
    }
    return true;
}

bool sl_plan_fill(struct sl_plan *plan, void *memory) {
    const struct sl_attention_args *a = plan->args;
    plan->sequence = memory;
    plan->index = (int32_t *)(plan->sequence + plan->max_sequence);
    plan->n_sequence = plan->n_item = plan->n_partial = 0;
    if (plan->n_token == 0) {
        return true;
    }
    if (sl_tensor_given(&a->cu_seqlens)) {
        const int32_t *starts = a->cu_seqlens.data;
        int64_t first = 0;
        for (int64_t i = 0; i < plan->max_sequence; i++) {
            const int64_t end = sl_max(first, sl_min(starts[i + 1], plan->n_token));
            if (!add_sequence(plan, 0, first, 0, end - first, NULL)) {
                return false;
            }
            first = end;
        }
        return true;
    }
    for (int64_t b = 0; b < a->query.shape[0]; b++) {
        const bool added = sl_tensor_given(&a->padding_mask) ? add_kept(plan, b)
                           : sl_tensor_given(&a->position_ids)
                               ? add_restarts(plan, b)
                               : add_sequence(plan, b, 0, a->n_past, plan->n_key, NULL);
        if (!added) {
            return false;
        }
    }
    return true;
}

struct sl_rows sl_plan_rows(const struct sl_tensor *tensor, const struct sl_sequence *sequence, int64_t h,
                            int64_t n_sink, int64_t start, int64_t count) {
    const int64_t size = sl_dtype_size(tensor->dtype);
    struct sl_rows rows;
    rows.data = (char *)tensor->data + (sequence->batch * tensor->stride[0] + h * tensor->stride[1]) * size;
    rows.stride = tensor->stride[2] * size;
    rows.index = sequence->index;
    rows.first = sequence->first;
    rows.n_sink = n_sink;
    rows.start = start;
    rows.count = count;
    rows.dtype = tensor->dtype;
    return rows;
}

struct sl_rows sl_plan_query_rows(const struct sl_plan *plan, const struct sl_tensor *tensor,
                                  const struct sl_sequence *sequence, int64_t h, int64_t start,
                                  int64_t count) {
    struct sl_rows rows = sl_plan_rows(tensor, sequence, h, 0, start, count);
    rows.first -= plan->args->n_past;
    return rows;
}

void sl_plan_zero_padding(const struct sl_plan *plan, const struct sl_tensor *t) {
    if (!sl_tensor_given(&plan->args->padding_mask)) {
        return;
    }
    const int64_t size = sl_dtype_size(t->dtype), past = plan->n_key - t->shape[2];
    for (int64_t b = 0; b < t->shape[0]; b++) {
        for (int64_t n = 0; n < t->shape[2]; n++) {
            for (int64_t h = 0; !sl_plan_kept(plan, b, past + n) && h < t->shape[1]; h++) {
                memset(sl_tensor_row(t, b, h, n), 0, (size_t)(t->shape[3] * size));
            }
        }
    }
}
