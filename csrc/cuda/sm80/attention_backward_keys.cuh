// dK and dV for 16-bit floats, sm_80 mechanics: tiles of keys, each against the queries that see it, of all
// query heads that share them; the sums stay in registers. In the owner form one block takes all tiles of a
// group in turn and completes dQ of the group's queries on the way.
#pragma once

#include "attention_backward_job.cuh"
#include "attention_backward_tile.cuh"

template <int D>
SL_DEV void load_queries(const struct backward_tiles *t, const struct sl_backward_params *p,
                         const struct sl_work *work, const struct query_walk *w) {
    constexpr int MQ = backward_plan<D>::MQ;
    load_rows<D, MQ>(t->q, &p->query, work, w->h, w->q0, w->q_end, p->d_head);
    load_rows<D, MQ>(t->g, &p->grad_output, work, w->h, w->q0, w->q_end, p->d_head);
    load_sums<D>(t, p, work, w->h, w->q0, w->q_end);
}

// Rows of dQ, or of its sums: where a lane's elements of row r (0 .. Q_ROWS / 8) are; rows beyond the queries
// stay inside the tensor.
template <int D>
SL_DEV char *query_row(const struct sl_heads *t, const struct query_walk *w, const struct sl_work *work,
                       int r, int size) {
    const int q = w->q0 + gradient_row(backward_plan<D>::COLUMN_WARPS, backward_plan<D>::Q_ROWS, r);
    const int64_t n = sl_work_column(work, min(q, w->q_end - 1));
    const int64_t at = work->batch * t->batch + w->h * t->head + n * t->token;
    return t->data + (at + gradient_column(backward_plan<D>::COLUMN_WARPS, 0)) * size;
}

// The column of a lane's j-th pair of dQ, counted from its first, in the column blocks from i on.
template <int D> SL_DEV int query_column(int i, int j) {
    return (i + j / 2) * backward_plan<D>::COLUMN_WARPS * 16 + j % 2 * 8;
}

// Column blocks i .. i+COUNT-1 of this tile's part of dQ: to the sums, or rounded to dQ where it is the last
// part.
template <enum sl_dtype DTYPE, int D, int COUNT>
SL_DEV void add_columns(const struct backward_tiles *t, const struct sl_backward_params *p,
                        const struct query_walk *w, const struct key_job *job, int i, bool last) {
    using plan = backward_plan<D>;
    constexpr int ROWS = plan::Q_ROWS / 8;
    const int64_t rows = (int64_t)p->n_token * p->d_head;
    const struct sl_heads sums = {(char *)p->sum_query, p->n_head * rows, rows, p->d_head};
    const int n_row = w->q_end - w->q0 - gradient_row(plan::COLUMN_WARPS, plan::Q_ROWS, 0);
    const int n_column = p->d_head - gradient_column(plan::COLUMN_WARPS, 0);
    float acc[plan::Q_ROWS / 16][COUNT * 2][4];
    clear<plan::Q_ROWS / 16, COUNT>(acc);
    if (job->group & 1) { // not the group's first tile of keys
        SL_UNROLL for (int r = 0; r < ROWS; r++) {
            const float *from = (const float *)query_row<D>(&sums, w, &job->work, r, 4);
            SL_UNROLL for (int j = 0; j < COUNT * 2; j++) {
                const int d = query_column<D>(i, j);
                if (r * 8 < n_row && d < n_column) {
                    const float2 before = *(const float2 *)(from + d);
                    acc[r >> 1][j][(r & 1) * 2] = before.x;
                    acc[r >> 1][j][(r & 1) * 2 + 1] = before.y;
                }
            }
        }
    }
    add_to_queries<DTYPE, D, COUNT>(acc, t, i);
    if (last) {
        SL_UNROLL for (int r = 0; r < ROWS; r++) {
            uint16_t *to = (uint16_t *)query_row<D>(&p->grad_query, w, &job->work, r, 2);
            SL_UNROLL for (int j = 0; j < COUNT * 2; j++) {
                const float *x = &acc[r >> 1][j][(r & 1) * 2];
                if (r * 8 < n_row && query_column<D>(i, j) < n_column) {
                    *(uint32_t *)(to + query_column<D>(i, j)) =
                        sl_pack<DTYPE>(x[0] * p->scale, x[1] * p->scale);
                }
            }
        }
        return;
    }
    SL_UNROLL for (int r = 0; r < ROWS; r++) {
        float *to = (float *)query_row<D>(&sums, w, &job->work, r, 4);
        SL_UNROLL for (int j = 0; j < COUNT * 2; j++) {
            const float *x = &acc[r >> 1][j][(r & 1) * 2];
            if (r * 8 < n_row && query_column<D>(i, j) < n_column) {
                *(float2 *)(to + query_column<D>(i, j)) = float2{x[0], x[1]};
            }
        }
    }
}

// Owner form: this tile's part of dQ.
template <enum sl_dtype DTYPE, int D>
SL_DEV void add_queries(const struct backward_tiles *t, const struct sl_backward_params *p,
                        const struct query_walk *w, const struct key_job *job) {
    using plan = backward_plan<D>;
    constexpr int COUNT = plan::N16 % 2 == 0 ? 2 : 1; // all at once are too many registers
    const bool last = sl_pattern_tile(&p->pattern, w->shifted, sl_range{w->q0, w->q_end},
                                      keys_from(job, p->n_sink, job->k_end, plan::MK)) == SL_TILE_EMPTY;
    SL_UNROLL for (int i = 0; i < plan::N16; i += COUNT) {
        add_columns<DTYPE, D, COUNT>(t, p, w, job, i, last);
    }
}

// Sums of sinks: float32, in memory of this block's own.
template <int D>
SL_DEV void store_partial(const struct sl_backward_params *p, const struct key_job *job, int64_t offset,
                          float (*acc)[backward_plan<D>::N16 * 2][4]) {
    using plan = backward_plan<D>;
    SL_UNROLL for (int r = 0; r < plan::K_ROWS / 8; r++) {
        const int k = job->k0 + gradient_row(plan::COLUMN_WARPS, plan::K_ROWS, r);
        SL_UNROLL for (int nb = 0; nb < plan::N16 * 2; nb++) {
            const int d = gradient_column(plan::COLUMN_WARPS, nb);
            float *to =
                sl_backward_partial(p, &job->work, job->chunk, job->hk) + offset + (int64_t)k * p->d_head + d;
            if (k < job->k_end && d < p->d_head) {
                const float2 before = job->group > 1 ? *(const float2 *)to : float2{0, 0};
                const float *x = &acc[r >> 1][nb][(r & 1) * 2];
                *(float2 *)to = float2{before.x + x[0], before.y + x[1]};
            }
        }
    }
}

// Hands dK and dV on. The tiles of K and V are free afterwards, once every warp has passed a barrier.
template <enum sl_dtype DTYPE, int D>
SL_DEV void store_keys(const struct backward_tiles *t, const struct sl_backward_params *p,
                       const struct key_job *job, float (*dk)[backward_plan<D>::N16 * 2][4],
                       float (*dv)[backward_plan<D>::N16 * 2][4]) {
    using plan = backward_plan<D>;
    if (job->sink) {
        store_partial<D>(p, job, 0, dk);
        store_partial<D>(p, job, (int64_t)p->n_sink * p->d_head, dv);
        return;
    }
    const int first = job->k0, end = job->k_end;
    round_to_tile<DTYPE, D, plan::K_ROWS>(t->k, dk, p->scale);
    round_to_tile<DTYPE, D, plan::K_ROWS>(t->v, dv, 1.0f);
    __syncthreads();
    store_rows<D, plan::MK>(t->k, &p->grad_key, &job->work, job->hk, first, end, p->d_head);
    store_rows<D, plan::MK>(t->v, &p->grad_value, &job->work, job->hk, first, end, p->d_head);
}

// The tile of keys that is in the state. Every thread of the block calls it; no copy is under way, the tiles
// are free and the state is there, before as after the next barrier.
template <enum sl_dtype DTYPE, int D, bool OWNER>
SL_DEV void run_keys(const struct backward_tiles *t, const struct sl_backward_params *p) {
    using plan = backward_plan<D>;
    constexpr int MQ = plan::MQ, MK = plan::MK, M16 = plan::K_ROWS / 16, N16 = plan::N16;
    struct key_job job = job_get(t->state);
    struct query_walk w = {};
    w.h = job.hk * (p->n_head / p->n_head_kv);
    w.shifted = w.h >= p->first_shifted;
    w.at = -1;
    walk_on<MQ, MK, OWNER>(&w, p, &job);
    bool more = w.h >= 0;
    if (more) {
        load_rows<D, MK>(t->k, &p->key, &job.work, job.hk, job.k0, job.k_end, p->d_head);
        load_rows<D, MK>(t->v, &p->value, &job.work, job.hk, job.k0, job.k_end, p->d_head);
        load_queries<D>(t, p, &job.work, &w);
    }
    sl_cp_async_commit();
    int turn = 0;
    walk_put(t->state, turn, &w);
    __syncthreads(); // the walk is there
    float dk[M16][N16 * 2][4], dv[M16][N16 * 2][4];
    clear<M16, N16>(dk);
    clear<M16, N16>(dv);
    while (more) {
        job = job_get(t->state);
        w = walk_get(t->state, turn);
        const bool masked = w.masked;
        if (masked) {
            write_spans<D>(t, &p->pattern, w.shifted, w.q0, w.q_end, job.k0, job.k_end, job.work.length);
        }
        sl_cp_async_wait<0>();
        __syncthreads(); // every copy and the spans have landed, and dS was read
        score_gradients<DTYPE, D, true>(t, p->scale2, masked);
        __syncthreads(); // P and dS are there
        add_to_keys<DTYPE, D>(dv, t->p, t->g);
        add_to_keys<DTYPE, D>(dk, t->ds, t->q);
        job = job_get(t->state);
        w = walk_get(t->state, turn);
        const struct query_walk done = w;
        w.q0 += MQ;
        walk_on<MQ, MK, OWNER>(&w, p, &job);
        more = w.h >= 0;
        turn ^= 1;
        walk_put(t->state, turn, &w);
        __syncthreads(); // the walk is there, Q and dO were read
        if (more) {
            load_queries<D>(t, p, &job.work, &w);
            sl_cp_async_commit();
        }
        if (OWNER) {
            add_queries<DTYPE, D>(t, p, &done, &job);
        }
    }
    __syncthreads(); // K and V were read
    job = job_get(t->state);
    store_keys<DTYPE, D>(t, p, &job, dk, dv);
}

// Blocks of the sinks come first: each walks a whole chunk.
template <enum sl_dtype DTYPE, int D>
static __global__ void __launch_bounds__(backward_plan<D>::THREADS)
    backward_keys(const __grid_constant__ struct sl_backward_params p) {
    constexpr int MK = backward_plan<D>::MK;
    const int64_t sink_tiles = (p.n_sink + MK - 1) / MK, per_head = p.n_chunk * sink_tiles;
    int64_t at = blockIdx.x;
    struct key_job job = {};
    if (at < per_head * p.n_run) {
        job.hk = sl_backward_head_kv(&p, (int)(at / per_head));
        job.chunk = (int)(at % per_head / sink_tiles);
        if (!sl_work_find(&p.chunks, job.chunk, true, &job.work)) {
            return; // the whole block
        }
        job.sink = sl_backward_has_sums(&p, &job.work);
        job.k0 = (int)(at % sink_tiles) * MK;
        job.k_end = min(job.k0 + MK, min(p.n_sink, job.work.length));
        job.q_from = job.work.tile * p.chunks.query_tile;
        job.q_to = (int)sl_min((int64_t)job.q_from + p.chunks.query_tile, job.work.length);
    } else {
        at -= per_head * p.n_run;
        job.hk = sl_backward_head_kv(&p, (int)(at / p.n_key_tile));
        if (!sl_work_find(&p.tiles, at % p.n_key_tile, false, &job.work)) {
            return;
        }
        job.k0 = max(job.work.tile * MK, p.n_sink);
        job.k_end = min((job.work.tile + 1) * MK, job.work.length);
        job.q_to = job.work.length;
    }
    if (job.k0 >= job.k_end) {
        return;
    }
    const struct backward_tiles t = tiles_at<D>(sl_shared_addr(SL_SHARED_BASE()));
    state_put(t.state, &job);
    __syncthreads(); // the job is there
    run_keys<DTYPE, D, false>(&t, &p);
}

template <enum sl_dtype DTYPE, int D>
static __global__ void __launch_bounds__(backward_plan<D>::THREADS)
    backward_owner(const __grid_constant__ struct sl_backward_params p) {
    constexpr int MK = backward_plan<D>::MK;
    struct key_job job = {};
    job.hk = sl_backward_head_kv(&p, (int)(blockIdx.x / p.n_chunk));
    job.chunk = (int)(blockIdx.x % p.n_chunk);
    if (!sl_work_find(&p.chunks, job.chunk, true, &job.work)) {
        return; // the whole block
    }
    const struct backward_tiles t = tiles_at<D>(sl_shared_addr(SL_SHARED_BASE()));
    job.group = -1; // before the first group, at its end
    job.k_end = job.work.length;
    while (owner_next(&job, &p, MK)) {
        state_put(t.state, &job);
        __syncthreads(); // the job is there
        run_keys<DTYPE, D, true>(&t, &p);
        job = job_get(t.state);
        __syncthreads(); // the gradients and the job were read
    }
}
