// Scores of a prompt on CUDA: sequences, one kernel over tiles of keys, and where it was cut into parts, a
// second one that adds them.
#include "kernels.h"

#include "simt/tile_config.h"
#include "sm80/h2o_score_config.h"

enum {
    THREADS = 256,
    MOST_BLOCKS = 1024, // fewer blocks than this are cut: about four times what a large GPU runs at once
};

static struct sl_sequence_source source_of(const struct sl_h2o_score_args *a) {
    const int keys = a->query.dtype == SL_F32 ? (int)SL_SIMT_ROWS : (int)SL_SCORE_KEYS;
    const struct sl_sequence_source source = {
        a->query.shape[0], a->query.shape[2], a->key.shape[2], NULL, &a->padding_mask, NULL, keys, keys};
    return source;
}

static int64_t score_rows(const struct sl_h2o_score_args *a) {
    return a->key.shape[0] * a->key.shape[1];
}

static void fill_params(const struct sl_h2o_score_args *a, struct sl_device_scratch *scratch,
                        struct sl_score_params *p) {
    const struct sl_sequence_source source = source_of(a);
    const int64_t window = a->window ? sl_min(a->window, source.n_query) : source.n_query;
    const int64_t n_chunk = sl_ceil_div(window, SL_SCORE_CHUNK);
    const int64_t n_tile = sl_ceil_div(source.n_key, source.key_tile);
    const int64_t wanted = sl_ceil_div(MOST_BLOCKS, n_tile * score_rows(a));
    const int64_t part_chunk = sl_ceil_div(n_chunk, sl_min(wanted, n_chunk));
    p->query = sl_heads_of(&a->query, scratch);
    p->key = sl_heads_of(&a->key, scratch);
    p->lse = (const float *)a->lse.data;
    p->scores = (float *)a->scores.data;
    p->sequences = sl_sequences_of(&source, scratch);
    p->window = (int32_t)window;
    p->n_tile = (int32_t)n_tile;
    p->part_chunk = (int32_t)part_chunk;
    p->n_part = (int32_t)sl_ceil_div(n_chunk, part_chunk);
    p->partial = NULL;
    if (p->n_part > 1) {
        p->partial = (float *)sl_device_take(scratch, n_chunk * score_rows(a) * source.n_key * 4);
    }
    p->n_head = (int32_t)a->query.shape[1];
    p->n_head_kv = (int32_t)a->key.shape[1];
    p->d_head = (int32_t)a->query.shape[3];
    p->scale2 = sl_cuda_scale2(a->scale);
    p->negative = a->scale < 0;
    p->factor = a->mean ? (double)p->n_head_kv / p->n_head : 1.0;
}

extern "C" int64_t sl_cuda_h2o_score_workspace(const struct sl_h2o_score_args *a) {
    struct sl_device_scratch scratch = sl_device_scratch_in(NULL);
    struct sl_score_params p;
    fill_params(a, &scratch, &p);
    return scratch.used + 256;
}

// ---- the sums of parts ----

struct parts_params {
    struct sl_score_params score; // as without parts
    const float *partial;
};

// A thread a key, a block a key tile.
static __global__ void __launch_bounds__(THREADS) add_parts(const __grid_constant__ struct parts_params p) {
    struct sl_score_item item;
    if (!sl_score_item_find(&p.score, &item)) {
        return;
    }
    for (int k = item.k0 + (int)threadIdx.x; k < item.k_end; k += THREADS) {
        const float *sum = p.partial + sl_score_at(&p.score, &item, k);
        double total = 0;
        for (int c = item.c0; c < item.c_end; c++) {
            total += (double)sum[c * sl_score_chunk_stride(&p.score)];
        }
        sl_score_finish(&p.score, &item, k, total);
    }
}

static enum sl_status run_parts(const struct sl_cuda_call *call, const struct sl_score_params *p) {
    if (!p->partial) {
        return SL_OK;
    }
    struct parts_params parts = {*p, p->partial};
    parts.score.partial = NULL;
    parts.score.part_chunk *= p->n_part;
    parts.score.n_part = 1;
    return sl_cuda_launch(call, "add_parts", add_parts, sl_score_blocks_of(&parts.score), THREADS, 0, parts);
}

// ---- columns that nobody sees ----

struct zero_params {
    float *data;
    int64_t n;
};

static __global__ void __launch_bounds__(THREADS) zero_scores(const __grid_constant__ struct zero_params p) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at < p.n) {
        p.data[at] = 0;
    }
}

static enum sl_status run_without_queries(const struct sl_cuda_call *call, const struct sl_tensor *scores) {
    const struct zero_params p = {(float *)scores->data, sl_tensor_count(scores)};
    return sl_cuda_launch(call, "zero_scores", zero_scores, sl_ceil_div(p.n, THREADS), THREADS, 0, p);
}

static enum sl_status clear_padding(const struct sl_cuda_call *call, const struct sl_h2o_score_args *a) {
    const struct sl_sequence_source source = source_of(a);
    struct sl_tensor rows = a->scores; // of one element
    rows.n_dim = 4;
    rows.stride[2] = rows.shape[3] = rows.stride[3] = 1;
    rows.stride[1] = rows.shape[2];
    rows.stride[0] = rows.shape[1] * rows.shape[2];
    return sl_sequences_clear_padding(call, &source, &rows, NULL);
}

// ---- the operation ----

static enum sl_status run(const struct sl_cuda_call *call, const struct sl_h2o_score_args *a,
                          const struct sl_score_params *p) {
    const struct sl_sequence_source source = source_of(a);
    SL_TRY(sl_sequences_find(call, &source, &p->sequences));
    SL_TRY(sl_heads_load(call, &a->query, &p->query));
    SL_TRY(sl_heads_load(call, &a->key, &p->key));
    SL_TRY(a->query.dtype == SL_BF16  ? sl_sm80_h2o_score_bf16(call, p)
           : a->query.dtype == SL_F16 ? sl_sm80_h2o_score_f16(call, p)
                                      : sl_simt_h2o_score(call, p));
    SL_TRY(run_parts(call, p));
    return clear_padding(call, a);
}

extern "C" enum sl_status sl_cuda_h2o_score(const struct sl_h2o_score_args *a, void *workspace,
                                            int64_t n_byte, struct sl_error *err) {
    (void)n_byte;
    struct sl_cuda_call call;
    SL_TRY(sl_cuda_begin(&call, &a->query, a->stream, err));
    if (sl_tensor_count(&a->query) == 0) {
        return sl_cuda_end(&call, run_without_queries(&call, &a->scores));
    }
    struct sl_device_scratch scratch = sl_device_scratch_in(workspace);
    struct sl_score_params p;
    fill_params(a, &scratch, &p);
    return sl_cuda_end(&call, run(&call, a, &p));
}
