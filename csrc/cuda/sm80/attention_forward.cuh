// SF-Attn forward for 16-bit floats, sm_80 mechanics. One block: a tile of queries of one head. Keys of tile
// i+1 are copied while P V of tile i is computed, its values while Q K^T is.
//
// Two kinds of steps. The careful one masks, and moves each row's maximum. The steady one, for tiles that
// every query sees all of, does neither: it takes the maximum so far and looks afterwards whether a weight
// came out so large that it was too old. Then the block computes the tile again, carefully. Which rows move
// their maximum is each row's own affair, so that no row's bits depend on another's.
#pragma once

#include "../ptx/barrier.cuh"
#include "attention_forward_tile.cuh"

// The tile at k0, which is whole and seen by every row, and the tile after it is whole. False, and the values
// not yet added, where some row of the block must move its maximum.
template <enum sl_dtype DTYPE, int D>
SL_DEV bool step_steady(const struct forward_params *p, struct forward_block *b, float o[][D / 8][4],
                        const float *row_max, float *row_sum, float *sum) {
    using S = forward_shape<D>;
    constexpr int M = S::M, KEYS = S::KEYS;
    float s[M][KEYS / 8][4];
    uint32_t w[M][KEYS / 16][4];
    sl_cp_async_wait<0>(); // these keys have landed
    __syncthreads();       // for every warp, and the values before are read
    b->value = sl_copy_whole<D, KEYS, THREADS>(b->copy_to + forward_shared<D>::VALUE, b->value, p->value_pass,
                                               b->left);
    sl_cp_async_commit();
    multiply_keys<DTYPE, D, M, KEYS>(s, b);
    float all = 0;
    SL_UNROLL for (int r = 0; r < S::R; r++) {
        sum[r] = weigh<M, KEYS>(s, r, b->scale, row_max[r]);
        all = r ? all + sum[r] : sum[r];
        if (r % 2) {
            pack_weights<DTYPE, KEYS>(w[r / 2], s[r / 2]);
        }
    }
    sl_keep(b->left);      // or its bits are kept apart
    sl_cp_async_wait<0>(); // the values have landed
    // Every warp has read the keys. A sum that is no number asks for care, too.
    if (sl_barrier_any(!(all <= TOO_LARGE))) {
        return false;
    }
    b->key =
        sl_copy_whole<D, KEYS, THREADS>(b->copy_to + forward_shared<D>::KEY, b->key, p->key_pass, b->left);
    sl_cp_async_commit();
    SL_UNROLL for (int r = 0; r < S::R; r++) {
        row_sum[r] += sum[r];
    }
    multiply_values<DTYPE, D, M, KEYS>(o, w, b);
    return true;
}

// To the next tile, whose copy begins.
template <int D> SL_DEV void step_on(const struct sl_attention_params *p, struct forward_block *b) {
    const struct forward_plan plan = plan_load(shared_at(forward_shared<D>::PLAN));
    b->k0 = plan_next(&plan, b->k0, forward_shape<D>::KEYS);
    copy_carefully<D>(p, &plan, &p->key, b->copy_to + forward_shared<D>::KEY, b->k0);
    sl_cp_async_commit();
}

// Counts the steady tiles that begin with k0, and finds where they are copied from.
template <int D> SL_DEV void steady_begin(const struct sl_attention_params *p, struct forward_block *b) {
    constexpr int KEYS = forward_shape<D>::KEYS;
    const struct forward_plan plan = plan_load(shared_at(forward_shared<D>::PLAN));
    const int n_tile = plan_steady(&plan, b->k0, KEYS);
    b->left = n_tile * STEADY_TILE;
    if (n_tile > 0) {
        const int64_t n = max(plan.first, 0) + b->k0 + threadIdx.x / sl_copy_lanes(D);
        b->left |= sl_copy_chunks<D>(p->d_head);
        b->key = sl_copy_from<D>(&p->key, plan.batch, plan.hk, n + KEYS);
        b->value = sl_copy_from<D>(&p->value, plan.batch, plan.hk, n);
    }
}

// To the first tile that no steady step computed. False: there is none.
template <int D> SL_DEV bool steady_end(struct forward_block *b) {
    constexpr int KEYS = forward_shape<D>::KEYS;
    const struct forward_plan plan = plan_load(shared_at(forward_shared<D>::PLAN));
    b->k0 += (plan_steady(&plan, b->k0, KEYS) - b->left / STEADY_TILE) * KEYS;
    return b->k0 < plan_end(&plan, b->k0);
}

// The tile at k0, whatever it is. moving: -1, or what rows_to_move found of a tile that a steady step has
// begun.
template <enum sl_dtype DTYPE, int D>
SL_DEV void step_careful(const struct sl_attention_params *p, struct forward_block *b, int moving,
                         float o[][D / 8][4], float *row_max, float *row_sum) {
    using S = forward_shape<D>;
    constexpr int M = S::M, KEYS = S::KEYS;
    float s[M][KEYS / 8][4];
    uint32_t w[M][KEYS / 16][4];
    sl_cp_async_wait<0>();
    __syncthreads();
    const struct forward_plan plan = plan_load(shared_at(forward_shared<D>::PLAN));
    const int k_end = plan_end(&plan, b->k0);
    if (p->value.data && moving < 0) {
        copy_carefully<D>(p, &plan, &p->value, b->copy_to + forward_shared<D>::VALUE, b->k0);
    }
    sl_cp_async_commit();
    multiply_keys<DTYPE, D, M, KEYS>(s, b);
    weigh_carefully<DTYPE, D, M, KEYS>(s, w, b->scale, b->k0, k_end, moving, o, row_max, row_sum);
    sl_cp_async_wait<0>();
    __syncthreads();
    step_on<D>(p, b);
    if (p->value.data) {
        multiply_values<DTYPE, D, M, KEYS>(o, w, b);
    }
}

// Sums to their rows' ends, and lse.
template <int R>
SL_DEV void finish_rows(const struct sl_attention_params *p, const struct forward_plan *plan,
                        const float row_max[R], float row_sum[R]) {
    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * (R * 8) + (lane >> 2);
    SL_UNROLL for (int r = 0; r < R; r++) {
        const int q = plan->q0 + row + r * 8;
        row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
        row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
        if ((lane & 3) == 0 && q < plan->q_end) {
            const int64_t n = plan_query(p, plan, q);
            p->lse[((int64_t)plan->batch * p->n_head + plan->h) * p->sequences.n_query + n] =
                (row_max[r] + log2f(row_sum[r])) * 0.69314718056f;
        }
    }
}

// Normalises, transposes through this warp's own rows of the Q tile, stores 16 bytes a lane.
template <enum sl_dtype DTYPE, int D>
SL_DEV void store_output(const struct sl_attention_params *p, const struct forward_plan *plan,
                         const float o[][D / 8][4], const float *row_sum) {
    using S = forward_shape<D>;
    const int lane = threadIdx.x & 31, row0 = (threadIdx.x >> 5) * (S::M * 16);
    SL_UNROLL for (int r = 0; r < S::R; r++) {
        const float inverse = 1.0f / row_sum[r];
        SL_UNROLL for (int i = 0; i < D / 8; i++) {
            const float *x = &o[r / 2][i][r % 2 * 2];
            sl_st_shared_b32(sl_tile_at<D>(shared_at(0), row0 + r * 8 + (lane >> 2), i) + (lane & 3) * 4,
                             sl_pack<DTYPE>(x[0] * inverse, x[1] * inverse));
        }
    }
    __syncwarp();
    const int64_t head = plan->batch * p->output.batch + plan->h * p->output.head;
    SL_ROLLED for (int i = 0; i < S::M * 16 * (D / 8) / 32; i++) {
        const int row = row0 + (i * 32 + lane) / (D / 8), chunk = (i * 32 + lane) % (D / 8);
        const uint4 v = sl_ld_shared_v4(sl_tile_at<D>(shared_at(0), row, chunk));
        if (plan->q0 + row < plan->q_end && chunk * 8 < p->d_head) {
            const int64_t n = plan_query(p, plan, plan->q0 + row);
            sl_st_global_v4((uint16_t *)p->output.data + head + n * p->output.token + chunk * 8, v);
        }
    }
}

template <enum sl_dtype DTYPE, int D>
static __global__ void __launch_bounds__(SL_FORWARD_THREADS, sl_forward_blocks(D))
    attention_forward(const __grid_constant__ struct forward_params params) {
    const struct sl_attention_params &p = params.call;
    using S = forward_shape<D>;
    struct sl_work work;
    int h;
    if (!sl_attention_work(&p, true, &work, &h)) {
        return; // the whole block
    }
    struct forward_block b;
    load_first<D>(&p, &work, h, &b);
    float o[S::M][D / 8][4], row_max[S::R], row_sum[S::R], sum[S::R];
    SL_UNROLL for (int i = 0; i < S::M * (D / 8) * 4; i++) {
        o[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
    }
    SL_UNROLL for (int r = 0; r < S::R; r++) {
        row_max[r] = -INFINITY;
        row_sum[r] = 0;
    }
    int moving = -1;
    do {
        step_careful<DTYPE, D>(&p, &b, moving, o, row_max, row_sum);
        steady_begin<D>(&p, &b);
        for (; b.left >= STEADY_TILE; b.left -= STEADY_TILE) {
            if (!step_steady<DTYPE, D>(&params, &b, o, row_max, row_sum, sum)) {
                break;
            }
        }
        moving = b.left >= STEADY_TILE ? rows_to_move<S::R>(sum) : -1;
    } while (steady_end<D>(&b));
    sl_cp_async_wait<0>();
    const struct forward_plan plan = plan_load(shared_at(forward_shared<D>::PLAN));
    finish_rows<S::R>(&p, &plan, row_max, row_sum);
    if (p.value.data) {
        store_output<DTYPE, D>(&p, &plan, o, row_sum);
    }
}

template <enum sl_dtype DTYPE, int D>
static enum sl_status launch_forward(const struct sl_cuda_call *call, const struct sl_attention_params *p) {
    const struct forward_params params = {*p, sl_copy_pass(D, THREADS, &p->key),
                                          sl_copy_pass(D, THREADS, &p->value)};
    return sl_cuda_launch(call, "attention_forward", attention_forward<DTYPE, D>, p->n_tile * p->n_head,
                          THREADS, sl_forward_shared(D), params);
}
