// pattern.h: the definition against hand-drawn masks, and every derived function against the definition by
// enumeration. Positions stay below 64, so that a row or a column of a mask is one word.
#include "../../csrc/core/pattern.h"

#include "check.h"

#include <inttypes.h>
#include <string.h>

enum { N_MAX = 48, N_ALL_RANGES = 20, N_ALL_TILES = 9 };

// Bits lo .. hi-1.
static uint64_t bits(int64_t lo, int64_t hi) {
    return lo >= hi ? 0 : ((~UINT64_C(0)) >> (64 - (hi - lo))) << lo;
}

// The mask of one pattern over N_MAX positions by the definition: keys_of[q] has bit k, queries_of[k] has bit
// q. A shorter sequence is its upper left corner.
struct dense {
    struct sl_pattern pattern;
    bool shifted;
    uint64_t keys_of[N_MAX];
    uint64_t queries_of[N_MAX];
};

#define CASE "G %" PRId64 " shift %" PRId64 " sinks %" PRId64 " causal %d shifted %d n %" PRId64
#define CASE_OF(d, n)                                                                                        \
    (d)->pattern.group_size, (d)->pattern.shift, (d)->pattern.n_sink, (int)(d)->pattern.causal,              \
        (int)(d)->shifted, (int64_t)(n)

static void dense_fill(struct dense *d) {
    memset(d->keys_of, 0, sizeof d->keys_of);
    memset(d->queries_of, 0, sizeof d->queries_of);
    for (int q = 0; q < N_MAX; q++) {
        for (int k = 0; k < N_MAX; k++) {
            if (sl_pattern_allows(&d->pattern, d->shifted, q, k)) {
                d->keys_of[q] |= UINT64_C(1) << k;
                d->queries_of[k] |= UINT64_C(1) << q;
            }
        }
    }
}

// Exact union; non-empty, sorted, and with a gap between them (touching ranges would be one).
static void check_ranges(const char *what, const struct dense *d, int64_t n, struct sl_range tile, int count,
                         const struct sl_range r[2], uint64_t expected) {
    uint64_t got = 0;
    bool sound = count >= 0 && count <= 2;
    for (int i = 0; sound && i < count; i++) {
        sound = 0 <= r[i].lo && r[i].lo < r[i].hi && r[i].hi <= n && (i == 0 || r[i - 1].hi < r[i].lo);
        got |= sound ? bits(r[i].lo, r[i].hi) : 0;
    }
    CHECK(sound, "%s: " CASE " tile [%" PRId64 ", %" PRId64 ")", what, CASE_OF(d, n), tile.lo, tile.hi);
    CHECK(got == expected, "%s: " CASE " tile [%" PRId64 ", %" PRId64 ") got %" PRIx64 " expected %" PRIx64,
          what, CASE_OF(d, n), tile.lo, tile.hi, got, expected);
}

static void check_range_functions(const struct dense *d, int64_t n, struct sl_range tile) {
    struct sl_range out[2] = {{-9, -9}, {-9, -9}};
    uint64_t keys = 0, queries = 0;
    for (int64_t t = tile.lo; t < tile.hi; t++) {
        keys |= d->keys_of[t];
        queries |= d->queries_of[t];
    }
    int count = sl_pattern_key_ranges(&d->pattern, d->shifted, tile, n, out);
    check_ranges("key_ranges", d, n, tile, count, out, keys & bits(0, n));
    count = sl_pattern_query_ranges(&d->pattern, d->shifted, tile, n, out);
    check_ranges("query_ranges", d, n, tile, count, out, queries & bits(0, n));
}

// Every range of a short sequence; of a longer one, tiles of these lengths at every start.
static void check_all_ranges(const struct dense *d, int64_t n) {
    static const int64_t lengths[] = {0, 1, 2, 7, 16};
    for (int64_t lo = 0; lo < n; lo++) {
        if (n <= N_ALL_RANGES) {
            for (int64_t hi = lo; hi <= n; hi++) {
                check_range_functions(d, n, (struct sl_range){lo, hi});
            }
            continue;
        }
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            check_range_functions(d, n, (struct sl_range){lo, sl_min(lo + lengths[i], n)});
        }
        check_range_functions(d, n, (struct sl_range){lo, n});
    }
}

static void check_tile(const struct dense *d, struct sl_range query, struct sl_range key) {
    const uint64_t all = bits(key.lo, key.hi);
    uint64_t any = 0, every = all;
    for (int64_t q = query.lo; q < query.hi; q++) {
        any |= d->keys_of[q] & all;
        every &= d->keys_of[q];
    }
    const enum sl_tile expected = !any ? SL_TILE_EMPTY : every == all ? SL_TILE_FULL : SL_TILE_MASKED;
    const enum sl_tile got = sl_pattern_tile(&d->pattern, d->shifted, query, key);
    CHECK(got == expected,
          CASE " queries [%" PRId64 ", %" PRId64 ") keys [%" PRId64 ", %" PRId64 ") got %d expected %d",
          CASE_OF(d, N_MAX), query.lo, query.hi, key.lo, key.hi, (int)got, (int)expected);
}

// A tile's kind does not depend on the sequence's length: all tiles of the first positions, then grids of
// tiles whose last ones are short, begun at 0 and at 1.
static void check_tiles(const struct dense *d) {
    static const int64_t sizes[][2] = {{1, 1}, {4, 4}, {3, 7}, {7, 3}, {16, 5}, {8, 16}, {48, 48}};
    for (int64_t q = 0; q <= N_ALL_TILES; q++) {
        for (int64_t q_end = q; q_end <= N_ALL_TILES; q_end++) {
            for (int64_t k = 0; k <= N_ALL_TILES; k++) {
                for (int64_t k_end = k; k_end <= N_ALL_TILES; k_end++) {
                    check_tile(d, (struct sl_range){q, q_end}, (struct sl_range){k, k_end});
                }
            }
        }
    }
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const int64_t n_q = sizes[i][0], n_k = sizes[i][1];
        for (int64_t q = i % 2; q < N_MAX; q += n_q) {
            for (int64_t k = i / 2 % 2; k < N_MAX; k += n_k) {
                check_tile(d, (struct sl_range){q, sl_min(q + n_q, N_MAX)},
                           (struct sl_range){k, sl_min(k + n_k, N_MAX)});
            }
        }
    }
}

// group_span, group_at, group_count, first_query and pairs over one length.
static void check_positions(const struct dense *d, int64_t n) {
    const struct sl_pattern *p = &d->pattern;
    int64_t pairs = 0, n_group = 0;
    for (int64_t t = 0; t < n; t++) {
        int64_t lo = t, hi = t + 1, first = -1;
        while (lo > 0 && sl_pattern_group(p, d->shifted, lo - 1) == sl_pattern_group(p, d->shifted, t)) {
            lo--;
        }
        while (hi < n && sl_pattern_group(p, d->shifted, hi) == sl_pattern_group(p, d->shifted, t)) {
            hi++;
        }
        const struct sl_range span = sl_pattern_group_span(p, d->shifted, t, n);
        n_group += lo == t;
        const struct sl_range same = sl_pattern_group_at(p, d->shifted, n_group - 1, n);
        CHECK(same.lo == lo && same.hi == hi, CASE " group_at(%" PRId64 ")", CASE_OF(d, n), n_group - 1);
        CHECK(span.lo == lo && span.hi == hi, CASE " group_span(%" PRId64 ")", CASE_OF(d, n), t);
        for (int64_t q = hi; q-- > lo;) {
            first = d->queries_of[t] >> q & 1 ? q : first;
        }
        CHECK(sl_pattern_first_query(p, d->shifted, t) == first, CASE " first_query(%" PRId64 ")",
              CASE_OF(d, n), t);
        CHECK((d->queries_of[t] & bits(lo, hi)) == bits(first, hi), CASE " lanes of key %" PRId64,
              CASE_OF(d, n), t);
        for (uint64_t row = d->keys_of[t] & bits(0, n); row; row &= row - 1) {
            pairs++;
        }
    }
    CHECK(sl_pattern_group_count(p, d->shifted, n) == n_group, CASE " group_count", CASE_OF(d, n));
    CHECK(sl_pattern_pairs(p, d->shifted, n) == pairs, CASE " pairs", CASE_OF(d, n));
}

static void check_pattern(struct dense *d) {
    dense_fill(d);
    check_tiles(d);
    for (int64_t n = 0; n <= N_MAX; n++) {
        check_all_ranges(d, n);
        check_positions(d, n);
    }
}

// Every group size, also beyond every sequence; every shift of a small group and telling ones of a large one.
static void enumerate(void) {
    static const int64_t sinks[] = {0, 1, 4, 9, 31, N_MAX + 2};
    for (int64_t g = 1; g <= N_MAX + 2; g++) {
        const int64_t some[] = {0, 1, g / 2, g - 1, g};
        const int64_t n_shift = g <= 9 ? g + 1 : (int64_t)(sizeof some / sizeof *some);
        for (int64_t i = 0; i < n_shift; i++) {
            for (size_t s = 0; s < sizeof sinks / sizeof *sinks; s++) {
                for (int causal = 0; causal < 2; causal++) {
                    const int64_t shift = g <= 9 ? i : some[i];
                    struct dense d = {.pattern = {g, shift, sinks[s], 0.25, causal}, .shifted = true};
                    check_pattern(&d);
                    d.shifted = false;
                    if (i == n_shift / 2) {
                        check_pattern(&d);
                    }
                }
            }
        }
    }
}

// A mask as drawn: one string a query, 'x' where it may see the key.
static void check_drawn(const char *name, struct sl_pattern pattern, bool shifted, int n,
                        const char *const *rows) {
    for (int q = 0; q < n; q++) {
        for (int k = 0; k < n; k++) {
            CHECK(sl_pattern_allows(&pattern, shifted, q, k) == (rows[q][k] == 'x'), "%s: query %d key %d",
                  name, q, k);
        }
    }
}

static void check_hand_drawn(void) {
    static const char *const causal[] = {"x......", "xx.....", "xxx....", "...x...",
                                         "...xx..", "...xxx.", "......x"};
    check_drawn("groups of 3", (struct sl_pattern){3, 1, 0, 0.25, true}, false, 7, causal);
    check_drawn("shift 0", (struct sl_pattern){3, 0, 0, 0.25, true}, true, 7, causal);
    check_drawn("shift G", (struct sl_pattern){3, 3, 0, 0.25, true}, true, 7, causal);

    static const char *const shifted[] = {"x......", ".x.....", ".xx....", ".xxx...",
                                          "....x..", "....xx.", "....xxx"};
    check_drawn("groups of 3 shifted by 1", (struct sl_pattern){3, 1, 0, 0.25, true}, true, 7, shifted);

    static const char *const sink[] = {"x......", "xx.....", "xxx....", "xx.x...",
                                       "xx.xx..", "xx.xxx.", "xx....x"};
    check_drawn("two sinks", (struct sl_pattern){3, 1, 2, 0.25, true}, false, 7, sink);

    static const char *const shifted_sink[] = {"x......", "xx.....", "xxx....", "xxxx...",
                                               "xx..x..", "xx..xx.", "xx..xxx"};
    check_drawn("two sinks, shifted", (struct sl_pattern){3, 1, 2, 0.25, true}, true, 7, shifted_sink);

    static const char *const both_ways[] = {"xxxxxxx", "xxx....", "xxx....", "x..xxx.",
                                            "x..xxx.", "x..xxx.", "x.....x"};
    check_drawn("not causal, one sink", (struct sl_pattern){3, 1, 1, 0.25, false}, false, 7, both_ways);

    static const char *const both_ways_shifted[] = {"xx.....", "xx.....", "..xxxx.", "..xxxx.",
                                                    "..xxxx.", "..xxxx.", "......x"};
    check_drawn("not causal, shifted", (struct sl_pattern){4, 2, 0, 0.25, false}, true, 7, both_ways_shifted);

    static const char *const wide[] = {"x...", "xx..", "xxx.", "xxxx"};
    check_drawn("a group beyond the sequence", (struct sl_pattern){9, 4, 0, 0.25, true}, false, 4, wide);
    check_drawn("all keys are sinks", (struct sl_pattern){1, 0, 9, 0.25, true}, true, 4, wide);
}

static void check_first_shifted_head(void) {
    static const struct {
        double fraction;
        int64_t n_head, first;
    } cases[] = {{0.25, 8, 6}, {0.25, 3, 3}, {0.25, 4, 3},  {0.5, 7, 4},     {0.0, 8, 8},  {1.0, 8, 0},
                 {0.25, 1, 1}, {1.0, 1, 0},  {0.1, 30, 27}, {0.29, 100, 72}, {0.7, 10, 3}, {0.999, 8, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct sl_pattern p = {16, 8, 4, cases[i].fraction, true};
        CHECK(sl_pattern_first_shifted_head(&p, cases[i].n_head) == cases[i].first,
              "fraction %g of %" PRId64 " heads", cases[i].fraction, cases[i].n_head);
    }
}

int main(void) {
    check_hand_drawn();
    check_first_shifted_head();
    enumerate();
    return check_finish("test_pattern");
}
