// Tiles of 16-bit rows in shared memory: rows of D elements, the 16-byte chunks of a row permuted so that the
// eight rows of an ldmatrix, and the copies into them, touch every bank once.
#pragma once

#include "../ptx/cp_async.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/mma.cuh"

template <int D> SL_DEV uint32_t sl_tile_at(uint32_t tile, int row, int chunk) {
    const int swizzled = D % 64 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
    return tile + row * (D * 2) + (swizzled << 4);
}

// The address of chunk c + step in the row of `at`, which is sl_tile_at of a chunk c whose bits step lacks:
// one XOR, or a constant where step is a multiple of what is permuted. The tile is 128-byte aligned.
template <int D> SL_DEV uint32_t sl_tile_step(uint32_t at, int step) {
    constexpr int PERMUTED = D % 64 == 0 ? 7 : 3;
    return (at ^ (uint32_t)((step & PERMUTED) << 4)) + (uint32_t)((step & ~PERMUTED) << 4);
}
