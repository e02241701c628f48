// What a block of the keys' kernels is at: its tile of keys, and its walk over the queries that see it. Both
// lie in shared memory and are read where they are needed: registers are for the sums.
#pragma once

#include "../attention_backward_params.cuh"
#include "../ptx/memory.cuh"

// One tile of keys and what is to be done with it. Positions: the keys k0 .. k_end-1 against the queries
// q_from .. q_to-1. It lies in shared memory, as the walk below does: registers are for the sums.
struct key_job {
    struct sl_work work;
    int32_t hk, chunk;
    int32_t k0, k_end, q_from, q_to;
    int32_t sink;  // the gradients go to partial sums of the chunk
    int32_t group; // owner form: 2 * number of the chunk's group + whether keys of this group came before
};

// The tiles of queries that see a tile of keys, of one query head after the other.
struct query_walk {
    int32_t h, at;                // head (-1: no more tiles) and number of the range
    int32_t q0, q_end, range_end; // the tile
    int32_t shifted, masked;
    int32_t rest_full; // all further tiles of the range are
};

static_assert(sizeof(struct key_job) == 64 && sizeof(struct query_walk) == 32, "the state's 128 bytes");

template <class T> SL_DEV T state_get(uint32_t at) {
    T x;
    SL_UNROLL for (int i = 0; i < (int)sizeof(T) / 16; i++) {
        const uint4 v = sl_ld_shared_v4(at + i * 16);
        memcpy((char *)&x + i * 16, &v, 16);
    }
    return x;
}

template <class T> SL_DEV void state_put(uint32_t at, const T *x) {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, x, sizeof(T));
    if (threadIdx.x == 0) {
        SL_UNROLL for (int i = 0; i < (int)sizeof(T) / 4; i++) {
            sl_st_shared_b32(at + i * 4, words[i]);
        }
    }
}

SL_DEV struct key_job job_get(uint32_t state) {
    return state_get<struct key_job>(state);
}

// Two places, taken in turn: the next tile is written while the one before may still be read.
SL_DEV struct query_walk walk_get(uint32_t state, int turn) {
    return state_get<struct query_walk>(state + 64 + 32 * turn);
}

SL_DEV void walk_put(uint32_t state, int turn, const struct query_walk *w) {
    state_put(state + 64 + 32 * turn, w);
}

// To the next range of queries. ALIGNED: tiles begin at multiples of the tile from q_from on, the same ones
// for every tile of keys.
template <int MQ, bool ALIGNED>
SL_DEV bool walk_range(struct query_walk *w, const struct sl_backward_params *p, const struct key_job *job) {
    const int per_kv = p->n_head / p->n_head_kv, h_end = (job->hk + 1) * per_kv;
    const struct sl_range keys = {job->k0, job->k_end};
    struct sl_range range[2];
    while (++w->at >= sl_pattern_query_ranges(&p->pattern, w->shifted, keys, job->work.length, range)) {
        if (++w->h >= h_end) {
            return false;
        }
        w->shifted = w->h >= p->first_shifted;
        w->at = -1;
    }
    w->q0 = max((int)(w->at == 0 ? range[0].lo : range[1].lo), job->q_from);
    w->q0 -= ALIGNED ? (w->q0 - job->q_from) % MQ : 0;
    w->range_end = min((int)(w->at == 0 ? range[0].hi : range[1].hi), job->q_to);
    w->rest_full = false;
    return true;
}

// To the next tile from q0 on that holds an allowed pair.
template <int MQ, int MK, bool ALIGNED>
SL_DEV void walk_on(struct query_walk *w, const struct sl_backward_params *p, const struct key_job *job) {
    for (;;) {
        if (w->q0 >= w->range_end) {
            if (!walk_range<MQ, ALIGNED>(w, p, job)) {
                w->h = -1;
                return;
            }
            continue;
        }
        w->q_end = min(w->q0 + MQ, w->range_end);
        enum sl_tile kind = SL_TILE_FULL;
        if (!w->rest_full) {
            const struct sl_range keys = {job->k0, job->k_end};
            kind = sl_pattern_tile(&p->pattern, w->shifted, sl_range{w->q0, w->q_end}, keys);
            w->rest_full =
                kind == SL_TILE_FULL &&
                sl_pattern_tile(&p->pattern, w->shifted, sl_range{w->q0, w->range_end}, keys) == SL_TILE_FULL;
        }
        w->masked = kind != SL_TILE_FULL || w->q_end - w->q0 < MQ || job->k_end - job->k0 < MK;
        if (kind != SL_TILE_EMPTY) {
            return;
        }
        w->q0 += MQ;
    }
}

// The tile of keys from k on among those of a group: all sinks of the sequence, then the group's keys beyond
// them. Empty: no more.
SL_DEV struct sl_range keys_from(const struct key_job *job, int n_sink, int k, int tile) {
    n_sink = min(n_sink, job->work.length);
    const bool sink = k < n_sink;
    k = sink ? k : max(k, job->q_from);
    return sl_range{k, min(k + tile, sink ? n_sink : job->q_to)};
}

// The next tile of keys of the group, or the first one of the chunk's next group.
SL_DEV bool owner_next(struct key_job *job, const struct sl_backward_params *p, int tile) {
    struct sl_range keys = keys_from(job, p->n_sink, job->k_end, tile);
    job->group |= 1;
    if (keys.lo >= keys.hi) {
        const bool shifted = job->hk * (p->n_head / p->n_head_kv) >= p->first_shifted;
        struct sl_range group;
        job->group++;
        if (!sl_backward_group(p, &job->work, shifted, job->group / 2, &group)) {
            return false;
        }
        job->q_from = (int)group.lo;
        job->q_to = (int)group.hi;
        keys = keys_from(job, p->n_sink, 0, tile);
    }
    job->k0 = (int)keys.lo;
    job->k_end = (int)keys.hi;
    job->sink = job->k0 < p->n_sink;
    return true;
}
