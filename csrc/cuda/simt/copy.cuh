// How operands come to shared memory: rows by position, slice after slice, through a ring of two slots.
#pragma once

#include "../attention_params.cuh"
#include "../ptx/cp_async.cuh"
#include "tile.cuh"

// ---- copies ----

// Rows of one head of one batch row, by position.
struct sl_simt_source {
    const float *data; // of the head's row 0
    int64_t token;     // stride
    int past;          // columns before row 0
};

SL_DEV struct sl_simt_source sl_simt_source_of(const struct sl_heads *t, const struct sl_work *work, int h,
                                               int past) {
    return sl_simt_source{(const float *)t->data + work->batch * t->batch + h * t->head, t->token, past};
}

// Starts the copy of one 16-byte chunk of the row at `position`; zeros where there is none.
SL_DEV void sl_copy_chunk(uint32_t to, const struct sl_simt_source *t, const struct sl_work *work,
                          int position, int end, int chunk, int d_head) {
    const bool in = position < end && chunk * 4 < d_head;
    const int64_t at = in ? (sl_work_column(work, position) - t->past) * t->token + chunk * 4 : 0;
    sl_cp_async_16(to, t->data + at, in ? 16 : 0);
}

// Slice number `slice` of the rows of positions first .. end-1, at most ROWS.
template <int ROWS, int THREADS, int PER>
SL_DEV void sl_copy_slice(uint32_t to, const struct sl_simt_source *t, const struct sl_work *work, int first,
                          int end, int slice, int d_head) {
    constexpr int CHUNKS = SL_SIMT_SLICE / 4;
    _Pragma("unroll 1") for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        const int at = i * THREADS + (int)threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        sl_copy_chunk(sl_slice_at<PER>(to, row, chunk), t, work, first + row, end, slice * CHUNKS + chunk,
                      d_head);
    }
}

// As many whole rows as a slot has, from position first on.
template <int D, int THREADS>
SL_DEV void sl_copy_rows(uint32_t to, const struct sl_simt_source *t, const struct sl_work *work, int first,
                         int end, int d_head) {
    constexpr int CHUNKS = D / 4;
    _Pragma("unroll 1") for (int i = 0; i < sl_simt_slot_rows<D> * CHUNKS / THREADS; i++) {
        const int at = i * THREADS + (int)threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        sl_copy_chunk(to + at * 16, t, work, first + row, end, chunk, d_head);
    }
}

// The ring: slices lie in two slots in turn. While one is read, the next is copied.
struct sl_ring {
    uint32_t base;
    int copied; // slot of the last slice, 0 or 1
};

SL_DEV struct sl_ring sl_ring_start() {
    return sl_ring{sl_shared_addr(SL_SHARED_BASE()), 0};
}

SL_DEV uint32_t sl_ring_copy(struct sl_ring *ring) {
    ring->copied ^= 1;
    return ring->base + ring->copied * SL_SIMT_SLOT;
}

// Waits until the last slice is there for every thread, and every thread has read the one before: its slot
// may be copied to.
SL_DEV uint32_t sl_ring_read(const struct sl_ring *ring) {
    sl_cp_async_wait<0>();
    __syncthreads();
    return ring->base + ring->copied * SL_SIMT_SLOT;
}

// ---- tiles ----

// The tiles of up to two ranges of positions. (No array: indexed by a variable, it would lie in memory.)
struct sl_simt_walk {
    int lo, end;           // the tile begins at lo, end of the range in progress
    int next_lo, next_end; // the range after it, empty where there is none
};

// False where there is no tile. The ranges are cut to the positions first .. end-1.
SL_DEV bool sl_simt_walk_start(struct sl_simt_walk *w, int n_range, const struct sl_range range[2], int first,
                               int end) {
    w->lo = n_range > 0 ? max((int)range[0].lo, first) : 0;
    w->end = n_range > 0 ? min((int)range[0].hi, end) : 0;
    w->next_lo = n_range > 1 ? max((int)range[1].lo, first) : 0;
    w->next_end = n_range > 1 ? min((int)range[1].hi, end) : 0;
    if (w->lo >= w->end) {
        w->lo = w->next_lo;
        w->end = w->next_end;
        w->next_end = w->next_lo;
    }
    return w->lo < w->end;
}

SL_DEV bool sl_simt_walk_next(struct sl_simt_walk *w) {
    w->lo += SL_SIMT_COLUMNS;
    if (w->lo >= w->end) {
        w->lo = w->next_lo;
        w->end = w->next_end;
        w->next_end = w->next_lo;
    }
    return w->lo < w->end;
}

SL_DEV int sl_simt_walk_hi(const struct sl_simt_walk *w) {
    return min(w->lo + SL_SIMT_COLUMNS, w->end);
}

// ---- what is copied next ----

// A tile passes in stages: slices of two operands whose scores are wanted, or whole rows of one.
struct sl_feed {
    struct sl_simt_walk walk;
    struct sl_ring ring;
    int stage, step; // of the tile
    bool more;
};

SL_DEV void sl_feed_start(struct sl_feed *feed, int n_range, const struct sl_range range[2], int first,
                          int end) {
    feed->more = sl_simt_walk_start(&feed->walk, n_range, range, first, end);
    feed->ring = sl_ring_start();
    feed->stage = feed->step = 0;
}

SL_DEV void sl_feed_step(struct sl_feed *feed, bool stage_ends) {
    feed->step = stage_ends ? 0 : feed->step + 1;
    feed->stage += stage_ends;
}

// A slice of the block's rows row0 .. row_end-1 and of the tile's columns.
template <int R>
SL_DEV void sl_feed_slices(struct sl_feed *feed, const struct sl_work *work,
                           const struct sl_simt_source *rows, int row0, int row_end,
                           const struct sl_simt_source *columns, int d_head) {
    constexpr int THREADS = sl_simt_threads<R>;
    const uint32_t to = sl_ring_copy(&feed->ring);
    sl_copy_slice<SL_SIMT_ROWS, THREADS, R>(to, rows, work, row0, row_end, feed->step, d_head);
    sl_copy_slice<SL_SIMT_COLUMNS, THREADS, 4>(to + SL_SIMT_SLOT / 2, columns, work, feed->walk.lo,
                                               sl_simt_walk_hi(&feed->walk), feed->step, d_head);
    sl_feed_step(feed, (feed->step + 1) * SL_SIMT_SLICE >= d_head);
}

// Whole rows of the tile's columns.
template <int D, int R>
SL_DEV void sl_feed_rows(struct sl_feed *feed, const struct sl_work *work,
                         const struct sl_simt_source *columns, int d_head) {
    constexpr int ROWS = sl_simt_slot_rows<D>;
    const int first = feed->walk.lo + feed->step * ROWS, end = sl_simt_walk_hi(&feed->walk);
    sl_copy_rows<D, sl_simt_threads<R>>(sl_ring_copy(&feed->ring), columns, work, first, end, d_head);
    sl_feed_step(feed, first + ROWS >= end);
}

SL_DEV void sl_feed_end(struct sl_feed *feed, int n_stage) {
    if (feed->stage == n_stage) {
        feed->stage = 0;
        feed->more = sl_simt_walk_next(&feed->walk);
    }
}
