// Tiles and the shared-memory plan of the forward on sm_80, for a head dimension d that is instantiated: Q,
// one tile of K, one of V, and what each row sees. Two blocks share a multiprocessor: one computes softmax
// while the other multiplies.
#pragma once

enum { SL_FORWARD_WARPS = 4, SL_FORWARD_THREADS = 32 * SL_FORWARD_WARPS };

// Rows of a warp: 32 read each fragment of keys and values once for two HMMAs, as long as their output fits
// the registers.
constexpr int sl_forward_rows(int d) {
    return d <= 128 ? 32 : 16;
}

constexpr int sl_forward_queries(int d) {
    return SL_FORWARD_WARPS * sl_forward_rows(d);
}

constexpr int sl_forward_keys(int d) {
    return d <= 192 ? 64 : 32;
}

// Blocks of a multiprocessor that registers are limited for.
constexpr int sl_forward_blocks(int d) {
    return d <= 32 ? 3 : 2;
}

constexpr int sl_forward_shared(int d) {
    return (sl_forward_queries(d) + 2 * sl_forward_keys(d)) * d * 2 + 64 + sl_forward_queries(d) * 16;
}
