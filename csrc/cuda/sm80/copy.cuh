// Copies rows of one head to a tile in shared memory, by all threads of a block: a thread copies the same
// chunk of every PASS-th row (and the chunks LANES further on), so that its addresses differ by constants and
// by a stride.
#pragma once

#include "../ptx/address.cuh"
#include "../sequences.cuh"
#include "tile.cuh"

// Lanes side by side in a row: whole 128-byte lines where rows have them.
static SL_HD constexpr int sl_copy_lanes(int d) {
    return d % 64 == 0 ? 8 : 4;
}

// A thread's chunk of a column of one head.
template <int D>
SL_DEV const char *sl_copy_from(const struct sl_heads *t, int64_t b, int64_t h, int64_t column) {
    const int chunk = threadIdx.x % sl_copy_lanes(D);
    return t->data + (b * t->batch + h * t->head + column * t->token + chunk * 8) * 2;
}

// Where it goes: this thread's chunk of the first row that it copies.
template <int D> SL_DEV uint32_t sl_copy_to(uint32_t tile) {
    return sl_tile_at<D>(tile, threadIdx.x / sl_copy_lanes(D), threadIdx.x % sl_copy_lanes(D));
}

// The bytes from a row to the next one that a thread copies.
static inline int64_t sl_copy_pass(int d, int n_thread, const struct sl_heads *t) {
    return t->token * 2 * (n_thread / sl_copy_lanes(d));
}

// Bit i: is this thread's chunk i * LANES inside d_head?
template <int D> SL_DEV int sl_copy_chunks(int d_head) {
    constexpr int LANES = sl_copy_lanes(D);
    int chunks = 0;
    SL_UNROLL for (int j = 0; j < D / 8; j += LANES) {
        chunks |= ((int)threadIdx.x % LANES + j) * 8 < d_head ? 1 << j / LANES : 0;
    }
    return chunks;
}

// ROWS columns, all there, from this thread's row of the first on. Chunks that are not in `chunks` become
// zeros. `pass`: sl_copy_pass. Returns where the next tile begins.
template <int D, int ROWS, int THREADS>
SL_DEV const char *sl_copy_whole(uint32_t to, const char *from, int64_t pass, int chunks) {
    constexpr int LANES = sl_copy_lanes(D), PASS = THREADS / LANES;
    static_assert(ROWS % PASS == 0, "");
    SL_UNROLL for (int i = 0; i < ROWS / PASS; i++) {
        SL_UNROLL for (int j = 0; j < D / 8; j += LANES) {
            sl_cp_async_16_if(chunks & 1 << j / LANES, to + i * PASS * D * 2 + j * 16, from + j * 16);
        }
        from = sl_address_step(from, pass);
    }
    return from;
}

// The columns first .. end-1, at most ROWS; the other rows of the tile become zeros, as do the chunks beyond
// d_head. Where there is an index it says which columns these are.
template <int D, int ROWS, int THREADS>
SL_DEV void sl_copy_ragged(uint32_t to, const char *from, int64_t stride, const int32_t *index, int first,
                           int end, int d_head) {
    constexpr int LANES = sl_copy_lanes(D), PASS = THREADS / LANES;
    const int row = threadIdx.x / LANES, chunk = threadIdx.x % LANES;
    SL_ROLLED for (int i = 0; i < ROWS / PASS; i++) {
        const int n = first + i * PASS + row;
        const char *at = n < end ? sl_address(from, 2 * (index ? index[n] : n), (int)stride) : from;
        SL_UNROLL for (int j = 0; j < D / 8; j += LANES) {
            const bool in = n < end && (chunk + j) * 8 < d_head;
            sl_cp_async_16_if(in, to + i * PASS * D * 2 + j * 16, at + j * 16);
        }
    }
}
