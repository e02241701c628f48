// Scores of a prompt: column sums of the causal attention matrix, a second pass over keys and queries with
// the saved lse. An item owns a block of keys of a key/value head: it packs them once and walks the query
// heads and the queries that see them, so no two items add to one score, and the matrix is never stored.
//
// Sums are taken in three steps: over a chunk of queries in float32 vectors, over their lanes and over the
// chunks in double. Chunks start at the same queries for every block of keys: the bits of a score depend on
// nothing but its sequence.
#include "../core/h2o.h"
#include "parallel.h"
#include "plan.h"

#include <float.h>
#include <string.h>

static const float LOG2_E = 1.44269504088896341f;

enum {
    CHUNK_TILES = 8,       // lane tiles summed in float32
    BLOCK_BYTES = 1 << 18, // packed keys of an item, which stay in the L2 cache
    MIN_BLOCK = 96,        // keys of an item, at least
    ITEMS_PER_THREAD = 8,  // below this the blocks get smaller
};

struct score {
    const struct sl_h2o_score_args *args;
    struct sl_attention_args attention; // the same sequences and rows
    struct sl_plan plan;
    int64_t n_block_key; // keys of a block, a multiple of SL_ROW_BLOCK
    int64_t n_block;     // blocks of the longest sequence
    char *scratch;       // one slice a worker
    int64_t slice;
};

// A worker's memory.
struct buffers {
    sl_word *k_rows;  // [n_block_key][n_kword]
    sl_word *q_lanes; // [n_kword][n_lane]
    float *lse2;      // [n_lane]
    float *sums;      // [n_block_key][n_vector], of a chunk
    double *totals;   // [n_block_key]
};

static struct buffers cut(const struct score *s, struct sl_scratch *scratch) {
    const struct sl_cpu_kernels *kernels = s->plan.kernels;
    const int64_t row = s->plan.d_head / kernels->pair * (int64_t)sizeof(sl_word), keys = s->n_block_key;
    struct buffers b;
    b.k_rows = sl_scratch_take(scratch, keys * row);
    b.q_lanes = sl_scratch_take(scratch, kernels->n_lane * row);
    b.lse2 = sl_scratch_take(scratch, kernels->n_lane * (int64_t)sizeof *b.lse2);
    b.sums = sl_scratch_take(scratch, keys * kernels->n_vector * (int64_t)sizeof *b.sums);
    b.totals = sl_scratch_take(scratch, keys * (int64_t)sizeof *b.totals);
    return b;
}

static int64_t slice_bytes(const struct score *s) {
    struct sl_scratch scratch = {NULL, 0};
    cut(s, &scratch);
    return (scratch.used + 255) / 256 * 256; // workers do not share cache lines, nor prefetched pairs of them
}

// Sizes and cut. s must not move afterwards: its plan points into it.
static int prepare(struct score *s, const struct sl_h2o_score_args *args, int n_thread) {
    const int64_t n_key = args->key.shape[2];
    memset(s, 0, sizeof *s);
    s->args = args;
    s->attention = (struct sl_attention_args){
        .query = args->query,
        .key = args->key,
        .lse = args->lse,
        .padding_mask = args->padding_mask,
        .n_past = n_key - args->query.shape[2],
        .pattern = {.group_size = sl_max(1, n_key), .causal = true},
        .scale = args->scale,
    };
    n_thread = sl_plan_threads(&s->attention, n_thread);
    sl_plan_init(&s->plan, &s->attention, 1, false); // its items are not used
    const int64_t row = s->plan.d_head / s->plan.kernels->pair * (int64_t)sizeof(sl_word);
    const int64_t heads = args->query.shape[0] * s->plan.n_head_kv;
    const int64_t wanted = (n_thread * ITEMS_PER_THREAD + heads - 1) / heads; // blocks of a head
    const int64_t most = n_thread > 1 ? sl_min(BLOCK_BYTES / row, n_key / wanted) : BLOCK_BYTES / row;
    const int64_t keys = sl_min(sl_max(MIN_BLOCK, most), n_key);
    s->n_block_key = (keys + SL_ROW_BLOCK - 1) / SL_ROW_BLOCK * SL_ROW_BLOCK;
    s->n_block = (n_key + s->n_block_key - 1) / s->n_block_key;
    s->slice = slice_bytes(s);
    return n_thread;
}

// Adds a chunk's sums to the totals and starts anew.
static void close_chunk(const struct score *s, int64_t n_key, const struct buffers *b) {
    const int64_t width = s->plan.kernels->n_vector;
    for (int64_t r = 0; r < n_key; r++) {
        double sum = 0.0;
        for (int64_t l = 0; l < width; l++) {
            sum += (double)b->sums[r * width + l];
        }
        b->totals[r] += sum;
    }
    memset(b->sums, 0, (size_t)(s->n_block_key * width) * sizeof *b->sums);
}

// One query head: queries are the positions that count, keys the block's; tiles that see none are left out.
static void run_head(const struct score *s, const struct sl_sequence *sequence, int64_t h,
                     struct sl_range queries, struct sl_range keys, const struct buffers *b) {
    const struct sl_plan *plan = &s->plan;
    const struct sl_cpu_kernels *kernels = plan->kernels;
    const int64_t d = plan->d_head, lanes = kernels->n_lane, n_kword = d / kernels->pair;
    const int64_t n_query = queries.hi - queries.lo, n_key = keys.hi - keys.lo;
    const struct sl_rows query = sl_plan_query_rows(plan, &s->args->query, sequence, h, queries.lo, n_query);
    const float *lse =
        (const float *)s->args->lse.data + (sequence->batch * plan->n_head + h) * plan->n_token;
    struct sl_range seeing[2];
    sl_pattern_query_ranges(&s->attention.pattern, false, keys, sequence->length, seeing);
    const int64_t first_tile = sl_max(0, seeing[0].lo - queries.lo) / lanes;
    for (int64_t tile = first_tile; tile * lanes < n_query; tile++) {
        const int64_t i = tile * lanes, n = sl_min(lanes, n_query - i);
        const int64_t diagonal = queries.lo + i - keys.lo; // row of the tile's first query
        const int64_t end = sl_min(n_key, diagonal + n);
        const int live = (int)((n + kernels->n_vector - 1) / kernels->n_vector);
        for (int64_t l = 0; l < lanes; l++) {
            b->lse2[l] = l < n ? lse[sl_rows_token(&query, i + l)] * LOG2_E : FLT_MAX;
        }
        kernels->pack_lanes(&query, d, i, s->args->scale < 0.0, b->q_lanes);
        sl_rows_prefetch(&query, i + lanes, lanes, d);
        kernels->column_sums(live, b->k_rows, n_kword, b->q_lanes,
                             (end + SL_ROW_BLOCK - 1) / SL_ROW_BLOCK * SL_ROW_BLOCK, diagonal,
                             sl_plan_scale2(plan), b->lse2, b->sums);
        if ((tile + 1) % CHUNK_TILES == 0) {
            close_chunk(s, n_key, b);
        }
    }
    close_chunk(s, n_key, b);
}

static void run_item(void *context, int64_t item, int worker) {
    const struct score *s = context;
    const struct sl_plan *plan = &s->plan;
    // The first keys are seen by the most queries: they come first.
    const int64_t block = item / (plan->n_sequence * plan->n_head_kv);
    const struct sl_sequence *sequence = &plan->sequence[item / plan->n_head_kv % plan->n_sequence];
    const int64_t hk = item % plan->n_head_kv, ratio = plan->n_head / plan->n_head_kv;
    const struct sl_range keys = {block * s->n_block_key,
                                  sl_min((block + 1) * s->n_block_key, sequence->length)};
    const int64_t window = s->args->window ? s->args->window : INT64_MAX;
    const struct sl_range queries = {
        sl_max(sequence->n_past, sequence->length - sl_min(window, sequence->length)), sequence->length};
    if (keys.lo >= keys.hi || queries.lo >= queries.hi) {
        return;
    }
    struct sl_scratch scratch = {s->scratch + worker * s->slice, 0};
    const struct buffers b = cut(s, &scratch);
    const int64_t n_key = keys.hi - keys.lo;
    const struct sl_rows key = sl_plan_rows(&s->args->key, sequence, hk, 0, keys.lo, n_key);
    plan->kernels->pack_rows(&key, plan->d_head, 0, (n_key + SL_ROW_BLOCK - 1) / SL_ROW_BLOCK * SL_ROW_BLOCK,
                             b.k_rows);
    memset(b.sums, 0, (size_t)(s->n_block_key * plan->kernels->n_vector) * sizeof *b.sums);
    memset(b.totals, 0, (size_t)s->n_block_key * sizeof *b.totals);
    for (int64_t h = hk * ratio; h < (hk + 1) * ratio; h++) {
        run_head(s, sequence, h, queries, keys, &b);
    }
    float *scores = (float *)s->args->scores.data + (sequence->batch * plan->n_head_kv + hk) * plan->n_key;
    for (int64_t r = 0; r < n_key; r++) {
        scores[sl_rows_token(&key, r)] = (float)(s->args->mean ? b.totals[r] / (double)ratio : b.totals[r]);
    }
}

int64_t sl_cpu_h2o_score_workspace(const struct sl_h2o_score_args *args, int n_thread) {
    struct score s;
    n_thread = prepare(&s, args, n_thread);
    return 64 + (sl_plan_bytes(&s.plan) + 63) / 64 * 64 + n_thread * s.slice;
}

enum sl_status sl_cpu_h2o_score(const struct sl_h2o_score_args *args, void *workspace, int64_t n_byte,
                                int n_thread, struct sl_error *err) {
    const size_t score_bytes = (size_t)sl_tensor_count(&args->scores) * sizeof(float);
    if (sl_tensor_count(&args->query) == 0) {
        memset(args->scores.data, 0, score_bytes);
        return SL_OK;
    }
    struct score s;
    struct sl_scratch scratch = {sl_align(workspace), 0};
    n_thread = prepare(&s, args, n_thread);
    void *memory = sl_scratch_take(&scratch, sl_plan_bytes(&s.plan));
    s.scratch = sl_scratch_take(&scratch, n_thread * s.slice);
    if (64 + scratch.used > n_byte || !sl_plan_fill(&s.plan, memory)) {
        return sl_error_set(err, SL_RUNTIME, "workspace: expected %lld bytes, got %lld",
                            (long long)(64 + scratch.used), (long long)n_byte);
    }
    memset(args->scores.data, 0, score_bytes); // what no item writes: padding
    sl_parallel_for(s.n_block * s.plan.n_sequence * s.plan.n_head_kv, n_thread, run_item, &s);
    return SL_OK;
}
