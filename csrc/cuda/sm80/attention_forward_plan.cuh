// What a block of the forward computes: its queries, the tiles of keys that they read, and what each row sees
// of them, from core/pattern.h in 32 bits. Kept in shared memory: the registers are the accumulators'.
#pragma once

#include "../attention_params.cuh"
#include "../ptx/memory.cuh"

// Keys lo .. hi-1, read tile by tile. Tiles that begin before `steady` are whole and seen by every query of
// the block, and the tile after them is whole, too.
struct forward_range {
    int32_t lo, hi, steady;
};

struct forward_plan {
    int32_t batch, h, hk;
    int32_t first;                 // key column of position 0; -1: the sequence has an index
    int32_t q0, q_end;             // positions
    struct forward_range range[2]; // in order; the second may be empty
};

enum { FORWARD_PLAN_WORDS = sizeof(struct forward_plan) / 4 };

// The keys lo .. result-1 are seen by every query, and so is no whole tile after them. What is tried: all
// keys that the first query sees, then the sinks alone.
SL_DEV int64_t full_end(const struct sl_pattern *p, bool shifted, struct sl_range q, struct sl_range keys) {
    const int64_t most = p->causal ? sl_min(keys.hi, q.lo + 1) : keys.hi, sinks = sl_min(most, p->n_sink);
    if (sl_pattern_tile(p, shifted, q, sl_range{keys.lo, most}) == SL_TILE_FULL) {
        return most;
    }
    const bool full = sl_pattern_tile(p, shifted, q, sl_range{keys.lo, sinks}) == SL_TILE_FULL;
    return full ? sinks : keys.lo;
}

SL_DEV void plan_make(const struct sl_attention_params *p, const struct sl_work *work, int h, int queries,
                      int keys, struct forward_plan *plan) {
    plan->h = h;
    plan->hk = h / (p->n_head / p->n_head_kv);
    plan->batch = (int)work->batch;
    plan->first = work->first;
    plan->q0 = work->n_past + work->tile * queries;
    plan->q_end = min(plan->q0 + queries, work->length);
    const bool shifted = plan->h >= p->first_shifted;
    const struct sl_range q = {plan->q0, plan->q_end};
    struct sl_range range[2];
    const int n = sl_pattern_key_ranges(&p->pattern, shifted, q, work->length, range);
    SL_UNROLL for (int i = 0; i < 2; i++) {
        struct forward_range *r = &plan->range[i];
        const struct sl_range found = i < n ? range[i] : sl_range{0, 0};
        const int64_t full = plan->first < 0 || !p->value.data ? 0 : full_end(&p->pattern, shifted, q, found);
        r->lo = (int)found.lo;
        r->hi = (int)found.hi;
        r->steady = (int)sl_min(full - keys, found.hi - 2 * keys) + 1;
    }
}

// The end of the range that a tile at k0 is in; at most k0 where there is no such tile.
SL_DEV int plan_end(const struct forward_plan *plan, int k0) {
    return k0 < plan->range[0].hi ? plan->range[0].hi : plan->range[1].hi;
}

// The number of steady tiles that begin with one at k0.
SL_DEV int plan_steady(const struct forward_plan *plan, int k0, int keys) {
    const int end = k0 < plan->range[0].hi ? plan->range[0].steady : plan->range[1].steady;
    return max(end - k0 + keys - 1, 0) / keys;
}

// The tile after the one at k0; plan_end(...) <= it where there is none.
SL_DEV int plan_next(const struct forward_plan *plan, int k0, int keys) {
    const bool leaves = k0 < plan->range[0].hi && k0 + keys >= plan->range[0].hi;
    return leaves ? max(plan->range[1].lo, plan->range[0].hi) : k0 + keys;
}

SL_DEV const int32_t *plan_index(const struct sl_attention_params *p, const struct forward_plan *plan) {
    return plan->first < 0 ? p->sequences.index + (int64_t)plan->batch * p->sequences.n_key : NULL;
}

// The row of queries and outputs that a position has.
SL_DEV int64_t plan_query(const struct sl_attention_params *p, const struct forward_plan *plan,
                          int position) {
    const int32_t *index = plan_index(p, plan);
    const int64_t column = index ? index[position] : plan->first + position;
    return column - (p->sequences.n_key - p->sequences.n_query);
}

// ---- in shared memory: the plan, then 16 bytes a row ----

// By one thread. Others read it after a barrier.
SL_DEV void plan_store(uint32_t to, const struct forward_plan *plan) {
    const int32_t *words = (const int32_t *)plan;
    SL_UNROLL for (int i = 0; i < FORWARD_PLAN_WORDS; i++) {
        sl_st_shared_b32(to + i * 4, (uint32_t)words[i]);
    }
}

SL_DEV struct forward_plan plan_load(uint32_t from) {
    struct forward_plan plan;
    int32_t *words = (int32_t *)&plan;
    static_assert(FORWARD_PLAN_WORDS % 4 == 0, "");
    SL_UNROLL for (int i = 0; i < FORWARD_PLAN_WORDS; i += 4) {
        const uint4 v = sl_ld_shared_v4(from + i * 4);
        words[i] = (int32_t)v.x;
        words[i + 1] = (int32_t)v.y;
        words[i + 2] = (int32_t)v.z;
        words[i + 3] = (int32_t)v.w;
    }
    return plan;
}

// What the query at `position` sees: the keys before the first number, and from the second to the third.
SL_DEV void seen_store(uint32_t to, const struct sl_attention_params *p, bool shifted, int position, int n) {
    struct sl_range range[2];
    const struct sl_range q = {position, position + 1};
    const bool two = sl_pattern_key_ranges(&p->pattern, shifted, q, n, range) > 1;
    const struct sl_range local = two ? range[1] : range[0];
    sl_st_shared_b32(to, two ? (uint32_t)range[0].hi : 0);
    sl_st_shared_b32(to + 4, (uint32_t)local.lo);
    sl_st_shared_b32(to + 8, (uint32_t)local.hi);
    sl_st_shared_b32(to + 12, 0);
}

// Bits 0 .. n-1, for any n.
SL_DEV uint32_t bits_below(int n) {
    return n >= 32 ? ~0u : (1u << max(n, 0)) - 1;
}

// Bit i of word w: does the row see key k0 + 32 w + i, before k_end?
template <int WORDS> SL_DEV void seen_columns(uint32_t columns[WORDS], uint32_t from, int k0, int k_end) {
    const uint4 row = sl_ld_shared_v4(from);
    SL_UNROLL for (int w = 0; w < WORDS; w++) {
        const int k = k0 + 32 * w;
        const uint32_t local = bits_below((int)row.z - k) & ~bits_below((int)row.y - k);
        columns[w] = (bits_below((int)row.x - k) | local) & bits_below(k_end - k);
    }
}
