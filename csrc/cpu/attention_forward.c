// SF-Attn forward. Each unit packs the keys and values that its queries may see once, for all its query
// heads; then every tile of queries walks them in steps of SL_KEY_TILE with an online softmax. Sinks are the
// first rows of the packed keys, so they share the one softmax. Without an output, values are left alone.
//
// Where few long sequences are split among threads by heads and queries, every item would pack the same keys:
// there they are packed once for all items, in tiles.
#include "parallel.h"
#include "plan.h"

#include <float.h>
#include <math.h>

static const float LN_2 = 0.693147180559945309f;

struct forward {
    struct sl_plan plan;
    char *scratch; // one slice a worker
    int64_t slice;
    int64_t n_tile; // key tiles of a key/value head that are packed for all items; 0: each item packs its own
    char *packed;   // [sequence][n_head_kv][n_tile] of tile_bytes: k_rows, then v_panels of the tile
};

// A worker's memory.
struct buffers {
    sl_word *k_rows;   // [n_key_rows][n_kword]; like v_panels, only where keys are not packed for all items
    sl_word *v_panels; // [d / 8][n_key_rows / pair][8]; like sums, only where there is an output
    sl_word *q_lanes;  // [n_kword][n_lane]
    float *sums;       // [d][n_lane]
    float *scores;     // [SL_KEY_TILE][n_lane]
    sl_word *weights;  // [SL_KEY_TILE / pair][n_lane]; the scores' memory where pair is 1
};

// Packed keys of an item, and how they go on from one tile of SL_KEY_TILE keys to the next.
struct packed {
    const sl_word *k_rows;
    const sl_word *v_panels;
    int64_t k_step;       // words
    int64_t v_step;       // words
    int64_t panel_stride; // words from panel to panel of a tile
};

static int64_t key_rows(const struct sl_plan *plan) {
    return (sl_plan_max_keys(plan) + SL_ROW_BLOCK - 1) / SL_ROW_BLOCK * SL_ROW_BLOCK;
}

// Key tiles to be packed for all items: where items share all of their keys, and are more than the heads.
static int64_t count_tiles(const struct sl_plan *plan) {
    const struct sl_attention_args *a = plan->args;
    const bool one_group = sl_pattern_group_count(&a->pattern, false, plan->n_key) == 1 &&
                           plan->first_shifted == plan->n_head && a->pattern.n_sink == 0;
    const bool split = plan->split_heads && (plan->n_head > plan->n_head_kv || plan->q_chunk != INT64_MAX);
    if (!one_group || !split || sl_tensor_given(&a->cu_seqlens) || sl_tensor_given(&a->position_ids)) {
        return 0;
    }
    return (plan->n_key + SL_KEY_TILE - 1) / SL_KEY_TILE;
}

static int64_t tile_bytes(const struct sl_plan *plan) {
    const int64_t k_bytes = SL_KEY_TILE * (plan->d_head / plan->kernels->pair) * (int64_t)sizeof(sl_word);
    return sl_tensor_given(&plan->args->value) ? 2 * k_bytes : k_bytes;
}

static struct buffers cut(const struct sl_plan *plan, struct sl_scratch *scratch) {
    const int64_t rows = key_rows(plan), word = sizeof(sl_word), lanes = plan->kernels->n_lane;
    const int64_t pair = plan->kernels->pair, row_bytes = plan->d_head / pair * word;
    const int64_t tile = sl_min(SL_KEY_TILE, rows);
    const int64_t output = sl_tensor_given(&plan->args->output), own = count_tiles(plan) == 0;
    struct buffers b;
    b.k_rows = sl_scratch_take(scratch, own * rows * row_bytes);
    b.v_panels = sl_scratch_take(scratch, own * output * rows * row_bytes);
    b.q_lanes = sl_scratch_take(scratch, row_bytes * lanes);
    b.sums = sl_scratch_take(scratch, output * plan->d_head * lanes * word);
    b.scores = sl_scratch_take(scratch, tile * lanes * word);
    b.weights = pair == 1 ? (sl_word *)b.scores : sl_scratch_take(scratch, tile / pair * lanes * word);
    return b;
}

static int64_t slice_bytes(const struct sl_plan *plan) {
    struct sl_scratch scratch = {NULL, 0};
    cut(plan, &scratch);
    return (scratch.used + 255) / 256 * 256; // workers do not share cache lines, nor prefetched pairs of them
}

// Writes one tile's output rows (where there is an output) and lse from its sums.
static void finish_tile(const struct sl_plan *plan, const struct sl_softmax *state, const float *sums,
                        const struct sl_rows *query, const struct sl_rows *output, int64_t i, int64_t n,
                        float *lse) {
    if (output->data) {
        float inverse[SL_MAX_LANES];
        for (int l = 0; l < plan->kernels->n_lane; l++) {
            inverse[l] = 1.0f / state->sum[l];
        }
        plan->kernels->unpack_lanes(sums, inverse, plan->d_head, output, i, n);
    }
    for (int64_t l = 0; l < n; l++) {
        lse[sl_rows_token(query, i + l)] = (state->max[l] + log2f(state->sum[l])) * LN_2;
    }
}

// All tiles of one query head against the packed keys of a unit.
static void run_head(const struct sl_plan *plan, const struct sl_item *item, const struct sl_unit *unit,
                     int64_t h, int64_t n_key, const struct packed *packed, const struct buffers *b) {
    const struct sl_cpu_kernels *kernels = plan->kernels;
    const struct sl_attention_args *a = plan->args;
    const int64_t d = plan->d_head, lanes = kernels->n_lane, n_query = unit->queries.hi - unit->queries.lo;
    const int64_t n_kword = d / kernels->pair;
    const struct sl_rows query =
        sl_plan_query_rows(plan, &a->query, item->sequence, h, unit->queries.lo, n_query);
    struct sl_rows output = {0};
    if (sl_tensor_given(&a->output)) {
        output = sl_plan_query_rows(plan, &a->output, item->sequence, h, unit->queries.lo, n_query);
    }
    float *lse = (float *)a->lse.data + (item->sequence->batch * plan->n_head + h) * plan->n_token;
    const float scale2 = sl_plan_scale2(plan);
    for (int64_t i = 0; i < n_query; i += lanes) {
        const int64_t n = sl_min(lanes, n_query - i);
        // Rows after the tile's last query hide behind the diagonal.
        const int64_t ahead =
            unit->n_sink + unit->queries.lo + i - unit->keys.lo; // row of the tile's first query
        const int64_t end = unit->diagonal ? ahead + n : n_key;
        const int live = (int)((n + kernels->n_vector - 1) / kernels->n_vector);
        struct sl_softmax state;
        float top[SL_MAX_LANES];
        for (int l = 0; l < lanes; l++) {
            state.max[l] = -FLT_MAX;
            state.sum[l] = 0.0f;
        }
        kernels->pack_lanes(&query, d, i, a->scale < 0.0, b->q_lanes);
        sl_rows_prefetch(&query, i + lanes, lanes, d);
        if (output.data) {
            sl_rows_prefetch(&output, i, n, d);
        }
        for (int64_t k = 0; k < end; k += SL_KEY_TILE) {
            const int64_t rows =
                (sl_min(SL_KEY_TILE, end - k) + SL_ROW_BLOCK - 1) / SL_ROW_BLOCK * SL_ROW_BLOCK;
            const int64_t diagonal = unit->diagonal ? ahead - k : SL_NO_DIAGONAL, limit = n_key - k;
            const int64_t tile = k / SL_KEY_TILE;
            kernels->scores(live, packed->k_rows + tile * packed->k_step, n_kword, b->q_lanes, rows, diagonal,
                            limit, b->scores, top);
            kernels->softmax(live, b->scores, top, rows, diagonal, limit, scale2, &state, b->weights);
            if (output.data) {
                kernels->lanes_add(live, packed->v_panels + tile * packed->v_step, packed->panel_stride,
                                   b->weights, rows, diagonal, state.rescale, k == 0, d, b->sums);
            }
        }
        finish_tile(plan, &state, b->sums, &query, &output, i, n, lse);
    }
}

static char *packed_tile(const struct forward *f, int64_t sequence, int64_t hk, int64_t tile) {
    return f->packed + ((sequence * f->plan.n_head_kv + hk) * f->n_tile + tile) * tile_bytes(&f->plan);
}

// Packs one tile for all items.
static void pack_tile(void *context, int64_t i, int worker) {
    const struct forward *f = context;
    const struct sl_plan *plan = &f->plan;
    const int64_t tile = i % f->n_tile, hk = i / f->n_tile % plan->n_head_kv;
    const int64_t s = i / f->n_tile / plan->n_head_kv, first = tile * SL_KEY_TILE;
    const struct sl_sequence *sequence = &plan->sequence[s];
    const int64_t count = sl_min(SL_KEY_TILE, sequence->length - first);
    (void)worker;
    if (count <= 0) {
        return;
    }
    sl_word *out = (sl_word *)packed_tile(f, s, hk, tile);
    const struct sl_rows key = sl_plan_rows(&plan->args->key, sequence, hk, 0, first, count);
    plan->kernels->pack_rows(&key, plan->d_head, 0, SL_KEY_TILE, out);
    if (sl_tensor_given(&plan->args->value)) {
        const struct sl_rows value = sl_plan_rows(&plan->args->value, sequence, hk, 0, first, count);
        plan->kernels->pack_panels(&value, plan->d_head, SL_KEY_TILE,
                                   out + SL_KEY_TILE * (plan->d_head / plan->kernels->pair));
    }
}

// The first n_key keys of a unit, packed for all items or now into the worker's memory.
static struct packed pack_unit(const struct forward *f, const struct sl_item *item,
                               const struct sl_unit *unit, int64_t n_key, const struct buffers *b) {
    const struct sl_plan *plan = &f->plan;
    const struct sl_cpu_kernels *kernels = plan->kernels;
    const int64_t d = plan->d_head, pair = kernels->pair, tile_words = SL_KEY_TILE * (d / pair);
    if (f->n_tile) {
        const sl_word *first =
            (const sl_word *)packed_tile(f, item->sequence - plan->sequence, item->heads.hk, 0);
        const int64_t step = tile_bytes(plan) / (int64_t)sizeof *first;
        return (struct packed){first, first + tile_words, step, step, SL_KEY_TILE / pair * 8};
    }
    const int64_t rows = (n_key + SL_ROW_BLOCK - 1) / SL_ROW_BLOCK * SL_ROW_BLOCK;
    const struct sl_rows key =
        sl_plan_rows(&plan->args->key, item->sequence, item->heads.hk, unit->n_sink, unit->keys.lo, n_key);
    kernels->pack_rows(&key, d, 0, rows, b->k_rows);
    if (sl_tensor_given(&plan->args->value)) {
        const struct sl_rows value = sl_plan_rows(&plan->args->value, item->sequence, item->heads.hk,
                                                  unit->n_sink, unit->keys.lo, n_key);
        kernels->pack_panels(&value, d, rows, b->v_panels);
    }
    return (struct packed){b->k_rows, b->v_panels, tile_words, SL_KEY_TILE / pair * 8, rows / pair * 8};
}

static void run_item(void *context, int64_t i, int worker) {
    const struct forward *f = context;
    const struct sl_plan *plan = &f->plan;
    const struct sl_item item = sl_plan_item(plan, i);
    struct sl_scratch scratch = {f->scratch + worker * f->slice, 0};
    const struct buffers b = cut(plan, &scratch);
    for (int64_t g = item.groups.lo; g < item.groups.hi; g++) {
        const struct sl_unit unit = sl_item_unit(plan, &item, g);
        if (unit.queries.lo >= unit.queries.hi) {
            continue;
        }
        const int64_t key_end = unit.diagonal ? unit.queries.hi : unit.keys.hi;
        const int64_t n_key = unit.n_sink + key_end - unit.keys.lo;
        const struct packed packed = pack_unit(f, &item, &unit, n_key, &b);
        for (int64_t h = item.heads.h0; h < item.heads.h1; h++) {
            run_head(plan, &item, &unit, h, n_key, &packed, &b);
        }
    }
}

// Padded rows: output 0, lse -infinity (the neutral element of merging).
static void fill_padding(const struct sl_plan *plan) {
    const struct sl_attention_args *a = plan->args;
    if (sl_tensor_given(&a->output)) {
        sl_plan_zero_padding(plan, &a->output);
    }
    for (int64_t i = 0; sl_tensor_given(&a->padding_mask) && i < sl_tensor_count(&a->lse); i++) {
        if (!sl_plan_kept(plan, i / (plan->n_head * plan->n_token), a->n_past + i % plan->n_token)) {
            ((float *)a->lse.data)[i] = -INFINITY;
        }
    }
}

static int64_t packed_bytes(const struct sl_plan *plan) {
    return plan->max_sequence * plan->n_head_kv * count_tiles(plan) * tile_bytes(plan);
}

int64_t sl_cpu_attention_forward_workspace(const struct sl_attention_args *args, int n_thread) {
    struct sl_plan plan;
    n_thread = sl_plan_threads(args, n_thread);
    sl_plan_init(&plan, args, n_thread, false);
    return 64 + (sl_plan_bytes(&plan) + 63) / 64 * 64 + n_thread * slice_bytes(&plan) + packed_bytes(&plan);
}

enum sl_status sl_cpu_attention_forward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                        int n_thread, struct sl_error *err) {
    struct forward f;
    struct sl_scratch scratch = {sl_align(workspace), 0};
    n_thread = sl_plan_threads(args, n_thread);
    sl_plan_init(&f.plan, args, n_thread, false);
    void *memory = sl_scratch_take(&scratch, sl_plan_bytes(&f.plan));
    f.slice = slice_bytes(&f.plan);
    f.scratch = sl_scratch_take(&scratch, n_thread * f.slice);
    f.n_tile = count_tiles(&f.plan);
    f.packed = sl_scratch_take(&scratch, packed_bytes(&f.plan));
    if (64 + scratch.used > n_byte || !sl_plan_fill(&f.plan, memory)) {
        return sl_error_set(err, SL_RUNTIME, "cu_seqlens, position_ids: changed while the operation ran");
    }
    fill_padding(&f.plan);
    sl_parallel_for(f.plan.n_sequence * f.plan.n_head_kv * f.n_tile, n_thread, pack_tile, &f);
    sl_parallel_for(f.plan.n_item, n_thread, run_item, &f);
    return SL_OK;
}
