// dQ for 16-bit floats where no block owns a group, sm_80 mechanics: one block a tile of queries of one head,
// against the tiles of keys that it may see.
#pragma once

#include "attention_backward_tile.cuh"

// The tiles of keys that a tile of queries may see: sinks' range, then the groups' range.
struct key_walk {
    int q0, q_end, at;        // range number
    int k0, k_end, range_end; // the tile
    int full_end;             // tiles of the range that end here or before are full
    bool shifted, masked;
};

SL_DEV bool key_walk_range(struct key_walk *w, const struct sl_pattern *pattern, int n) {
    const struct sl_range q = {w->q0, w->q_end};
    struct sl_range range[2];
    if (++w->at >= sl_pattern_key_ranges(pattern, w->shifted, q, n, range)) {
        return false;
    }
    w->k0 = (int)(w->at == 0 ? range[0].lo : range[1].lo);
    w->range_end = (int)(w->at == 0 ? range[0].hi : range[1].hi);
    // Most often the keys before the tile's own positions are all seen.
    const int end = min(w->range_end, max(w->k0, w->q0));
    const bool full = sl_pattern_tile(pattern, w->shifted, q, sl_range{w->k0, end}) == SL_TILE_FULL;
    w->full_end = full ? end : w->k0;
    return true;
}

// To the next tile from k0 on that holds an allowed pair.
template <int MQ, int MK>
SL_DEV bool key_walk_on(struct key_walk *w, const struct sl_pattern *pattern, int n) {
    for (;;) {
        if (w->k0 >= w->range_end) {
            if (!key_walk_range(w, pattern, n)) {
                return false;
            }
            continue;
        }
        w->k_end = min(w->k0 + MK, w->range_end);
        enum sl_tile kind = SL_TILE_FULL;
        if (w->k_end > w->full_end) {
            kind = sl_pattern_tile(pattern, w->shifted, sl_range{w->q0, w->q_end}, sl_range{w->k0, w->k_end});
        }
        w->masked = kind != SL_TILE_FULL || w->k_end - w->k0 < MK || w->q_end - w->q0 < MQ;
        if (kind != SL_TILE_EMPTY) {
            return true;
        }
        w->k0 += MK;
    }
}

template <enum sl_dtype DTYPE, int D>
static __global__ void __launch_bounds__(backward_plan<D>::THREADS)
    backward_queries(const __grid_constant__ struct sl_backward_params p) {
    using plan = backward_plan<D>;
    constexpr int MQ = plan::MQ, MK = plan::MK;
    // Heads that share keys run side by side, late tiles (the long ones under a causal mask) first.
    const int per_kv = p.n_head / p.n_head_kv;
    const int64_t at = blockIdx.x / per_kv;
    const int hk = sl_backward_head_kv(&p, (int)(at / p.n_query_tile));
    const int h = hk * per_kv + (int)(blockIdx.x % per_kv);
    struct sl_work work;
    if (!sl_work_find(&p.tiles, p.n_query_tile - 1 - at % p.n_query_tile, true, &work)) {
        return; // the whole block
    }
    const int q0 = work.tile * MQ, q_end = min(q0 + MQ, work.length);
    const struct backward_tiles t = tiles_at<D>(sl_shared_addr(SL_SHARED_BASE()));
    struct key_walk w;
    w.q0 = q0;
    w.q_end = q_end;
    w.shifted = h >= p.first_shifted;
    w.at = -1;
    w.k0 = w.range_end = 0;
    bool more = key_walk_on<MQ, MK>(&w, &p.pattern, work.length);

    load_rows<D, MQ>(t.q, &p.query, &work, h, q0, q_end, p.d_head);
    load_rows<D, MQ>(t.g, &p.grad_output, &work, h, q0, q_end, p.d_head);
    load_rows<D, MK>(t.k, &p.key, &work, hk, w.k0, w.k_end, p.d_head);
    load_rows<D, MK>(t.v, &p.value, &work, hk, w.k0, w.k_end, p.d_head);
    load_sums<D>(&t, &p, &work, h, q0, q_end);
    sl_cp_async_commit();
    float dq[plan::Q_ROWS / 16][plan::N16 * 2][4];
    clear<plan::Q_ROWS / 16, plan::N16>(dq);
    while (more) {
        if (w.masked) {
            write_spans<D>(&t, &p.pattern, w.shifted, q0, q_end, w.k0, w.k_end, work.length);
        }
        const bool masked = w.masked;
        w.k0 += MK;
        more = key_walk_on<MQ, MK>(&w, &p.pattern, work.length);
        sl_cp_async_wait<0>();
        __syncthreads(); // every copy has landed, and dS was read
        score_gradients<DTYPE, D, false>(&t, p.scale2, masked);
        __syncthreads(); // dS is there, V was read
        if (more) {
            load_rows<D, MK>(t.v, &p.value, &work, hk, w.k0, w.k_end, p.d_head);
        }
        add_to_queries<DTYPE, D, plan::N16>(dq, &t, 0);
        __syncthreads(); // K was read
        if (more) {
            load_rows<D, MK>(t.k, &p.key, &work, hk, w.k0, w.k_end, p.d_head);
        }
        sl_cp_async_commit();
    }
    round_to_tile<DTYPE, D, plan::Q_ROWS>(t.q, dq, p.scale);
    __syncthreads();
    store_rows<D, MQ>(t.q, &p.grad_query, &work, h, q0, q_end, p.d_head);
}
