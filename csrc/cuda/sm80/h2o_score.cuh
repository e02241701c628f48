// Scores of a prompt for 16-bit floats, sm_80 mechanics: S^T = K Q^T once more, and its rows' sums. A warp
// holds 32 keys as A fragments in registers for the whole block; tiles of queries are copied one ahead.
#include "../h2o_score_params.cuh"
#include "../ptx/convert.cuh"
#include "../ptx/minimum.cuh"
#include "copy.cuh"
#include "h2o_score_config.h"

// The tile of queries in progress: chunk by chunk, in a chunk head by head.
struct query_walk {
    int c, h; // h counts from the key head's first query head
    int q0, q_end;
};

SL_DEV void walk_chunk(struct query_walk *w, const struct sl_score_item *item) {
    const struct sl_range chunk = sl_score_chunk(item, w->c);
    w->q0 = (int)chunk.lo;
    w->q_end = (int)chunk.hi;
}

template <int TILE>
SL_DEV bool walk_next(struct query_walk *w, const struct sl_score_item *item, int n_head) {
    w->q0 += TILE;
    if (w->q0 < w->q_end) {
        return true;
    }
    w->c += w->h + 1 == n_head;
    w->h = w->h + 1 == n_head ? 0 : w->h + 1;
    walk_chunk(w, item);
    return w->c < item->c_end;
}

// ---- copies ----

// Starts the copy of the rows of positions first .. end-1, at most ROWS, of a head whose sequence begins at
// `from`. Others become zeros, as do the elements beyond d_head.
template <int D, int ROWS>
SL_DEV void load_rows(uint32_t to, const char *from, int64_t stride, const int32_t *index, int first, int end,
                      int d_head) {
    constexpr int LANES = sl_copy_lanes(D);
    if (!index && first + ROWS <= end) {
        const char *row = sl_address(from, 2 * (first + (int)threadIdx.x / LANES), (int)stride);
        sl_copy_whole<D, ROWS, SL_SCORE_THREADS>(to, row, stride * (2 * SL_SCORE_THREADS / LANES),
                                                 sl_copy_chunks<D>(d_head));
    } else {
        sl_copy_ragged<D, ROWS, SL_SCORE_THREADS>(to, from, stride, index, first, end, d_head);
    }
    sl_cp_async_commit();
}

// This warp's keys as A fragments, by way of both stages' memory, which may hold a part of them at a time.
template <int D>
SL_DEV void load_keys(uint32_t kf[2][D / 16][4], uint32_t tile, const struct sl_score_params *p,
                      const struct sl_score_item *item) {
    constexpr int ROWS = 2 * sl_score_queries(D);
    const int lane = threadIdx.x & 31, row = (int)(threadIdx.x >> 5) * SL_SCORE_WARP_KEYS;
    const int32_t *index = item->work.index;
    const char *from = sl_copy_from<D>(&p->key, item->work.batch, item->hk, index ? 0 : item->work.first);
    const uint32_t sign = p->negative ? 0x80008000u : 0;
    for (int first = 0; first < SL_SCORE_KEYS; first += ROWS) {
        if (first) {
            __syncthreads(); // the rows before are read
        }
        sl_copy_ragged<D, ROWS, SL_SCORE_THREADS>(sl_copy_to<D>(tile), from, p->key.token, index,
                                                  item->k0 + first, item->k_end, p->d_head);
        sl_cp_async_commit();
        sl_cp_async_wait<0>();
        __syncthreads();
        if (row < first || row >= first + ROWS) { // the whole warp
            continue;
        }
        const uint32_t rows = sl_tile_at<D>(tile, row - first + (lane & 15), lane >> 4);
        SL_UNROLL for (int m = 0; m < 2; m++) {
            SL_UNROLL for (int kk = 0; kk < D / 16; kk++) {
                sl_ldmatrix_x4(kf[m][kk], sl_tile_step<D>(rows + m * 16 * D * 2, kk * 2));
                SL_UNROLL for (int j = 0; j < 4; j++) {
                    kf[m][kk][j] ^= sign;
                }
            }
        }
    }
    __syncthreads();
}

// Where tiles of queries of a key head come from, and where they go.
struct query_source {
    const char *query; // of the first of its heads
    const float *lse;
    int past; // columns without queries
    uint32_t rows, lses;
};

template <int D>
SL_DEV struct query_source query_source_of(const struct sl_score_params *p, const struct sl_score_item *item,
                                           uint32_t shared) {
    const int past = p->sequences.n_key - p->sequences.n_query, h0 = item->hk * (p->n_head / p->n_head_kv);
    const int begin = (item->work.index ? 0 : item->work.first) - past;
    return query_source{sl_copy_from<D>(&p->query, item->work.batch, h0, begin),
                        p->lse + (item->work.batch * p->n_head + h0) * p->sequences.n_query, past,
                        sl_copy_to<D>(shared), shared + 2 * sl_score_queries(D) * D * 2};
}

template <int D>
SL_DEV void load_queries(const struct query_source *source, const struct sl_score_params *p,
                         const struct sl_score_item *item, const struct query_walk *w, int stage) {
    constexpr int MQ = sl_score_queries(D);
    load_rows<D, MQ>(source->rows + stage * MQ * D * 2, source->query + w->h * p->query.head * 2,
                     p->query.token, item->work.index, w->q0, w->q_end, p->d_head);
}

// A thread a query.
template <int D>
SL_DEV float load_lse(const struct query_source *source, const struct sl_score_params *p,
                      const struct sl_score_item *item, const struct query_walk *w) {
    const int q = w->q0 + (int)threadIdx.x;
    float x = -INFINITY;
    if (threadIdx.x < sl_score_queries(D) && q < w->q_end) {
        x = source->lse[(int64_t)w->h * p->sequences.n_query + sl_work_column(&item->work, q) - source->past];
    }
    return x;
}

// Where the lse of query x of a tile stands: a thread reads those of its four columns of 16 at once.
SL_DEV int lse_slot(int x) {
    return (x & ~15) + ((x & 7) >> 1) * 4 + ((x & 15) >> 3) * 2 + (x & 1);
}

SL_DEV uint32_t as_word(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

template <int D> SL_DEV void store_lse(const struct query_source *source, float x, int stage) {
    constexpr int MQ = sl_score_queries(D);
    if (threadIdx.x < MQ) {
        sl_st_shared_b32(source->lses + (stage * MQ + lse_slot(threadIdx.x)) * 4,
                         as_word(sl_score_negated_lse2(x)));
    }
}

// ---- sums ----

SL_DEV float as_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// What a thread reads of a tile of queries: its row of B fragments, its lse.
struct query_tile {
    uint32_t rows, lse;
};

// Adds the probabilities of queries x .. x+15 of a tile to sum[16 keys][row g, g + 8][even, odd queries].
// Where MASKED, this thread's first column is query q + x and its first row key k.
template <enum sl_dtype DTYPE, int D, bool MASKED>
SL_DEV void add_queries(float sum[2][2][2], const uint32_t kf[2][D / 16][4], const struct query_tile *tile,
                        int x, float scale2, const struct sl_pattern *pattern, int q, int k) {
    float s[2][2][4] = {};
    SL_UNROLL for (int kk = 0; kk < D / 16; kk++) {
        uint32_t qf[4]; // queries 0-7: d 0-7, d 8-15; queries 8-15: d 0-7, d 8-15
        sl_ldmatrix_x4(qf, sl_tile_step<D>(tile->rows, kk * 2) + x * D * 2);
        SL_UNROLL for (int m = 0; m < 2; m++) {
            sl_mma_16816<DTYPE>(s[m][0], kf[m][kk], qf);
            sl_mma_16816<DTYPE>(s[m][1], kf[m][kk], qf + 2);
        }
    }
    const uint4 word = sl_ld_shared_v4(tile->lse + x * 4);
    const float base[2][2] = {{as_float(word.x), as_float(word.y)}, {as_float(word.z), as_float(word.w)}};
    SL_UNROLL for (int m = 0; m < 2; m++) {
        SL_UNROLL for (int r = 0; r < 2; r++) {
            const int first = (int)sl_pattern_first_query(pattern, false, k + m * 16 + r * 8);
            SL_UNROLL for (int n = 0; n < 2; n++) {
                SL_UNROLL for (int j = 0; j < 2; j++) {
                    // The rounding of a large lse may not make a probability of more than 1.
                    const float below = fmaf(s[m][n][r * 2 + j], scale2, base[n][j]);
                    const float prob = sl_exp2(sl_min_nan(below, 0));
                    sum[m][r][j] += !MASKED || q + x + n * 8 + j >= first ? prob : 0;
                }
            }
        }
    }
}

// Adds a tile of queries q0 .. q_end-1 (or as many as it has) to the sums of the warp's keys from k on.
template <enum sl_dtype DTYPE, int D>
SL_DEV void add_tile(float sum[2][2][2], const uint32_t kf[2][D / 16][4], const struct query_tile *tile,
                     const struct sl_score_params *p, int q0, int q_end, int k) {
    constexpr int MQ = sl_score_queries(D);
    // Products of one half run beside the exponentials of the other, or beside those of another block.
    constexpr int STEP = sl_score_blocks(D) > 1 ? 16 : 32;
    const int lane = threadIdx.x & 31;
    const struct sl_pattern pattern = sl_score_pattern(p);
    // Queries before q_some see none of the keys, those from q_all on all of them.
    const int q_some = (int)sl_pattern_first_query(&pattern, false, k);
    const int q_all = (int)sl_pattern_first_query(&pattern, false, k + SL_SCORE_WARP_KEYS - 1);
    if (q0 >= q_all && q0 + MQ <= q_end) {
        SL_ROLLED for (int x = 0; x < MQ; x += STEP) {
            SL_UNROLL for (int y = 0; y < STEP; y += 16) {
                add_queries<DTYPE, D, false>(sum, kf, tile, x + y, p->scale2, &pattern, 0, 0);
            }
        }
    } else {
        const int q = q0 + (lane & 3) * 2, end = min(MQ, q_end - q0);
        SL_ROLLED for (int x = max(0, q_some - q0) & ~15; x < end; x += 16) {
            add_queries<DTYPE, D, true>(sum, kf, tile, x, p->scale2, &pattern, q, k + (lane >> 2));
        }
    }
}

// The sum over the lanes that share keys; lane (g, t) gets that of key g + 8 t of its warp. Starts anew.
SL_DEV float take_sum(float sum[2][2][2]) {
    float own = 0;
    SL_UNROLL for (int i = 0; i < 4; i++) {
        float *part = sum[i >> 1][i & 1], all = part[0] + part[1];
        all += __shfl_xor_sync(0xffffffffu, all, 1);
        all += __shfl_xor_sync(0xffffffffu, all, 2);
        own = (int)(threadIdx.x & 3) == i ? all : own;
        part[0] = part[1] = 0;
    }
    return own;
}

template <enum sl_dtype DTYPE, int D>
static __global__ void __launch_bounds__(SL_SCORE_THREADS, sl_score_blocks(D))
    h2o_score(const __grid_constant__ struct sl_score_params p) {
    constexpr int MQ = sl_score_queries(D);
    struct sl_score_item item;
    if (!sl_score_item_find(&p, &item)) {
        return; // the whole block
    }
    const int lane = threadIdx.x & 31, ratio = p.n_head / p.n_head_kv;
    const int k_warp = item.k0 + (int)(threadIdx.x >> 5) * SL_SCORE_WARP_KEYS;
    const int k_own = k_warp + (lane >> 2) + 8 * (lane & 3); // whose sum take_sum gives
    const uint32_t shared = sl_shared_addr(SL_SHARED_BASE());
    const struct query_source source = query_source_of<D>(&p, &item, shared);
    const uint32_t own_row = sl_tile_at<D>(shared, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);

    uint32_t kf[2][D / 16][4];
    load_keys<D>(kf, shared, &p, &item);
    float sum[2][2][2] = {}, chunk_sum = 0, next_lse = 0;
    double total = 0;
    struct query_walk next = {item.c0, 0, 0, 0};
    walk_chunk(&next, &item);
    bool more = item.c0 < item.c_end;
    if (more) {
        load_queries<D>(&source, &p, &item, &next, 0);
        store_lse<D>(&source, load_lse<D>(&source, &p, &item, &next), 0);
    }
    for (int stage = 0; more; stage ^= 1) {
        const int q0 = next.q0, q_end = next.q_end;
        more = walk_next<MQ>(&next, &item, ratio);
        sl_cp_async_wait<0>(); // these queries have landed
        __syncthreads();       // for every warp, and the other stage is read
        if (more) {
            load_queries<D>(&source, &p, &item, &next, stage ^ 1);
            next_lse = load_lse<D>(&source, &p, &item, &next);
        }
        const struct query_tile tile = {own_row + stage * MQ * D * 2,
                                        source.lses + (stage * MQ + (lane & 3) * 4) * 4};
        add_tile<DTYPE, D>(sum, kf, &tile, &p, q0, q_end, k_warp);
        if (more) {
            store_lse<D>(&source, next_lse, stage ^ 1);
        }
        if (q0 + MQ >= q_end) { // the chunk's last tile of this head
            chunk_sum += take_sum(sum);
            if (!more || next.h == 0) { // and of all heads
                sl_score_add_chunk(&p, &item, k_own, more ? next.c - 1 : item.c_end - 1, chunk_sum, &total);
                chunk_sum = 0;
            }
        }
    }
    sl_score_finish(&p, &item, k_own, total);
}

template <enum sl_dtype DTYPE, int D>
static enum sl_status launch_score(const struct sl_cuda_call *call, const struct sl_score_params *p) {
    return sl_cuda_launch(call, "h2o_score", h2o_score<DTYPE, D>, sl_score_blocks_of(p), SL_SCORE_THREADS,
                          sl_score_shared(D), *p);
}
