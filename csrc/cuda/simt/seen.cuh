// What each of the block's rows sees of the columns that it walks: computed once, so that the walk itself
// takes no division.
#pragma once

#include "tile.cuh"

// What one row sees: the positions below first_hi, and lo .. hi-1. The pattern's ranges for a tile of one
// row are exactly that row's.
struct sl_seen {
    int first_hi, lo, hi;
};

SL_DEV struct sl_seen sl_seen_of(const struct sl_range ranges[2], int n_range) {
    return n_range > 1   ? sl_seen{(int)ranges[0].hi, (int)ranges[1].lo, (int)ranges[1].hi}
           : n_range > 0 ? sl_seen{0, (int)ranges[0].lo, (int)ranges[0].hi}
                         : sl_seen{0, 0, 0};
}

SL_DEV struct sl_seen sl_keys_seen(const struct sl_pattern *pattern, bool shifted, int q, int n) {
    struct sl_range ranges[2];
    const int n_range = sl_pattern_key_ranges(pattern, shifted, sl_range{q, q + 1}, n, ranges);
    return sl_seen_of(ranges, n_range);
}

SL_DEV struct sl_seen sl_queries_seeing(const struct sl_pattern *pattern, bool shifted, int k, int n) {
    struct sl_range ranges[2];
    const int n_range = sl_pattern_query_ranges(pattern, shifted, sl_range{k, k + 1}, n, ranges);
    return sl_seen_of(ranges, n_range);
}

SL_DEV bool sl_sees(const struct sl_seen *seen, int position) {
    return (int)(position < seen->first_hi) | ((int)(position >= seen->lo) & (int)(position < seen->hi));
}

// A table of what each of the block's rows sees, and last, what every one of them sees (or less): tiles
// inside that take no mask. Written row by row; then a barrier, sl_seen_close by one warp and another
// barrier.
SL_DEV void sl_seen_store(uint32_t table, int row, struct sl_seen seen) {
    sl_st_shared_b32(table + row * 4, (uint32_t)seen.first_hi);
    sl_st_shared_b32(table + row * 4 + SL_SIMT_SEEN / 3, (uint32_t)seen.lo);
    sl_st_shared_b32(table + row * 4 + SL_SIMT_SEEN / 3 * 2, (uint32_t)seen.hi);
}

SL_DEV struct sl_seen sl_seen_load(uint32_t table, int row) {
    return sl_seen{(int)sl_ld_shared_b32(table + row * 4),
                   (int)sl_ld_shared_b32(table + row * 4 + SL_SIMT_SEEN / 3),
                   (int)sl_ld_shared_b32(table + row * 4 + SL_SIMT_SEEN / 3 * 2)};
}

SL_DEV struct sl_seen sl_seen_both(struct sl_seen a, struct sl_seen b) {
    return sl_seen{min(a.first_hi, b.first_hi), max(a.lo, b.lo), min(a.hi, b.hi)};
}

SL_DEV void sl_seen_close(uint32_t table) {
    const int lane = threadIdx.x % 32;
    struct sl_seen all = sl_seen_load(table, lane);
    for (int row = 32; row < SL_SIMT_ROWS; row += 32) {
        all = sl_seen_both(all, sl_seen_load(table, row + lane));
    }
    for (int step = 16; step > 0; step /= 2) {
        all = sl_seen_both(all, sl_seen{__shfl_xor_sync(0xffffffffu, all.first_hi, step),
                                        __shfl_xor_sync(0xffffffffu, all.lo, step),
                                        __shfl_xor_sync(0xffffffffu, all.hi, step)});
    }
    sl_seen_store(table, SL_SIMT_ROWS + lane, all); // one would do
}

// Does every row see the whole tile lo .. hi-1, and has it all its columns?
SL_DEV bool sl_seen_by_all(uint32_t table, int lo, int hi) {
    const struct sl_seen all = sl_seen_load(table, SL_SIMT_ROWS);
    return hi - lo == SL_SIMT_COLUMNS && (hi <= all.first_hi || (lo >= all.lo && hi <= all.hi));
}

// What this thread's i-th row sees of a tile that ends at `end`.
template <int R> SL_DEV struct sl_seen sl_seen_in_tile(uint32_t table, int i, int end) {
    const struct sl_seen seen = sl_seen_load(table, sl_row_group() * R + i);
    return sl_seen{min(seen.first_hi, end), seen.lo, min(seen.hi, end)};
}
