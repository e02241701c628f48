// One tile of the forward in registers: scores, weights, and what they add to the output. Of a warp's rows a
// thread has 2 M: g and g + 8 of every 16, as mma's accumulators do.
#pragma once

#include "../ptx/convert.cuh"
#include "../ptx/widen.cuh"
#include "attention_forward_block.cuh"

// A steady step's lane sums 16 weights or fewer of a row; more than this in one sum and the row's maximum
// moves. float16 holds 65504.
#define TOO_LARGE 32768.0f

template <enum sl_dtype DTYPE, int D, int M, int KEYS>
SL_DEV void multiply_keys(float s[M][KEYS / 8][4], const struct forward_block *b) {
    SL_UNROLL for (int i = 0; i < M * KEYS / 2; i++) {
        s[i / (KEYS / 2)][i / 4 % (KEYS / 8)][i % 4] = 0;
    }
    // Steps of d that share an XOR (sl_tile_step) in a row: fewer addresses are alive.
    constexpr int XORS = D % 64 == 0 ? 4 : 2, EACH = D / 16 / XORS;
    SL_UNROLL for (int i = 0; i < D / 16; i++) {
        const int kk = i / EACH + i % EACH * XORS;
        uint32_t qf[M][4];
        SL_UNROLL for (int m = 0; m < M; m++) {
            sl_ldmatrix_x4(qf[m], sl_tile_step<D>(b->q_at, kk * 2) + m * 16 * D * 2);
        }
        SL_UNROLL for (int nb = 0; nb < KEYS / 16; nb++) {
            uint32_t kf[4]; // keys 0-7: d 0-7, d 8-15; keys 8-15: d 0-7, d 8-15
            sl_ldmatrix_x4(kf, sl_tile_step<D>(b->k_at, kk * 2) + nb * 16 * D * 2);
            SL_UNROLL for (int m = 0; m < M; m++) {
                sl_mma_16816<DTYPE>(s[m][nb * 2], qf[m], kf);
                sl_mma_16816<DTYPE>(s[m][nb * 2 + 1], qf[m], kf + 2);
            }
        }
    }
}

// O += P V.
template <enum sl_dtype DTYPE, int D, int M, int KEYS>
SL_DEV void multiply_values(float o[M][D / 8][4], const uint32_t w[M][KEYS / 16][4],
                            const struct forward_block *b) {
    SL_UNROLL for (int kk = 0; kk < KEYS / 16; kk++) {
        SL_UNROLL for (int db = 0; db < D / 16; db++) {
            uint32_t vf[4]; // d 0-7: keys 0-7, keys 8-15; d 8-15: keys 0-7, keys 8-15
            sl_ldmatrix_x4_trans(vf, sl_tile_step<D>(b->v_at, db * 2) + kk * 16 * D * 2);
            SL_UNROLL for (int m = 0; m < M; m++) {
                sl_mma_16816<DTYPE>(o[m][db * 2], w[m][kk], vf);
                sl_mma_16816<DTYPE>(o[m][db * 2 + 1], w[m][kk], vf + 2);
            }
        }
    }
}

// Weights in 16 bits: the accumulators' layout is that of the A operand.
template <enum sl_dtype DTYPE, int KEYS>
SL_DEV void pack_weights(uint32_t w[KEYS / 16][4], const float s[KEYS / 8][4]) {
    SL_UNROLL for (int kk = 0; kk < KEYS / 16; kk++) {
        SL_UNROLL for (int i = 0; i < 4; i++) {
            const float *x = &s[kk * 2 + i / 2][i % 2 * 2];
            w[kk][i] = sl_pack<DTYPE>(x[0], x[1]);
        }
    }
}

// Scores of the thread's row r to weights; their sum.
template <int M, int KEYS> SL_DEV float weigh(float s[M][KEYS / 8][4], int r, float scale, float maximum) {
    float sum = 0;
    SL_UNROLL for (int i = 0; i < KEYS / 8; i++) {
        SL_UNROLL for (int j = 0; j < 2; j++) {
            float *x = &s[r / 2][i][r % 2 * 2 + j];
            *x = sl_exp2(fmaf(*x, scale, -maximum));
            sum = i + j ? sum + *x : *x;
        }
    }
    return sum;
}

// Masks the scores of a tile and makes them weights. The rows in `moving` (bit r) take a new maximum where it
// is larger, and what was summed for them so far is scaled to it. Their scores are scaled first: the largest
// weight is exactly 1 however large scores are, where a fused product misses by their rounding.
template <enum sl_dtype DTYPE, int D, int M, int KEYS>
SL_DEV void weigh_carefully(float s[M][KEYS / 8][4], uint32_t w[M][KEYS / 16][4], float scale, int k0,
                            int k_end, int moving, float o[M][D / 8][4], float row_max[2 * M],
                            float row_sum[2 * M]) {
    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * (M * 16) + (lane >> 2);
    const float hidden = scale > 0 ? -INFINITY : INFINITY; // times scale: the weight is 0
    SL_UNROLL for (int r = 0; r < 2 * M; r++) {
        uint32_t columns[KEYS / 32];
        seen_columns<KEYS / 32>(columns, shared_at(forward_shared<D>::SEEN) + (row + r * 8) * 16, k0, k_end);
        const float first = moving >> r & 1 ? scale : 1.0f, then = moving >> r & 1 ? 1.0f : scale;
        float m = -INFINITY;
        SL_UNROLL for (int i = 0; i < KEYS / 8; i++) {
            SL_UNROLL for (int j = 0; j < 2; j++) {
                float *x = &s[r / 2][i][r % 2 * 2 + j];
                const uint32_t bit = 1u << (i % 4 * 8 + j);
                *x = columns[i / 4] >> (lane & 3) * 2 & bit ? *x : hidden;
                *x = sl_mul(*x, first);
                m = fmaxf(m, sl_mul(*x, then));
            }
        }
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        m = moving >> r & 1 ? fmaxf(m, row_max[r]) : row_max[r];
        const float base = m == -INFINITY ? 0.0f : m; // a row that has seen nothing yet
        const float rescale = sl_exp2(row_max[r] - base);
        row_max[r] = m;
        row_sum[r] = row_sum[r] * rescale + weigh<M, KEYS>(s, r, then, base);
        SL_UNROLL for (int i = 0; i < D / 8; i++) {
            o[r / 2][i][r % 2 * 2] *= rescale;
            o[r / 2][i][r % 2 * 2 + 1] *= rescale;
        }
        if (r % 2) {
            pack_weights<DTYPE, KEYS>(w[r / 2], s[r / 2]);
        }
    }
}

// The rows (bit r) of which some lane has too large a sum.
template <int R> SL_DEV int rows_to_move(const float sum[R]) {
    int rows = 0;
    SL_UNROLL for (int r = 0; r < R; r++) {
        rows |= sum[r] <= TOO_LARGE ? 0 : 1 << r;
    }
    rows |= __shfl_xor_sync(0xffffffffu, rows, 1);
    return rows | __shfl_xor_sync(0xffffffffu, rows, 2);
}
