// SF-Attn backward: five products a tile in one pass, no atomics, the same bits for every number of threads.
//
// One worker owns a group of a key/value head: it sums dK and dV of the group over all query heads and
// queries, and completes dQ of the group's queries, in float32. What more than one group adds to goes to
// memory of its own and is summed in a fixed order afterwards:
// - the first n_sink positions of a sequence, which every group sees: one partial sum an item (struct
// sl_plan);
// - the key/value head whose query heads are shifted in part, and all of them where sink queries see every
// key: a
//   float32 accumulator, written in the first phase and added to in the following.
#include "parallel.h"
#include "plan.h"

#include <float.h>
#include <math.h>
#include <string.h>

static const float LOG2_E = 1.44269504088896341f;

enum {
    QUERY_TILES = 8,
    CONVERT_ROWS = 512
}; // lane tiles packed at once: their operands stay in the L2 cache

struct backward {
    struct sl_plan plan;
    char *scratch; // one slice a worker
    int64_t slice;
    float *partial;           // [item][dK, dV][min(n_sink, length)][d_pad]
    float *accumulator;       // [n_batch][n_accumulated][n_token][dK, dV][d_pad]
    int64_t accumulated_from; // first key/value head with an accumulator
    int64_t n_accumulated;
    int phase;
};

// A worker's memory. n_key is the padded number of key rows, n_query that of the queries packed at once.
struct buffers {
    sl_word *k_rows;   // [n_key][n_kword]
    sl_word *v_rows;   // [n_key][n_kword]
    sl_word *k_panels; // [d / 8][n_key / pair][8]
    float *dk;         // [n_key][d_pad]
    float *dv;         // [n_key][d_pad]
    sl_word *q_lanes;  // [tile][n_kword][n_lane]
    sl_word *g_lanes;  // [tile][n_kword][n_lane]
    sl_word *q_words;  // [n_query / pair][d_pad]
    sl_word *g_words;  // [n_query / pair][d_pad]
    float *dq;         // [tile][d][n_lane]
    float *lse2;       // [n_query]
    float *delta;      // [n_query]
    sl_word *p;        // [SL_GRAD_KEY_TILE][n_lane / pair]
    sl_word *ds;       // the same
    sl_word *ds_lanes; // [SL_GRAD_KEY_TILE / pair][n_lane]; ds itself where pair is 1
};

static int64_t key_rows(int64_t n_key) {
    return (n_key + SL_GRAD_KEY_TILE - 1) / SL_GRAD_KEY_TILE * SL_GRAD_KEY_TILE;
}

static int64_t query_rows(const struct sl_plan *plan) {
    const int64_t lanes = plan->kernels->n_lane;
    return sl_min(QUERY_TILES, (sl_plan_max_queries(plan) + lanes - 1) / lanes) * lanes;
}

static struct buffers cut(const struct sl_plan *plan, struct sl_scratch *scratch) {
    const int64_t word = sizeof(sl_word), lanes = plan->kernels->n_lane, pair = plan->kernels->pair;
    const int64_t n_key = key_rows(sl_plan_max_keys(plan)), n_query = query_rows(plan);
    const int64_t row = plan->d_head / pair * word, padded = plan->d_pad * word;
    const int64_t tile = SL_GRAD_KEY_TILE * lanes / pair * word;
    struct buffers b;
    b.k_rows = sl_scratch_take(scratch, n_key * row);
    b.v_rows = sl_scratch_take(scratch, n_key * row);
    b.k_panels = sl_scratch_take(scratch, n_key * row);
    b.dk = sl_scratch_take(scratch, n_key * padded);
    b.dv = sl_scratch_take(scratch, n_key * padded);
    b.q_lanes = sl_scratch_take(scratch, n_query * row);
    b.g_lanes = sl_scratch_take(scratch, n_query * row);
    b.q_words = sl_scratch_take(scratch, n_query / pair * padded);
    b.g_words = sl_scratch_take(scratch, n_query / pair * padded);
    b.dq = sl_scratch_take(scratch, n_query * plan->d_head * word);
    b.lse2 = sl_scratch_take(scratch, n_query * word);
    b.delta = sl_scratch_take(scratch, n_query * word);
    b.p = sl_scratch_take(scratch, tile);
    b.ds = sl_scratch_take(scratch, tile);
    b.ds_lanes = pair == 1 ? b.ds : sl_scratch_take(scratch, tile);
    return b;
}

static int64_t slice_bytes(const struct sl_plan *plan) {
    struct sl_scratch scratch = {NULL, 0};
    cut(plan, &scratch);
    return (scratch.used + 255) / 256 * 256; // workers do not share cache lines, nor prefetched pairs of them
}

// A block of queries of one head, packed: i .. i+n-1 of query.
struct query_block {
    struct sl_rows query;
    struct sl_rows grad;
    int64_t i;
    int64_t n;
};

static void pack_queries(const struct sl_plan *plan, const struct sl_item *item, int64_t h,
                         const struct query_block *q, const struct buffers *b) {
    const struct sl_cpu_kernels *kernels = plan->kernels;
    const struct sl_attention_args *a = plan->args;
    const int64_t d = plan->d_head, lanes = kernels->n_lane, n_tile = (q->n + lanes - 1) / lanes;
    const int64_t tile = d / kernels->pair * lanes;
    const struct sl_rows output =
        sl_plan_rows(&a->output, item->sequence, h, 0, q->query.start, q->query.count);
    const float *lse =
        (const float *)a->lse.data + (item->sequence->batch * plan->n_head + h) * plan->n_token;
    for (int64_t t = 0; t < n_tile; t++) {
        kernels->pack_lanes(&q->query, d, q->i + t * lanes, a->scale < 0.0, b->q_lanes + t * tile);
        kernels->pack_lanes(&q->grad, d, q->i + t * lanes, false, b->g_lanes + t * tile);
    }
    kernels->pack_words(&q->query, d, q->i, n_tile * lanes, b->q_words);
    kernels->pack_words(&q->grad, d, q->i, n_tile * lanes, b->g_words);
    kernels->dot_rows(&output, &q->grad, d, q->i, q->n, b->delta);
    for (int64_t l = 0; l < n_tile * lanes; l++) {
        if (l < q->n) {
            b->lse2[l] = lse[sl_rows_token(&q->query, q->i + l)] * LOG2_E;
        } else { // lanes beyond the queries: probability 0
            b->lse2[l] = FLT_MAX;
            b->delta[l] = 0.0f;
        }
    }
}

// One block of queries against all keys that it may see.
static void run_block(const struct sl_plan *plan, const struct sl_unit *unit, int64_t n_key,
                      const struct query_block *q, const struct buffers *b) {
    const struct sl_cpu_kernels *kernels = plan->kernels;
    const int64_t d = plan->d_head, lanes = kernels->n_lane, pair = kernels->pair, n_kword = d / pair;
    const int64_t panel = key_rows(n_key) / pair * 8, tile = n_kword * lanes;
    const float scale2 = sl_plan_scale2(plan);
    const int64_t ahead =
        unit->n_sink + unit->queries.lo + q->i - unit->keys.lo; // row of the block's first query
    const int64_t block_end = unit->diagonal ? ahead + q->n : n_key;
    for (int64_t k = 0; k < block_end; k += SL_GRAD_KEY_TILE) {
        for (int64_t l = 0; l < q->n; l += lanes) {
            const int64_t end = unit->diagonal ? ahead + sl_min(l + lanes, q->n) : n_key;
            if (end <= k) {
                continue;
            }
            const int live = (int)((sl_min(lanes, q->n - l) + kernels->n_vector - 1) / kernels->n_vector);
            const int64_t some = sl_min(SL_GRAD_KEY_TILE, end - k);
            const int64_t rows = (some + SL_GRAD_ROW_BLOCK - 1) / SL_GRAD_ROW_BLOCK * SL_GRAD_ROW_BLOCK;
            const int64_t diagonal = unit->diagonal ? ahead + l - k : SL_NO_DIAGONAL;
            kernels->score_grads(live, b->k_rows + k * n_kword, b->v_rows + k * n_kword, n_kword,
                                 b->q_lanes + l / lanes * tile, b->g_lanes + l / lanes * tile, rows, diagonal,
                                 n_key - k, scale2, b->lse2 + l, b->delta + l, b->p, b->ds, b->ds_lanes);
            kernels->rows_add(live, b->p, b->g_words + l / pair * plan->d_pad, rows, diagonal, d,
                              b->dv + k * plan->d_pad);
            kernels->rows_add(live, b->ds, b->q_words + l / pair * plan->d_pad, rows, diagonal, d,
                              b->dk + k * plan->d_pad);
            kernels->lanes_add(live, b->k_panels + k / pair * 8, panel, b->ds_lanes, rows, diagonal, NULL,
                               k == 0, d, b->dq + l * d);
        }
    }
}

static void run_head(const struct sl_plan *plan, const struct sl_item *item, const struct sl_unit *unit,
                     int64_t h, int64_t n_key, const struct buffers *b) {
    const struct sl_attention_args *a = plan->args;
    const int64_t lanes = plan->kernels->n_lane, n_query = unit->queries.hi - unit->queries.lo;
    const int64_t step = query_rows(plan);
    const struct sl_rows grad_query =
        sl_plan_rows(&a->grad_query, item->sequence, h, 0, unit->queries.lo, n_query);
    float scale[SL_MAX_LANES];
    for (int l = 0; l < lanes; l++) {
        scale[l] = (float)a->scale;
    }
    struct query_block q;
    q.query = sl_plan_rows(&a->query, item->sequence, h, 0, unit->queries.lo, n_query);
    q.grad = sl_plan_rows(&a->grad_output, item->sequence, h, 0, unit->queries.lo, n_query);
    for (q.i = 0; q.i < n_query; q.i += step) {
        q.n = sl_min(step, n_query - q.i);
        pack_queries(plan, item, h, &q, b);
        run_block(plan, unit, n_key, &q, b);
        for (int64_t l = 0; l < q.n; l += lanes) {
            plan->kernels->unpack_lanes(b->dq + l * plan->d_head, scale, plan->d_head, &grad_query, q.i + l,
                                        sl_min(lanes, q.n - l));
        }
    }
}

static bool has_accumulator(const struct backward *w, int64_t hk) {
    return hk >= w->accumulated_from && hk < w->accumulated_from + w->n_accumulated;
}

// dK of token n; dV follows it.
static float *accumulator_row(const struct backward *w, int64_t b, int64_t hk, int64_t n) {
    const int64_t row = (b * w->n_accumulated + hk - w->accumulated_from) * w->plan.n_token + n;
    return w->accumulator + row * 2 * w->plan.d_pad;
}

static void add_row(float *sum, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        sum[i] += x[i];
    }
}

// Hands a unit's dK and dV on: to the item's partial sums, the accumulator, or the outputs.
static void finish_unit(const struct backward *w, const struct sl_item *item, const struct sl_unit *unit,
                        int64_t n_key, const struct buffers *b, float *partial) {
    const struct sl_plan *plan = &w->plan;
    const struct sl_attention_args *a = plan->args;
    const struct sl_sequence *s = item->sequence;
    const int64_t hk = item->heads.hk, d_pad = plan->d_pad, sink = sl_min(a->pattern.n_sink, s->length);
    const struct sl_rows grad_key = sl_plan_rows(&a->grad_key, s, hk, unit->n_sink, unit->keys.lo, n_key);
    const struct sl_rows grad_value = sl_plan_rows(&a->grad_value, s, hk, unit->n_sink, unit->keys.lo, n_key);
    for (int64_t r = 0; r < n_key; r++) {
        const float *dk = b->dk + r * d_pad, *dv = b->dv + r * d_pad;
        const int64_t x = r < unit->n_sink ? r : unit->keys.lo + r - unit->n_sink;
        if (x < sink) {
            add_row(partial + x * d_pad, dk, d_pad);
            add_row(partial + (sink + x) * d_pad, dv, d_pad);
        } else if (has_accumulator(w, hk)) {
            float *row = accumulator_row(w, s->batch, hk, sl_rows_token(&grad_key, r));
            if (w->phase == 0) {
                memcpy(row, dk, (size_t)d_pad * sizeof *row);
                memcpy(row + d_pad, dv, (size_t)d_pad * sizeof *row);
            } else {
                add_row(row, dk, d_pad);
                add_row(row + d_pad, dv, d_pad);
            }
        } else {
            plan->kernels->unpack_row(dk, (float)a->scale, plan->d_head, grad_key.dtype,
                                      sl_rows_at(&grad_key, r));
            plan->kernels->unpack_row(dv, 1.0f, plan->d_head, grad_value.dtype, sl_rows_at(&grad_value, r));
        }
    }
}

// The phase that computes an item: units that write first, then those that add to an accumulator.
static int phase_of(const struct backward *w, const struct sl_item *item) {
    if (item->sink_queries) {
        return 2;
    }
    const int64_t first_head = item->heads.hk * (w->plan.n_head / w->plan.n_head_kv);
    return item->heads.shifted && first_head < w->plan.first_shifted ? 1 : 0;
}

static void run_item(void *context, int64_t i, int worker) {
    const struct backward *w = context;
    const struct sl_plan *plan = &w->plan;
    const struct sl_cpu_kernels *kernels = plan->kernels;
    const struct sl_item item = sl_plan_item(plan, i);
    if (phase_of(w, &item) != w->phase) {
        return;
    }
    struct sl_scratch scratch = {w->scratch + worker * w->slice, 0};
    const struct buffers b = cut(plan, &scratch);
    const int64_t sink = sl_min(plan->args->pattern.n_sink, item.sequence->length);
    float *partial = w->partial + item.sequence->first_partial + item.slot * 2 * sink * plan->d_pad;
    memset(partial, 0, (size_t)(2 * sink * plan->d_pad) * sizeof *partial);
    for (int64_t g = item.groups.lo; g < item.groups.hi; g++) {
        const struct sl_unit unit = sl_item_unit(plan, &item, g);
        const int64_t n_key = unit.n_sink + unit.keys.hi - unit.keys.lo, rows = key_rows(n_key);
        const struct sl_rows key =
            sl_plan_rows(&plan->args->key, item.sequence, item.heads.hk, unit.n_sink, unit.keys.lo, n_key);
        const struct sl_rows value =
            sl_plan_rows(&plan->args->value, item.sequence, item.heads.hk, unit.n_sink, unit.keys.lo, n_key);
        kernels->pack_rows(&key, plan->d_head, 0, rows, b.k_rows);
        kernels->pack_rows(&value, plan->d_head, 0, rows, b.v_rows);
        kernels->pack_panels(&key, plan->d_head, rows, b.k_panels);
        memset(b.dk, 0, (size_t)(rows * plan->d_pad) * sizeof *b.dk);
        memset(b.dv, 0, (size_t)(rows * plan->d_pad) * sizeof *b.dv);
        for (int64_t h = item.heads.h0; h < item.heads.h1; h++) {
            run_head(plan, &item, &unit, h, n_key, &b);
        }
        finish_unit(w, &item, &unit, n_key, &b, partial);
    }
}

// Writes accumulated heads: items are blocks of CONVERT_ROWS tokens of a batch row and head. Rows of sinks
// are written too, and corrected by sum_sinks.
static void convert_item(void *context, int64_t i, int worker) {
    const struct backward *w = context;
    const struct sl_plan *plan = &w->plan;
    const struct sl_attention_args *a = plan->args;
    const int64_t n_block = (plan->n_token + CONVERT_ROWS - 1) / CONVERT_ROWS;
    const struct sl_sequence row_of_batch = {
        i / (n_block * w->n_accumulated), 0, 0, plan->n_token, NULL, 0, 0};
    const int64_t b = row_of_batch.batch, hk = w->accumulated_from + i / n_block % w->n_accumulated;
    const int64_t first = i % n_block * CONVERT_ROWS, end = sl_min(first + CONVERT_ROWS, plan->n_token);
    const struct sl_rows grad_key = sl_plan_rows(&a->grad_key, &row_of_batch, hk, 0, 0, plan->n_token);
    const struct sl_rows grad_value = sl_plan_rows(&a->grad_value, &row_of_batch, hk, 0, 0, plan->n_token);
    (void)worker;
    for (int64_t n = first; n < end; n++) {
        if (sl_plan_kept(plan, b, n)) {
            const float *row = accumulator_row(w, b, hk, n);
            plan->kernels->unpack_row(row, (float)a->scale, plan->d_head, grad_key.dtype,
                                      sl_rows_at(&grad_key, n));
            plan->kernels->unpack_row(row + plan->d_pad, 1.0f, plan->d_head, grad_value.dtype,
                                      sl_rows_at(&grad_value, n));
        }
    }
}

// Sums a sequence's partial sums over the items of one key/value head, in their order and into the first of
// them, and writes the sinks' gradients. Items are pairs of sequence and head.
static void sum_sinks(void *context, int64_t i, int worker) {
    const struct backward *w = context;
    const struct sl_plan *plan = &w->plan;
    const struct sl_attention_args *a = plan->args;
    const struct sl_sequence *s = &plan->sequence[i / plan->n_head_kv];
    const int64_t hk = i % plan->n_head_kv, sink = sl_min(a->pattern.n_sink, s->length);
    const int64_t size = 2 * sink * plan->d_pad;
    const int64_t n_item =
        (s + 1 == plan->sequence + plan->n_sequence ? plan->n_item : s[1].first_item) - s->first_item;
    float *sum = NULL;
    (void)worker;
    for (int64_t j = 0; j < n_item && sink > 0; j++) {
        if (sl_plan_item(plan, s->first_item + j).heads.hk == hk) {
            float *partial = w->partial + s->first_partial + j * size;
            if (sum) {
                add_row(sum, partial, size);
            } else {
                sum = partial;
            }
        }
    }
    if (!sum) {
        return;
    }
    const struct sl_rows grad_key = sl_plan_rows(&a->grad_key, s, hk, 0, 0, sink);
    const struct sl_rows grad_value = sl_plan_rows(&a->grad_value, s, hk, 0, 0, sink);
    for (int64_t x = 0; x < sink; x++) {
        plan->kernels->unpack_row(sum + x * plan->d_pad, (float)a->scale, plan->d_head, grad_key.dtype,
                                  sl_rows_at(&grad_key, x));
        plan->kernels->unpack_row(sum + (sink + x) * plan->d_pad, 1.0f, plan->d_head, grad_value.dtype,
                                  sl_rows_at(&grad_value, x));
    }
}

// Which key/value heads need an accumulator: at most one is shifted in part.
static void choose_accumulators(struct backward *w) {
    const struct sl_plan *plan = &w->plan;
    const int64_t r = plan->n_head / plan->n_head_kv;
    w->accumulated_from = 0;
    w->n_accumulated = 0;
    if (sl_plan_has_sink_queries(plan)) {
        w->n_accumulated = plan->n_head_kv;
    } else if (plan->first_shifted % r != 0) {
        w->accumulated_from = plan->first_shifted / r;
        w->n_accumulated = 1;
    }
}

// Lays the workspace out; returns its bytes. base NULL measures only. The partial sums come last: how many
// there are is known once the sequences are listed.
static int64_t lay_out(struct backward *w, char *base, int n_thread, void **plan_memory) {
    struct sl_scratch scratch = {base, 0};
    const struct sl_plan *plan = &w->plan;
    choose_accumulators(w);
    w->slice = slice_bytes(plan);
    *plan_memory = sl_scratch_take(&scratch, sl_plan_bytes(plan));
    w->scratch = sl_scratch_take(&scratch, n_thread * w->slice);
    w->accumulator = sl_scratch_take(&scratch, plan->args->query.shape[0] * w->n_accumulated * plan->n_token *
                                                   2 * plan->d_pad * (int64_t)sizeof(float));
    w->partial = sl_scratch_take(&scratch, sl_plan_partial_bound(plan) * (int64_t)sizeof(float));
    return scratch.used;
}

int64_t sl_cpu_attention_backward_workspace(const struct sl_attention_args *args, int n_thread) {
    struct backward w;
    void *plan_memory;
    n_thread = sl_plan_threads(args, n_thread);
    sl_plan_init(&w.plan, args, n_thread, true);
    return 64 + lay_out(&w, NULL, n_thread, &plan_memory);
}

enum sl_status sl_cpu_attention_backward(const struct sl_attention_args *args, void *workspace,
                                         int64_t n_byte, int n_thread, struct sl_error *err) {
    struct backward w;
    void *plan_memory;
    n_thread = sl_plan_threads(args, n_thread);
    sl_plan_init(&w.plan, args, n_thread, true);
    const int64_t used = lay_out(&w, sl_align(workspace), n_thread, &plan_memory);
    if (64 + used > n_byte || !sl_plan_fill(&w.plan, plan_memory) ||
        w.plan.n_partial > sl_plan_partial_bound(&w.plan)) {
        return sl_error_set(err, SL_RUNTIME, "cu_seqlens, position_ids: changed while the operation ran");
    }
    sl_plan_zero_padding(&w.plan, &args->grad_query);
    sl_plan_zero_padding(&w.plan, &args->grad_key);
    sl_plan_zero_padding(&w.plan, &args->grad_value);
    for (w.phase = 0; w.phase < 3; w.phase++) {
        if (w.phase == 0 || w.n_accumulated > 0) {
            sl_parallel_for(w.plan.n_item, n_thread, run_item, &w);
        }
    }
    const int64_t n_block = (w.plan.n_token + CONVERT_ROWS - 1) / CONVERT_ROWS;
    if (w.plan.n_sequence > 0) {
        sl_parallel_for(args->query.shape[0] * w.n_accumulated * n_block, n_thread, convert_item, &w);
    }
    if (args->pattern.n_sink > 0) {
        sl_parallel_for(w.plan.n_sequence * w.plan.n_head_kv, n_thread, sum_sinks, &w);
    }
    return SL_OK;
}
