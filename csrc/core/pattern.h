// THE attention pattern: who may see whom. This header is the only place that says so; CPU loops, CUDA
// kernels, the dense mask, the FLOP count and the picture all call it. Pure integer functions on positions
// inside one sequence (0-based, padding not counted), read unchanged by C11, C++17 and nvcc.
//
// sl_pattern_allows is the definition (SPEC section 1). Everything below it is derived, and proved equal to
// it by enumeration in tests/c/test_pattern.c.
#ifndef SL_PATTERN_H
#define SL_PATTERN_H

#include "portable.h"

// group_size >= 1; 0 <= shift <= group_size (0 and group_size both give the unshifted groups); n_sink >= 0;
// 0 <= shifted_fraction <= 1, the share of query heads, counted from the last, whose groups are shifted.
struct sl_pattern {
    int64_t group_size;
    int64_t shift;
    int64_t n_sink;
    double shifted_fraction;
    bool causal;
};

// Half-open range of positions; empty when lo >= hi.
struct sl_range {
    int64_t lo;
    int64_t hi;
};

enum sl_tile { SL_TILE_EMPTY, SL_TILE_FULL, SL_TILE_MASKED };

static SL_HD inline int64_t sl_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static SL_HD inline int64_t sl_max(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// Heads first_shifted .. n_head-1 have shifted groups (floor(n_head * fraction) of them, in double
// precision).
static SL_HD inline int64_t sl_pattern_first_shifted_head(const struct sl_pattern *p, int64_t n_head) {
    return n_head - (int64_t)((double)n_head * p->shifted_fraction);
}

// Group of position t: t / G, or floor((t - shift) / G) where shifted, so that positions 0..shift-1 are group
// -1.
static SL_HD inline int64_t sl_pattern_group(const struct sl_pattern *p, bool shifted, int64_t t) {
    const int64_t x = shifted ? t - p->shift : t;
    return x >= 0 ? x / p->group_size : -1;
}

// THE definition: may the query at position q see the key at position k?
static SL_HD inline bool sl_pattern_allows(const struct sl_pattern *p, bool shifted, int64_t q, int64_t k) {
    const bool near = sl_pattern_group(p, shifted, q) == sl_pattern_group(p, shifted, k) || k < p->n_sink;
    return p->causal ? near && k <= q : near || q < p->n_sink;
}

// ---- derived ----

// All positions of t's group in a sequence of n.
static SL_HD inline struct sl_range sl_pattern_group_span(const struct sl_pattern *p, bool shifted, int64_t t,
                                                          int64_t n) {
    const int64_t g = sl_pattern_group(p, shifted, t);
    const int64_t lo = g * p->group_size + (shifted ? p->shift : 0);
    struct sl_range span;
    span.lo = sl_max(lo, 0);
    span.hi = sl_min(lo + p->group_size, n);
    return span;
}

// Number of groups of a sequence of n positions.
static SL_HD inline int64_t sl_pattern_group_count(const struct sl_pattern *p, bool shifted, int64_t n) {
    return n > 0 ? sl_pattern_group(p, shifted, n - 1) - sl_pattern_group(p, shifted, 0) + 1 : 0;
}

// The positions of the i-th group, 0 <= i < sl_pattern_group_count.
static SL_HD inline struct sl_range sl_pattern_group_at(const struct sl_pattern *p, bool shifted, int64_t i,
                                                        int64_t n) {
    const int64_t g = sl_pattern_group(p, shifted, 0) + i;
    return sl_pattern_group_span(p, shifted, sl_max(g * p->group_size + (shifted ? p->shift : 0), 0), n);
}

// The keys that some query of [query.lo, query.hi) may see, as sorted disjoint ranges; returns how many
// (0..2). Each is tight: its first and its last key are seen by some query of the tile.
static SL_HD inline int sl_pattern_key_ranges(const struct sl_pattern *p, bool shifted, struct sl_range query,
                                              int64_t n, struct sl_range out[2]) {
    if (query.lo >= query.hi) {
        return 0;
    }
    struct sl_range local;
    if (!p->causal && query.lo < p->n_sink) {
        out[0].lo = 0;
        out[0].hi = n;
        return 1;
    }
    local.lo = sl_pattern_group_span(p, shifted, query.lo, n).lo;
    local.hi = p->causal ? query.hi : sl_pattern_group_span(p, shifted, query.hi - 1, n).hi;
    const int64_t sink = sl_min(p->n_sink, p->causal ? query.hi : n);
    if (sink >= local.lo) {
        out[0].lo = sink > 0 ? 0 : local.lo;
        out[0].hi = sl_max(local.hi, sink);
        return 1;
    }
    if (sink == 0) {
        out[0] = local;
        return 1;
    }
    out[0].lo = 0;
    out[0].hi = sink;
    out[1] = local;
    return 2;
}

// The queries that may see some key of [key.lo, key.hi), as sorted disjoint ranges; returns how many (0..2).
static SL_HD inline int sl_pattern_query_ranges(const struct sl_pattern *p, bool shifted, struct sl_range key,
                                                int64_t n, struct sl_range out[2]) {
    if (key.lo >= key.hi) {
        return 0;
    }
    const bool has_sink = key.lo < p->n_sink;
    struct sl_range local;
    local.hi = has_sink ? n : sl_pattern_group_span(p, shifted, key.hi - 1, n).hi;
    local.lo = p->causal ? key.lo : has_sink ? 0 : sl_pattern_group_span(p, shifted, key.lo, n).lo;
    const int64_t sink = p->causal ? 0 : sl_min(p->n_sink, n);
    if (sink == 0 || sink >= local.lo) {
        out[0].lo = sink > 0 ? 0 : local.lo;
        out[0].hi = sl_max(local.hi, sink);
        return 1;
    }
    out[0].lo = 0;
    out[0].hi = sink;
    out[1] = local;
    return 2;
}

// Does the tile of queries x keys hold no allowed pair, only allowed pairs, or both kinds? Exact for sound
// sizes (both ranges inside the sequence); an empty range is an EMPTY tile.
static SL_HD inline enum sl_tile sl_pattern_tile(const struct sl_pattern *p, bool shifted,
                                                 struct sl_range query, struct sl_range key) {
    if (query.lo >= query.hi || key.lo >= key.hi) {
        return SL_TILE_EMPTY;
    }
    const int64_t q_first = sl_pattern_group(p, shifted, query.lo);
    const int64_t q_last = sl_pattern_group(p, shifted, query.hi - 1);
    const int64_t k_first = sl_pattern_group(p, shifted, key.lo);
    const int64_t k_last = sl_pattern_group(p, shifted, key.hi - 1);
    const bool one_group = q_first == q_last && k_first == k_last && q_first == k_first;
    if (!p->causal) {
        if (key.hi <= p->n_sink || query.hi <= p->n_sink || one_group) {
            return SL_TILE_FULL;
        }
        // The keys beyond the sinks against the queries beyond the sinks: full only where they share one
        // group.
        const int64_t q_rest =
            sl_pattern_group(p, shifted, sl_max(query.lo, sl_min(p->n_sink, query.hi - 1)));
        const int64_t k_rest = sl_pattern_group(p, shifted, sl_max(key.lo, sl_min(p->n_sink, key.hi - 1)));
        if (q_rest == q_last && k_rest == k_last && q_rest == k_rest) {
            return SL_TILE_FULL;
        }
        const bool touch =
            key.lo < p->n_sink || query.lo < p->n_sink || (q_first <= k_last && k_first <= q_last);
        return touch ? SL_TILE_MASKED : SL_TILE_EMPTY;
    }
    if (key.lo >= query.hi) {
        return SL_TILE_EMPTY;
    }
    if (key.lo >= p->n_sink && k_last < q_first) {
        return SL_TILE_EMPTY;
    }
    if (key.hi - 1 > query.lo) {
        return SL_TILE_MASKED;
    }
    const int64_t k_rest = sl_pattern_group(p, shifted, sl_max(key.lo, sl_min(p->n_sink, key.hi - 1)));
    if (key.hi <= p->n_sink || (k_rest == q_first && q_first == q_last)) {
        return SL_TILE_FULL;
    }
    return SL_TILE_MASKED;
}

// Among the queries of key k's own group, the first that may see it. What a kernel needs on its diagonal:
// lane q of a group sees row k of the same group exactly when q >= this.
static SL_HD inline int64_t sl_pattern_first_query(const struct sl_pattern *p, bool shifted, int64_t k) {
    return p->causal ? k : sl_pattern_group_span(p, shifted, k, k + 1).lo;
}

// Number of allowed pairs of one head over a sequence of n positions: one step a group up to the sinks' end,
// and a few more.
static SL_HD inline int64_t sl_pattern_pairs(const struct sl_pattern *p, bool shifted, int64_t n) {
    int64_t pairs = 0;
    const int64_t sink = sl_min(p->n_sink, n);
    for (int64_t t = 0; t < n;) {
        const struct sl_range g = sl_pattern_group_span(p, shifted, t, n);
        const int64_t length = g.hi - g.lo;
        // Whole groups beyond the sinks are alike.
        const int64_t alike = g.lo >= sink && length == p->group_size ? (n - g.lo) / length : 1;
        if (p->causal) {
            // Local pairs, and each query beyond the group's start also sees the sinks before the group.
            pairs += alike * (length * (length + 1) / 2 + length * sl_min(sink, g.lo));
        } else {
            const int64_t sink_query = sl_max(sl_min(sink, g.hi) - g.lo, 0);
            const int64_t sink_outside = sink - sink_query;
            pairs += alike * (sink_query * n + (length - sink_query) * (length + sink_outside));
        }
        t = g.lo + alike * length;
    }
    return pairs;
}

#endif
