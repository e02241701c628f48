// Tiles, warps and the shared-memory plan of the backward on sm_80, by the head dimension D (one that is
// instantiated): Q, dO, K, V, and the tiles of P and dS between the products. At most 99 KB.
#pragma once

constexpr int sl_backward_queries(int d) {
    return d <= 128 ? 64 : 32;
}

constexpr int sl_backward_keys(int d) {
    return d <= 192 ? 64 : 32;
}

constexpr int sl_backward_warps(int d) {
    return d == 192 ? 8 : 4;
}

// Warps side by side along the head dimension where gradients are summed; the others share the rows.
constexpr int sl_backward_columns(int d) {
    return d <= 128 ? 2 : 4;
}

// A block's own state, then three words for each query of a tile: lse, delta, the keys that it may see. The
// kernel of dQ needs no tile of P. At D = 128 two blocks just fit into the 164 KB of 8.0.
enum { SL_BACKWARD_STATE = 128 };

constexpr int sl_backward_shared(int d, bool with_p) {
    return SL_BACKWARD_STATE + 12 * sl_backward_queries(d) +
           4 * d * (sl_backward_queries(d) + sl_backward_keys(d)) +
           (with_p ? 4 : 2) * sl_backward_queries(d) * sl_backward_keys(d);
}
