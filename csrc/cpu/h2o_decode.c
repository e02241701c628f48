// Decode: a few new tokens over a cache. The live slots of a batch row are cut in chunks, counted from its
// first one; a chunk gives each query row a maximum, a sum and a part of its output, and the parts are put
// together in the order of the chunks. So the bits depend neither on threads nor on where the slots lie. Keys
// and values are read in the order of memory, once for all query rows of a key/value head.
#include "live.h"
#include "parallel.h"
#include "plan.h"
#include "step.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum {
    CHUNK = 512,            // slots; their keys stay in the L2 cache for further query rows
    THREAD_BYTES = 1 << 18, // keys and values that a thread should have at least
    THREAD_WORK = 1 << 21,  // or multiplications of queries and keys
    HEADS_PER_THREAD = 8,   // from here on whole heads keep all threads busy
};

static const float LN_2 = 0.693147180559945309f;

// Rows of a head are its query heads' queries: row (h - hk * ratio) * n_query + i.
struct decode {
    const struct sl_h2o_decode_args *args;
    const struct sl_cpu_kernels *kernels;
    int64_t n_batch, n_head_kv, ratio, n_query, n_row, n_key, d_head;
    int64_t n_chunk;  // of the longest row there could be
    int64_t n_word;   // of a packed query
    int64_t n_column; // floats of a part
    int64_t p_stride;
    float scale2;
    bool split;           // items are chunks, not whole heads
    struct sl_live *live; // [n_batch]
    int32_t *index;       // [n_batch][n_key], with a padding mask
    atomic_int *left;     // [n_batch][n_head_kv]: chunks still to be done, where heads are split
    char *heads;          // of each head where heads are split, else of each worker
    int64_t head_bytes;
    char *workers;
    int64_t worker_bytes;
};

// What the chunks of a head leave.
struct head {
    float *max;    // [n_row][n_chunk]; later what each part counts
    float *sum;    // [n_row][n_chunk]
    float *parts;  // [n_row][n_chunk][n_column]
    float *p;      // [n_row][p_stride], where scores are wanted
    float *column; // [CHUNK]
};

struct worker {
    sl_word *queries; // [n_row][n_word]
    float *logits;    // [SL_DECODE_ROWS][CHUNK], where no p is kept
    sl_word *weights; // [SL_DECODE_ROWS][CHUNK / pair]; the logits' memory where pair is 1
};

static int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static struct head cut_head(const struct decode *d, struct sl_scratch *scratch) {
    const int64_t parts = d->n_row * d->n_chunk, size = sizeof(float);
    const bool scores = sl_tensor_given(&d->args->scores);
    struct head head;
    head.max = sl_scratch_take(scratch, parts * size);
    head.sum = sl_scratch_take(scratch, parts * size);
    head.parts = sl_scratch_take(scratch, parts * d->n_column * size);
    head.p = scores ? sl_scratch_take(scratch, d->n_row * d->p_stride * size) : NULL;
    head.column = scores ? sl_scratch_take(scratch, CHUNK * size) : NULL;
    return head;
}

static struct worker cut_worker(const struct decode *d, struct sl_scratch *scratch) {
    const int64_t pair = d->kernels->pair, tile = SL_DECODE_ROWS * CHUNK * (int64_t)sizeof(float);
    struct worker worker;
    worker.queries = sl_scratch_take(scratch, d->n_row * d->n_word * (int64_t)sizeof(sl_word));
    worker.logits = sl_tensor_given(&d->args->scores) ? NULL : sl_scratch_take(scratch, tile);
    worker.weights = pair == 1 ? NULL : sl_scratch_take(scratch, tile / pair);
    return worker;
}

static int threads(const struct decode *d, int n_thread) {
    const double keys = (double)(d->n_batch * d->n_head_kv * d->n_key * d->d_head);
    const double bytes = 2.0 * keys * (double)sl_dtype_size(d->args->key.dtype);
    const double worth = fmax(bytes / THREAD_BYTES, keys * (double)d->n_row / THREAD_WORK);
    return (int)sl_max(1, (int64_t)fmin(n_thread, worth));
}

// Sizes and the cut of the workspace, which scratch measures or hands out.
static int plan(struct decode *d, const struct sl_h2o_decode_args *args, int n_thread,
                struct sl_scratch *scratch) {
    const int64_t *q = args->query.shape, *k = args->key.shape;
    memset(d, 0, sizeof *d);
    d->args = args;
    d->kernels = sl_cpu_kernels_for(sl_cpu_level_active(), args->query.dtype);
    d->n_batch = q[0];
    d->n_head_kv = k[1];
    d->ratio = q[1] / k[1];
    d->n_query = q[2];
    d->n_row = d->ratio * q[2];
    d->n_key = k[2];
    d->d_head = q[3];
    d->n_chunk = div_up(k[2], CHUNK);
    d->n_word = div_up(q[3] / d->kernels->pair, d->kernels->n_vector) * d->kernels->n_vector;
    d->n_column = div_up(q[3], SL_SUM_COLUMNS) * SL_SUM_COLUMNS;
    // Rows a power of two apart would share cache sets.
    d->p_stride = div_up(k[2], SL_MAX_VECTOR) * SL_MAX_VECTOR + SL_MAX_VECTOR;
    d->scale2 = sl_scale2(args->scale);
    n_thread = threads(d, n_thread);
    const int64_t heads = d->n_batch * d->n_head_kv;
    d->split = d->n_chunk > 1 && heads % n_thread != 0 && heads < (int64_t)n_thread * HEADS_PER_THREAD;
    d->live = sl_scratch_take(scratch, d->n_batch * (int64_t)sizeof *d->live);
    if (sl_tensor_given(&args->padding_mask)) {
        d->index = sl_scratch_take(scratch, d->n_batch * d->n_key * (int64_t)sizeof *d->index);
    }
    d->left = sl_scratch_take(scratch, d->split ? heads * (int64_t)sizeof *d->left : 0);
    struct sl_scratch one_head = {NULL, 0}, one_worker = {NULL, 0};
    cut_head(d, &one_head);
    cut_worker(d, &one_worker);
    d->head_bytes = div_up(one_head.used, 256) * 256; // no shared cache lines, nor prefetched pairs of them
    d->worker_bytes = div_up(one_worker.used, 256) * 256;
    d->heads = sl_scratch_take(scratch, (d->split ? heads : n_thread) * d->head_bytes);
    d->workers = sl_scratch_take(scratch, n_thread * d->worker_bytes);
    return n_thread;
}

static struct sl_slots slots_of(const struct sl_tensor *t, int64_t b, int64_t hk, const struct sl_live *live,
                                int64_t x) {
    struct sl_slots slots = {sl_tensor_row(t, b, hk, live->index ? 0 : live->first + x),
                             t->stride[2] * sl_dtype_size(t->dtype), NULL, live->n - x, t->dtype};
    slots.index = live->index ? live->index + x : NULL;
    return slots;
}

static void pack_queries(const struct decode *d, int64_t b, int64_t hk, sl_word *out) {
    for (int64_t r = 0; r < d->n_row; r++) {
        const char *row = sl_tensor_row(&d->args->query, b, hk * d->ratio + r / d->n_query, r % d->n_query);
        d->kernels->decode_query(d->args->query.dtype, row, d->d_head, d->args->scale < 0.0,
                                 out + r * d->n_word);
    }
}

static void run_chunk(const struct decode *d, int64_t b, int64_t hk, int64_t c, const struct head *head,
                      const struct worker *worker) {
    const struct sl_cpu_kernels *kernels = d->kernels;
    const struct sl_live *live = &d->live[b];
    const int64_t x = c * CHUNK, n = sl_min(CHUNK, live->n - x);
    const struct sl_slots key = slots_of(&d->args->key, b, hk, live, x);
    const struct sl_slots value = slots_of(&d->args->value, b, hk, live, x);
    for (int64_t r0 = 0; r0 < d->n_row; r0 += SL_DECODE_ROWS) {
        const int rows = (int)sl_min(SL_DECODE_ROWS, d->n_row - r0);
        const int64_t stride = head->p ? d->p_stride : CHUNK;
        float *logits = head->p ? head->p + r0 * stride + x : worker->logits;
        sl_word *weights = kernels->pair == 1 ? (sl_word *)logits : worker->weights;
        const int64_t weight_stride = kernels->pair == 1 ? stride : CHUNK / kernels->pair;
        kernels->decode_logits(rows, worker->queries + r0 * d->n_word, &key, d->d_head, n, logits, stride);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t visible = live->n_visible[(r0 + r) % d->n_query] - x,
                          at = (r0 + r) * d->n_chunk + c;
            kernels->decode_softmax(logits + r * stride, sl_max(0, sl_min(visible, n)), n, d->scale2,
                                    &head->max[at], &head->sum[at], weights + r * weight_stride);
        }
        kernels->decode_values(rows, weights, weight_stride, &value, d->d_head, n,
                               head->parts + (r0 * d->n_chunk + c) * d->n_column, d->n_chunk * d->n_column);
    }
}

// Turns the maxima of a row's chunks into what each part counts; returns the row's lse.
static float weigh_parts(float *max, const float *sum, int64_t n) {
    float top = max[0], total = 0.0f;
    for (int64_t c = 1; c < n; c++) {
        top = max[c] > top ? max[c] : top;
    }
    for (int64_t c = 0; c < n; c++) {
        max[c] = exp2f(max[c] - top);
        total += max[c] * sum[c];
    }
    for (int64_t c = 0; c < n; c++) {
        max[c] /= total;
    }
    return (top + log2f(total)) * LN_2;
}

// Adds each live slot's probabilities to its score.
static void add_scores(const struct decode *d, int64_t b, int64_t hk, const struct head *head) {
    const struct sl_live *live = &d->live[b];
    float *scores = (float *)d->args->scores.data + (b * d->n_head_kv + hk) * d->n_key;
    const float share = d->args->mean ? 1.0f / (float)d->ratio : 1.0f;
    for (int64_t x = 0; x < live->n; x += CHUNK) {
        const int64_t n = sl_min(CHUNK, live->n - x);
        d->kernels->decode_column_sums(d->n_row, head->p + x, d->p_stride, head->max + x / CHUNK, d->n_chunk,
                                       share, n, head->column);
        for (int64_t j = 0; j < n; j++) {
            scores[live->index ? live->index[x + j] : live->first + x + j] += head->column[j];
        }
    }
}

static void finish_head(const struct decode *d, int64_t b, int64_t hk, const struct head *head) {
    const struct sl_h2o_decode_args *a = d->args;
    const struct sl_live *live = &d->live[b];
    for (int64_t r = 0; r < d->n_row; r++) {
        const int64_t h = hk * d->ratio + r / d->n_query, i = r % d->n_query;
        const int64_t n = div_up(live->n_visible[i], CHUNK);
        float *factor = head->max + r * d->n_chunk, lse = -INFINITY;
        char *out = sl_tensor_row(&a->output, b, h, i);
        if (n > 0) {
            lse = weigh_parts(factor, head->sum + r * d->n_chunk, n);
            d->kernels->decode_output(head->parts + r * d->n_chunk * d->n_column, d->n_column, factor, n,
                                      d->d_head, a->output.dtype, out);
        } else {
            memset(out, 0, (size_t)(d->d_head * sl_dtype_size(a->output.dtype)));
        }
        if (sl_tensor_given(&a->lse)) {
            ((float *)a->lse.data)[(b * a->query.shape[1] + h) * d->n_query + i] = lse;
        }
        for (int64_t c = live->counted[i] ? n : 0; c < d->n_chunk; c++) {
            factor[c] = 0.0f;
        }
    }
    if (head->p) {
        add_scores(d, b, hk, head);
    }
    if (sl_step_wanted(a)) {
        sl_step_evict(a, d->kernels, b, hk);
    }
}

static void run_item(void *context, int64_t item, int w) {
    const struct decode *d = context;
    const int64_t i = d->split ? item / d->n_chunk : item, b = i / d->n_head_kv, hk = i % d->n_head_kv;
    const int64_t n_chunk = div_up(d->live[b].n, CHUNK);
    struct sl_scratch head_memory = {d->heads + (d->split ? i : w) * d->head_bytes, 0};
    struct sl_scratch worker_memory = {d->workers + w * d->worker_bytes, 0};
    const struct head head = cut_head(d, &head_memory);
    const struct worker worker = cut_worker(d, &worker_memory);
    const int64_t first = d->split ? item % d->n_chunk : 0;
    const int64_t end = d->split ? sl_min(first + 1, n_chunk) : n_chunk;
    if (first < end) {
        pack_queries(d, b, hk, worker.queries);
    }
    for (int64_t c = first; c < end; c++) {
        run_chunk(d, b, hk, c, &head, &worker);
    }
    if (!d->split || atomic_fetch_sub_explicit(&d->left[i], 1, memory_order_acq_rel) == 1) {
        finish_head(d, b, hk, &head);
    }
}

int64_t sl_cpu_h2o_decode_workspace(const struct sl_h2o_decode_args *args, int n_thread) {
    struct decode d;
    struct sl_scratch scratch = {NULL, 0};
    plan(&d, args, n_thread, &scratch);
    return 64 + scratch.used;
}

enum sl_status sl_cpu_h2o_decode(const struct sl_h2o_decode_args *args, void *workspace, int64_t n_byte,
                                 int n_thread, struct sl_error *err) {
    struct decode d;
    struct sl_scratch scratch = {sl_align(workspace), 0};
    n_thread = plan(&d, args, n_thread, &scratch);
    if (64 + scratch.used > n_byte) {
        return sl_error_set(err, SL_RUNTIME, "workspace: expected %lld bytes, got %lld",
                            (long long)(64 + scratch.used), (long long)n_byte);
    }
    for (int64_t b = 0; b < d.n_batch; b++) {
        sl_live_fill(&d.live[b], args, b, d.index ? d.index + b * d.n_key : NULL);
        if (sl_step_wanted(args)) {
            sl_step_place(args, b);
        }
        for (int64_t hk = 0; d.split && hk < d.n_head_kv; hk++) {
            atomic_init(&d.left[b * d.n_head_kv + hk], (int)d.n_chunk);
        }
    }
    sl_parallel_for(d.n_batch * d.n_head_kv * (d.split ? d.n_chunk : 1), n_thread, run_item, &d);
    for (int64_t b = 0; sl_step_wanted(args) && b < d.n_batch; b++) {
        sl_step_count(args, b);
    }
    return SL_OK;
}
