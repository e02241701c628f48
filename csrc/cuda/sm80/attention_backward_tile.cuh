// One tile of queries against one tile of keys in the backward for 16-bit floats, sm_80 mechanics. All
// operands of the five products lie in shared memory: P and dS pass through it because the warps that compute
// them (two along the queries) are not those that sum dK and dV (along keys and columns) or dQ.
#pragma once

#include "../attention_backward_params.cuh"
#include "../ptx/convert.cuh"
#include "../ptx/widen.cuh"
#include "attention_backward_config.h"
#include "copy.cuh"

// Which part of each product a warp computes, by the head dimension. Columns of the gradients go to the warps
// in turn, 16 at a time.
template <int D> struct backward_plan {
    static constexpr int MQ = sl_backward_queries(D), MK = sl_backward_keys(D);
    static constexpr int WARPS = sl_backward_warps(D), THREADS = WARPS * 32;
    static constexpr int S_ROWS = MQ / 2, S_COLUMNS = MK / (WARPS / 2);
    static constexpr int COLUMN_WARPS = sl_backward_columns(D), N16 = D / COLUMN_WARPS / 16;
    static constexpr int ROW_WARPS = WARPS / COLUMN_WARPS;
    static constexpr int K_ROWS = MK / ROW_WARPS, Q_ROWS = MQ / ROW_WARPS;
};

// Tiles in shared memory; g holds dO. lse, delta and spans: a word a query. state: of backward_keys.
struct backward_tiles {
    uint32_t q, g, k, v, lse, delta, spans, state, ds, p;
};

template <int D> SL_DEV struct backward_tiles tiles_at(uint32_t base) {
    using plan = backward_plan<D>;
    struct backward_tiles t;
    t.q = base;
    t.g = t.q + plan::MQ * D * 2;
    t.k = t.g + plan::MQ * D * 2;
    t.v = t.k + plan::MK * D * 2;
    t.ds = t.v + plan::MK * D * 2;
    t.lse = t.ds + plan::MQ * plan::MK * 2;
    t.delta = t.lse + plan::MQ * 4;
    t.spans = t.delta + plan::MQ * 4;
    t.state = t.spans + plan::MQ * 4;
    t.p = t.state + SL_BACKWARD_STATE;
    return t;
}

// Where a lane reads fragments of 16 x 16 (then sl_tile_step, and rows in constants). An operand whose rows
// in memory run along k of the product is read transposed; which row and which half of 16 columns a lane
// points at depends on that and on the operand.
template <int D> SL_DEV uint32_t lane_straight(uint32_t tile, int row, int chunk) {
    const int lane = threadIdx.x & 31;
    return sl_tile_at<D>(tile, row + (lane & 15), chunk + (lane >> 4));
}

template <int D> SL_DEV uint32_t lane_crossed(uint32_t tile, int row, int chunk) {
    const int lane = threadIdx.x & 31;
    return sl_tile_at<D>(tile, row + (lane & 7) + ((lane >> 4) << 3), chunk + ((lane >> 3) & 1));
}

// acc += A B: M16 row blocks, N16 column blocks of 16, STEPS of 16 along k. a, b: a lane's addresses in
// operands whose rows have so many elements; B_STEP: chunks from one column block to the next where B is
// transposed.
template <enum sl_dtype DTYPE, int M16, int N16, int STEPS, int A_WIDTH, bool A_TRANS, int B_WIDTH,
          bool B_TRANS, int B_STEP>
SL_DEV void product(float (*acc)[N16 * 2][4], uint32_t a, uint32_t b) {
    SL_UNROLL for (int k = 0; k < STEPS; k++) {
        uint32_t af[M16][4];
        SL_UNROLL for (int m = 0; m < M16; m++) {
            if (A_TRANS) {
                sl_ldmatrix_x4_trans(af[m], sl_tile_step<A_WIDTH>(a, m * 2) + k * 32 * A_WIDTH);
            } else {
                sl_ldmatrix_x4(af[m], sl_tile_step<A_WIDTH>(a, k * 2) + m * 32 * A_WIDTH);
            }
        }
        SL_UNROLL for (int n = 0; n < N16; n++) {
            uint32_t bf[4];
            if (B_TRANS) {
                sl_ldmatrix_x4_trans(bf, sl_tile_step<B_WIDTH>(b, n * B_STEP) + k * 32 * B_WIDTH);
            } else {
                sl_ldmatrix_x4(bf, sl_tile_step<B_WIDTH>(b, k * 2) + n * 32 * B_WIDTH);
            }
            SL_UNROLL for (int m = 0; m < M16; m++) {
                sl_mma_16816<DTYPE>(acc[m][n * 2], af[m], bf);
                sl_mma_16816<DTYPE>(acc[m][n * 2 + 1], af[m], bf + 2);
            }
        }
    }
}

template <int M16, int N16> SL_DEV void clear(float (*acc)[N16 * 2][4]) {
    SL_UNROLL for (int m = 0; m < M16; m++) {
        SL_UNROLL for (int n = 0; n < N16 * 2; n++) {
            SL_UNROLL for (int j = 0; j < 4; j++) {
                acc[m][n][j] = 0;
            }
        }
    }
}

// Starts the copy of the rows of positions first .. end-1 (at most ROWS) of a head; others become zeros, as
// do the elements beyond d_head.
template <int D, int ROWS>
SL_DEV void load_rows(uint32_t tile, const struct sl_heads *t, const struct sl_work *work, int h, int first,
                      int end, int d_head) {
    constexpr int LANES = sl_copy_lanes(D), THREADS = backward_plan<D>::THREADS, PASS = THREADS / LANES;
    static_assert(ROWS % PASS == 0, "whole passes");
    const uint32_t to = sl_copy_to<D>(tile);
    const char *from = sl_copy_from<D>(t, work->batch, h, work->index ? 0 : work->first);
    if (first + ROWS > end || work->index) {
        sl_copy_ragged<D, ROWS, THREADS>(to, from, t->token, work->index, first, end, d_head);
        return;
    }
    const int row = threadIdx.x / LANES, chunk = threadIdx.x % LANES;
    const char *at = sl_address(from, 2 * (first + row), (int)t->token);
    SL_UNROLL for (int i = 0; i < ROWS / PASS; i++) {
        SL_UNROLL for (int j = 0; j < D / 8; j += LANES) {
            sl_cp_async_16(to + i * PASS * D * 2 + j * 16, at + j * 16, (chunk + j) * 8 < d_head ? 16 : 0);
        }
        at = sl_address(at, 2 * PASS, (int)t->token);
    }
}

// Row of the query tile that a lane's fragments of S and dP hold: r is 2 * row block + lower or upper half.
template <int D> SL_DEV int score_row(int r) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    return (warp & 1) * backward_plan<D>::S_ROWS + (r >> 1) * 16 + (lane >> 2) + (r & 1) * 8;
}

// Starts the copy of lse and delta of the queries q0 .. q_end-1; 0 beyond them, where everything is masked.
template <int D>
SL_DEV void load_sums(const struct backward_tiles *t, const struct sl_backward_params *p,
                      const struct sl_work *work, int h, int q0, int q_end) {
    constexpr int MQ = backward_plan<D>::MQ;
    const int row = threadIdx.x % MQ, q = q0 + row;
    if ((int)threadIdx.x < 2 * MQ) {
        const bool first = (int)threadIdx.x < MQ, in = q < q_end;
        const float *from = (first ? p->lse : p->delta) + (work->batch * p->n_head + h) * p->n_token;
        sl_cp_async_4((first ? t->lse : t->delta) + row * 4, from + (in ? sl_work_column(work, q) : 0),
                      in ? 4 : 0);
    }
}

// A masked tile: which keys each query may see, at most two ranges, as four bytes counted from k0.
template <int D>
SL_DEV void write_spans(const struct backward_tiles *t, const struct sl_pattern *pattern, bool shifted,
                        int q0, int q_end, int k0, int k_end, int n) {
    const int q = q0 + (int)threadIdx.x;
    if ((int)threadIdx.x < backward_plan<D>::MQ) {
        struct sl_range range[2];
        const int n_range =
            q < q_end ? sl_pattern_key_ranges(pattern, shifted, sl_range{q, q + 1}, n, range) : 0;
        uint32_t spans = 0;
        SL_UNROLL for (int i = 0; i < 2; i++) {
            const int lo = max((int)range[i].lo, k0), hi = min((int)range[i].hi, k_end);
            spans |= i < n_range && lo < hi ? (uint32_t)(lo - k0 + ((hi - k0) << 8)) << (16 * i) : 0;
        }
        sl_st_shared_b32(t->spans + threadIdx.x * 4, spans);
    }
}

// Bits lo .. hi-1 (0 .. 64) of a word that begins at bit `first`.
SL_DEV uint32_t span_bits(int lo, int hi, int first) {
    lo = max(lo - first, 0);
    hi = min(hi - first, 32);
    return lo < hi ? (0xffffffffu >> (32 - (hi - lo))) << lo : 0;
}

// From S and dP to P (where WITH_P) and dS in shared memory. What a row may not see is selected away at the
// end: its dP and the row's delta may be anything, infinite too.
template <enum sl_dtype DTYPE, int D, bool WITH_P, bool MASKED>
SL_DEV void finish_scores(const struct backward_tiles *t, float scale2,
                          float (*s)[backward_plan<D>::S_COLUMNS / 8][4],
                          float (*dp)[backward_plan<D>::S_COLUMNS / 8][4]) {
    using plan = backward_plan<D>;
    const int column = (threadIdx.x >> 6) * plan::S_COLUMNS, pair = (threadIdx.x & 3) * 2;
    SL_UNROLL for (int r = 0; r < plan::S_ROWS / 8; r++) {
        const int row = score_row<D>(r);
        const float lse2 = sl_ld_shared_float(t->lse + row * 4) * 1.44269504088896341f;
        const float delta = sl_ld_shared_float(t->delta + row * 4);
        uint32_t visible = 0; // bit i: column i of this warp, counted from the lane's first
        if (MASKED) {
            const uint32_t x = sl_ld_shared_b32(t->spans + row * 4);
            visible = span_bits(x & 255, x >> 8 & 255, column + pair) |
                      span_bits(x >> 16 & 255, x >> 24, column + pair);
        }
        SL_UNROLL for (int nb = 0; nb < plan::S_COLUMNS / 8; nb++) {
            float p[2], ds[2];
            SL_UNROLL for (int j = 0; j < 2; j++) {
                p[j] = sl_exp2(s[r >> 1][nb][(r & 1) * 2 + j] * scale2 - lse2);
                ds[j] = p[j] * (dp[r >> 1][nb][(r & 1) * 2 + j] - delta);
                if (MASKED && !(visible >> (nb * 8 + j) & 1)) {
                    p[j] = ds[j] = 0;
                }
            }
            const uint32_t at = sl_tile_at<plan::MK>(t->ds, row, column / 8 + nb) + pair * 2;
            if (WITH_P) {
                sl_st_shared_b32(at + (t->p - t->ds), sl_pack<DTYPE>(p[0], p[1]));
            }
            sl_st_shared_b32(at, sl_pack<DTYPE>(ds[0], ds[1]));
        }
    }
}

// P (where WITH_P) and dS of a tile, from Q, K, dO and V in shared memory into shared memory.
template <enum sl_dtype DTYPE, int D, bool WITH_P>
SL_DEV void score_gradients(const struct backward_tiles *t, float scale2, bool masked) {
    using plan = backward_plan<D>;
    constexpr int M16 = plan::S_ROWS / 16, N16 = plan::S_COLUMNS / 16;
    const int warp = threadIdx.x >> 5;
    const int row = (warp & 1) * plan::S_ROWS, column = (warp >> 1) * plan::S_COLUMNS;
    float s[M16][N16 * 2][4], dp[M16][N16 * 2][4];
    clear<M16, N16>(s);
    product<DTYPE, M16, N16, D / 16, D, false, D, false, 0>(s, lane_straight<D>(t->q, row, 0),
                                                            lane_crossed<D>(t->k, column, 0));
    clear<M16, N16>(dp);
    product<DTYPE, M16, N16, D / 16, D, false, D, false, 0>(dp, lane_straight<D>(t->g, row, 0),
                                                            lane_crossed<D>(t->v, column, 0));
    if (masked) {
        finish_scores<DTYPE, D, WITH_P, true>(t, scale2, s, dp);
    } else {
        finish_scores<DTYPE, D, WITH_P, false>(t, scale2, s, dp);
    }
}

// Row of the tile of keys or queries, and column, of a lane's fragments of gradients.
SL_DEV int gradient_row(int column_warps, int rows_per_warp, int r) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    return warp / column_warps * rows_per_warp + (r >> 1) * 16 + (lane >> 2) + (r & 1) * 8;
}

// nb: block of 8 columns, two of them for each 16 of this warp.
SL_DEV int gradient_column(int column_warps, int nb) {
    const int warp = threadIdx.x >> 5;
    return ((nb >> 1) * column_warps + warp % column_warps) * 16 + (nb & 1) * 8 + (threadIdx.x & 3) * 2;
}

// dV += P^T dO (dK += dS^T Q): p is [query][key], x the rows of queries.
template <enum sl_dtype DTYPE, int D>
SL_DEV void add_to_keys(float (*acc)[backward_plan<D>::N16 * 2][4], uint32_t p, uint32_t x) {
    using plan = backward_plan<D>;
    const int warp = threadIdx.x >> 5;
    product<DTYPE, plan::K_ROWS / 16, plan::N16, plan::MQ / 16, plan::MK, true, D, true,
            plan::COLUMN_WARPS * 2>(
        acc, lane_crossed<plan::MK>(p, 0, warp / plan::COLUMN_WARPS * plan::K_ROWS / 8),
        lane_straight<D>(x, 0, warp % plan::COLUMN_WARPS * 2));
}

// dQ += dS K, column blocks of 16 first .. first+COUNT-1 of this warp.
template <enum sl_dtype DTYPE, int D, int COUNT>
SL_DEV void add_to_queries(float (*acc)[COUNT * 2][4], const struct backward_tiles *t, int first) {
    using plan = backward_plan<D>;
    const int warp = threadIdx.x >> 5;
    product<DTYPE, plan::Q_ROWS / 16, COUNT, plan::MK / 16, plan::MK, false, D, true, plan::COLUMN_WARPS * 2>(
        acc, lane_straight<plan::MK>(t->ds, warp / plan::COLUMN_WARPS * plan::Q_ROWS, 0),
        lane_straight<D>(t->k, 0, (first * plan::COLUMN_WARPS + warp % plan::COLUMN_WARPS) * 2));
}

// Rounds gradients into a tile of ROWS x D in shared memory, from where store_rows writes them.
template <enum sl_dtype DTYPE, int D, int ROWS_PER_WARP>
SL_DEV void round_to_tile(uint32_t tile, float (*acc)[backward_plan<D>::N16 * 2][4], float scale) {
    using plan = backward_plan<D>;
    SL_UNROLL for (int r = 0; r < ROWS_PER_WARP / 8; r++) {
        SL_UNROLL for (int nb = 0; nb < plan::N16 * 2; nb++) {
            const int row = gradient_row(plan::COLUMN_WARPS, ROWS_PER_WARP, r);
            const int d = gradient_column(plan::COLUMN_WARPS, nb);
            const float *x = &acc[r >> 1][nb][(r & 1) * 2];
            sl_st_shared_b32(sl_tile_at<D>(tile, row, d / 8) + d % 8 * 2,
                             sl_pack<DTYPE>(x[0] * scale, x[1] * scale));
        }
    }
}

template <int D, int ROWS>
SL_DEV void store_rows(uint32_t tile, const struct sl_heads *t, const struct sl_work *work, int h, int first,
                       int end, int d_head) {
    constexpr int LANES = sl_copy_lanes(D), PASS = backward_plan<D>::THREADS / LANES;
    const int row = threadIdx.x / LANES, chunk = threadIdx.x % LANES;
    uint16_t *base = (uint16_t *)t->data + work->batch * t->batch + h * t->head + chunk * 8;
    SL_ROLLED for (int i = 0; i < ROWS / PASS; i++) {
        const int x = first + i * PASS + row;
        uint16_t *to = base + (x < end ? sl_work_column(work, x) * t->token : 0);
        SL_UNROLL for (int j = 0; j < D / 8; j += LANES) {
            const uint4 v = sl_ld_shared_v4(sl_tile_at<D>(tile, row + i * PASS, chunk + j));
            if (x < end && (chunk + j) * 8 < d_head) {
                sl_st_global_v4(to + j * 8, v);
            }
        }
    }
}
