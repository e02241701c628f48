// Selection: which entries a cache keeps, and their move to the first slots. Entries are ranked by one 64-bit
// key each, all of them different, and the smallest key that is kept is found digit by digit: linear, with
// the same result for every order of the slots.
#include "parallel.h"
#include "plan.h"

#include "../core/h2o.h"

#include <string.h>

enum {
    DIGIT = 8,              // bits of a step
    THREAD_BYTES = 1 << 20, // read or moved, that a thread should have at least
};

struct select {
    const struct sl_h2o_select_args *args;
    int64_t n_head_kv, n_key, n_slot;
    char *workers;
    int64_t worker_bytes;
};

struct worker {
    uint64_t *ranks;   // [n_key]
    uint64_t *scratch; // [n_key]
    uint32_t *list;    // [n_key], the kept slots
};

static struct worker cut(const struct select *s, struct sl_scratch *scratch) {
    struct worker worker;
    worker.ranks = sl_scratch_take(scratch, s->n_key * (int64_t)sizeof(uint64_t));
    worker.scratch = sl_scratch_take(scratch, s->n_key * (int64_t)sizeof(uint64_t));
    worker.list = sl_scratch_take(scratch, s->n_key * (int64_t)sizeof(uint32_t));
    return worker;
}

// The n_keep-th largest of n keys (1 <= n_keep <= n), which are overwritten.
static uint64_t nth_largest(uint64_t *keys, int64_t n, int64_t n_keep) {
    for (int shift = 64 - DIGIT; n > 1 && shift >= 0; shift -= DIGIT) {
        int64_t count[1 << DIGIT] = {0}, kept = 0;
        for (int64_t i = 0; i < n; i++) {
            count[keys[i] >> shift & ((1 << DIGIT) - 1)]++;
        }
        uint64_t digit = (1 << DIGIT) - 1;
        for (; n_keep > count[digit]; digit--) {
            n_keep -= count[digit];
        }
        for (int64_t i = 0; i < n; i++) {
            if ((keys[i] >> shift & ((1 << DIGIT) - 1)) == digit) {
                keys[kept++] = keys[i];
            }
        }
        n = kept;
    }
    return keys[0];
}

// Unsigned numbers in the order of floats; both zeros are one, NaN is above infinity.
static uint64_t ordered(float score) {
    uint32_t bits;
    score = score == 0.0f ? 0.0f : score;
    memcpy(&bits, &score, sizeof bits);
    return score != score ? UINT32_MAX : bits >> 31 ? ~bits : bits | UINT32_C(1) << 31;
}

// Where position p ranks among equal scores: the older the higher.
static uint64_t age(int32_t position) {
    return (uint64_t)(INT32_MAX - position);
}

// The position from which on entries are among the n_recent newest.
static int64_t first_recent(const int32_t *positions, int64_t n, int64_t n_recent, uint64_t *scratch) {
    int64_t used = 0;
    for (int64_t k = 0; k < n; k++) {
        if (positions[k] >= 0) {
            scratch[used++] = (uint64_t)positions[k];
        }
    }
    return n_recent <= 0 ? INT64_MAX : n_recent >= used ? 0 : (int64_t)nth_largest(scratch, used, n_recent);
}

// Lists the slots to keep, in their order; returns how many.
static int64_t choose(const struct select *s, int64_t head, const struct worker *worker) {
    const struct sl_h2o_select_args *a = s->args;
    const float *scores = (const float *)a->scores.data + head * s->n_key;
    const int32_t *positions = (const int32_t *)a->positions.data + head * s->n_key;
    const int32_t *row = (const int32_t *)a->rows.data + head / s->n_head_kv * SL_ROW_FIELDS;
    const int64_t recent = first_recent(positions, s->n_key, row[SL_ROW_RECENT], worker->scratch);
    int64_t used = 0, kept = 0;
    for (int64_t k = 0; k < s->n_key; k++) {
        if (positions[k] >= 0) {
            const bool always = positions[k] >= recent || positions[k] < a->n_sink;
            worker->ranks[k] = (uint64_t)always << 63 | ordered(scores[k]) << 31 | age(positions[k]);
            worker->scratch[used++] = worker->ranks[k];
        }
    }
    const int64_t n_keep = sl_min(sl_min(used, s->n_slot), sl_max(0, row[SL_ROW_BUDGET]));
    const uint64_t least = n_keep > 0 ? nth_largest(worker->scratch, used, n_keep) : UINT64_MAX;
    for (int64_t k = 0; k < s->n_key && kept < n_keep; k++) {
        if (positions[k] >= 0 && worker->ranks[k] >= least) {
            worker->list[kept++] = (uint32_t)k;
        }
    }
    return kept;
}

// Kept rows go to the first slots. list[i] >= i, so this may happen in place.
static void move_rows(const struct sl_tensor *from, const struct sl_tensor *to, int64_t b, int64_t hk,
                      const uint32_t *list, int64_t n) {
    const size_t bytes = (size_t)(from->shape[3] * sl_dtype_size(from->dtype));
    for (int64_t i = 0; i < n; i++) {
        const char *in = sl_tensor_row(from, b, hk, list[i]);
        char *out = sl_tensor_row(to, b, hk, i);
        if (out != in) {
            memcpy(out, in, bytes);
        }
    }
}

static void run_head(void *context, int64_t head, int w) {
    const struct select *s = context;
    const struct sl_h2o_select_args *a = s->args;
    const int64_t b = head / s->n_head_kv, hk = head % s->n_head_kv;
    struct sl_scratch scratch = {s->workers + w * s->worker_bytes, 0};
    const struct worker worker = cut(s, &scratch);
    const float *scores = (const float *)a->scores.data + head * s->n_key;
    const int32_t *positions = (const int32_t *)a->positions.data + head * s->n_key;
    float *scores_out = (float *)a->scores_out.data + head * s->n_slot;
    int32_t *positions_out = (int32_t *)a->positions_out.data + head * s->n_slot;
    const uint32_t *list = worker.list;
    const int64_t n = choose(s, head, &worker);
    move_rows(&a->key, &a->key_out, b, hk, list, n);
    move_rows(&a->value, &a->value_out, b, hk, list, n);
    for (int64_t i = 0; i < n; i++) {
        scores_out[i] = scores[list[i]];
        positions_out[i] = positions[list[i]];
    }
    for (int64_t i = n; i < s->n_slot; i++) {
        scores_out[i] = 0.0f;
        positions_out[i] = -1;
    }
}

// USED of each row, from the outputs: heads that disagree (they never should) leave the fewest.
static void count_used(const struct select *s) {
    const struct sl_h2o_select_args *a = s->args;
    for (int64_t b = 0; b < a->key.shape[0]; b++) {
        int64_t least = s->n_slot;
        for (int64_t hk = 0; hk < s->n_head_kv; hk++) {
            const int32_t *positions =
                (const int32_t *)a->positions_out.data + (b * s->n_head_kv + hk) * s->n_slot;
            int64_t n = s->n_slot;
            while (n > 0 && positions[n - 1] < 0) {
                n--;
            }
            least = sl_min(least, n);
        }
        ((int32_t *)a->rows.data)[b * SL_ROW_FIELDS + SL_ROW_USED] = (int32_t)least;
    }
}

static int plan(struct select *s, const struct sl_h2o_select_args *args, int n_thread,
                struct sl_scratch *scratch) {
    const int64_t *k = args->key.shape, heads = k[0] * k[1];
    const double bytes = (double)heads * (double)k[2] * (double)(32 + k[3] * sl_dtype_size(args->key.dtype));
    s->args = args;
    s->n_head_kv = k[1];
    s->n_key = k[2];
    s->n_slot = args->key_out.shape[2];
    n_thread = (int)sl_max(1, sl_min(sl_min(n_thread, heads), (int64_t)(bytes / THREAD_BYTES)));
    struct sl_scratch one = {NULL, 0};
    cut(s, &one);
    s->worker_bytes = (one.used + 255) / 256 * 256; // no shared cache lines, nor prefetched pairs of them
    s->workers = sl_scratch_take(scratch, n_thread * s->worker_bytes);
    return n_thread;
}

int64_t sl_cpu_h2o_select_workspace(const struct sl_h2o_select_args *args, int n_thread) {
    struct select s;
    struct sl_scratch scratch = {NULL, 0};
    plan(&s, args, n_thread, &scratch);
    return 64 + scratch.used;
}

enum sl_status sl_cpu_h2o_select(const struct sl_h2o_select_args *args, void *workspace, int64_t n_byte,
                                 int n_thread, struct sl_error *err) {
    struct select s;
    struct sl_scratch scratch = {sl_align(workspace), 0};
    n_thread = plan(&s, args, n_thread, &scratch);
    if (64 + scratch.used > n_byte) {
        return sl_error_set(err, SL_RUNTIME, "workspace: expected %lld bytes, got %lld",
                            (long long)(64 + scratch.used), (long long)n_byte);
    }
    sl_parallel_for(args->key.shape[0] * s.n_head_kv, n_thread, run_head, &s);
    count_used(&s);
    return SL_OK;
}
