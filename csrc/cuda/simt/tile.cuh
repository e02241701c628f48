// What the float32 kernels share: where a thread stands, operands in shared memory, and the two products of
// attention.
//
// Thread t has R of the block's rows, from t / 8 * R on, together with the 7 other threads of t / 8. Of
// scores it has the columns 4 * lane + 32 * i + 0..3, of rows of the head dimension the same.
#pragma once

#include "../ptx/floats.cuh"
#include "../ptx/memory.cuh"
#include "tile_config.h"

enum { SL_SIMT_SCORES = SL_SIMT_COLUMNS / SL_SIMT_LANES }; // of a row, in a thread

SL_DEV int sl_lane() {
    return threadIdx.x % SL_SIMT_LANES;
}

SL_DEV int sl_row_group() {
    return threadIdx.x / SL_SIMT_LANES;
}

// Column of a thread's i-th score.
SL_DEV int sl_score_column(int i) {
    return i / 4 * 32 + sl_lane() * 4 + i % 4;
}

// ---- shared memory ----

// A slice: rows of 32 floats. The 16-byte chunks are permuted so that 8 lanes that read the same chunk of
// rows PER apart touch every bank once.
template <int PER> SL_DEV uint32_t sl_slice_at(uint32_t slice, int row, int chunk) {
    return slice + row * (SL_SIMT_SLICE * 4) + ((chunk ^ (row / PER & 7)) << 4);
}

// A tile of weights: rows of 64 floats.
template <int R> SL_DEV uint32_t sl_weights_at(uint32_t weights, int row, int chunk) {
    return weights + row * (SL_SIMT_COLUMNS * 4) + ((chunk ^ (row / R & 7)) << 4);
}

// ---- products ----

template <int M, int N> SL_DEV void sl_clear(float x[M][N]) {
    SL_UNROLL for (int i = 0; i < M; i++) {
        SL_UNROLL for (int j = 0; j < N; j++) {
            x[i][j] = 0;
        }
    }
}

// s += a b^T over one slice: a the block's rows, b the tile's columns.
template <int R> SL_DEV void sl_add_scores(float s[R][SL_SIMT_SCORES], uint32_t a, uint32_t b) {
    _Pragma("unroll 4") for (int chunk = 0; chunk < SL_SIMT_SLICE / 4; chunk++) {
        float x[R][4];
        SL_UNROLL for (int i = 0; i < R; i++) {
            sl_ld_shared_floats(x[i], sl_slice_at<R>(a, sl_row_group() * R + i, chunk));
        }
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES; j++) {
            float y[4];
            sl_ld_shared_floats(y, sl_slice_at<4>(b, sl_score_column(j), chunk));
            SL_UNROLL for (int i = 0; i < R; i++) {
                SL_UNROLL for (int e = 0; e < 4; e++) {
                    s[i][j] += x[i][e] * y[e];
                }
            }
        }
    }
}

// acc += weights[rows][k0 ..] v: v as many whole rows as a slot has.
template <int D, int R> SL_DEV void sl_add_rows(float acc[R][D / 8], uint32_t weights, int k0, uint32_t v) {
    _Pragma("unroll 1") for (int k = 0; k < sl_simt_slot_rows<D>; k += 4) {
        float w[R][4];
        SL_UNROLL for (int i = 0; i < R; i++) {
            sl_ld_shared_floats(w[i], sl_weights_at<R>(weights, sl_row_group() * R + i, (k0 + k) / 4));
        }
        SL_UNROLL for (int e = 0; e < 4; e++) {
            SL_UNROLL for (int j = 0; j < D / 32; j++) {
                float y[4];
                sl_ld_shared_floats(y, v + (k + e) * (D * 4) + (j * 8 + sl_lane()) * 16);
                SL_UNROLL for (int i = 0; i < R; i++) {
                    SL_UNROLL for (int c = 0; c < 4; c++) {
                        acc[i][j * 4 + c] += w[i][e] * y[c];
                    }
                }
            }
        }
    }
}

template <int R> SL_DEV void sl_store_weights(uint32_t weights, const float w[R][SL_SIMT_SCORES]) {
    SL_UNROLL for (int i = 0; i < R; i++) {
        SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES / 4; j++) {
            sl_st_shared_floats(sl_weights_at<R>(weights, sl_row_group() * R + i, j * 8 + sl_lane()),
                                &w[i][j * 4]);
        }
    }
}

// What this thread stored of its i-th row.
template <int R> SL_DEV void sl_load_weights(uint32_t weights, int i, float w[SL_SIMT_SCORES]) {
    SL_UNROLL for (int j = 0; j < SL_SIMT_SCORES / 4; j++) {
        sl_ld_shared_floats(w + j * 4, sl_weights_at<R>(weights, sl_row_group() * R + i, j * 8 + sl_lane()));
    }
}

// Sum or maximum over the threads that share a row, the same in each.
SL_DEV float sl_row_sum(float x) {
    SL_UNROLL for (int step = 1; step < SL_SIMT_LANES; step *= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, step);
    }
    return x;
}

SL_DEV float sl_row_max(float x) {
    SL_UNROLL for (int step = 1; step < SL_SIMT_LANES; step *= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    return x;
}

// Writes a row of the head dimension, times `scale`.
template <int D> SL_DEV void sl_store_row(float *to, const float x[D / 8], float scale, int d_head) {
    SL_UNROLL for (int j = 0; j < D / 32; j++) {
        const int d = (j * 8 + sl_lane()) * 4;
        const float v[4] = {x[j * 4] * scale, x[j * 4 + 1] * scale, x[j * 4 + 2] * scale,
                            x[j * 4 + 3] * scale};
        if (d < d_head) {
            sl_st_global_floats(to + d, v);
        }
    }
}
