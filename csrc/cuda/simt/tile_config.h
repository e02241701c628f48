// Tiles of the float32 kernels. A block has 64 rows and walks tiles of 64 columns; operands pass through a
// ring of two slots of shared memory in slices, so that the plan does not depend on the head dimension.
//
// R: rows of a thread. A block has SL_SIMT_ROWS / R * SL_SIMT_LANES threads, of which SL_SIMT_LANES share R
// rows.
#pragma once

enum {
    SL_SIMT_ROWS = 64,                       // rows of a block: queries, or the keys whose gradients it sums
    SL_SIMT_COLUMNS = 64,                    // keys or queries of a tile
    SL_SIMT_LANES = 8,                       // threads that share a row
    SL_SIMT_SLICE = 32,                      // of the head dimension, at a time, where scores are computed
    SL_SIMT_SLOT = 16384,                    // bytes of a slot: a slice of the rows and one of the columns
    SL_SIMT_WEIGHTS = 16384,                 // bytes of a tile of probabilities or of their gradients
    SL_SIMT_SEEN = (SL_SIMT_ROWS + 32) * 12, // bytes of what each row sees, and of what all do
    SL_SIMT_FORWARD_SHARED = 2 * SL_SIMT_SLOT + SL_SIMT_WEIGHTS + SL_SIMT_SEEN,
    SL_SIMT_SCORE_SHARED = 2 * SL_SIMT_SLOT + 2 * SL_SIMT_COLUMNS * 4,
    // A second table, lse and delta of the columns, two ranges of queries and three numbers.
    SL_SIMT_BACKWARD_SHARED = SL_SIMT_FORWARD_SHARED + SL_SIMT_SEEN + 2 * SL_SIMT_COLUMNS * 4 + 48,
};

// Whole rows of head dimension D (rounded up) that fit a slot, as a power of two.
template <int D> static constexpr int sl_simt_slot_rows = D <= 64 ? 64 : D <= 128 ? 32 : 16;

template <int R> static constexpr int sl_simt_threads = SL_SIMT_ROWS / R * SL_SIMT_LANES;

// Rows of a thread, so that its part of a row of results fits its registers (at most 255).
template <int D> static constexpr int sl_simt_thread_rows = D <= 128 ? 4 : 2;
