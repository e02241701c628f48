// Decode, third kernel, of a step: frees a slot of each head and counts the token. One block a batch row: all
// of its heads have read the counts before they change.
#include "candidate.cuh"

enum { WARPS = SL_DECODE_THREADS / 32 };

// One warp. Where no slot may be evicted (counts that contradict each other) the new token's is freed.
SL_DEV void free_a_slot(const struct sl_decode_params *p, const struct sl_decode_live *live, int64_t head) {
    const int lane = threadIdx.x & 31;
    if (live->used + 1 <= live->budget) {
        if (lane == 0) {
            p->free_slot[head] = live->used + 1;
        }
        return; // the whole warp
    }
    const int n_span = (live->n - 1) / SL_DECODE_SPAN + 1;
    struct sl_decode_candidate candidate = sl_no_candidate();
    for (int span = lane; span < n_span; span += 32) {
        const struct sl_decode_candidate other = p->candidates[head * p->n_span + span];
        candidate = sl_goes_before(other, candidate) ? other : candidate;
    }
    candidate = sl_first_candidate(candidate);
    const int slot = candidate.slot >= 0 ? candidate.slot : live->free;
    if (lane == 0) {
        p->free_slot[head] = slot;
        p->positions[head * p->n_key + slot] = -1;
        p->scores[head * p->n_key + slot] = 0;
    }
}

static __global__ void __launch_bounds__(SL_DECODE_THREADS)
    decode_step(const __grid_constant__ struct sl_decode_params p) {
    const int64_t b = blockIdx.x;
    const struct sl_decode_live row = sl_decode_row_of(&p, b);
    if (row.n == 0) {
        return; // the whole block: the new token is padding
    }
    for (int hk = threadIdx.x >> 5; hk < p.n_head_kv; hk += WARPS) {
        const struct sl_decode_live live = sl_decode_live_of(&p, b, hk);
        __syncwarp(); // every lane has read the free slot
        free_a_slot(&p, &live, b * p.n_head_kv + hk);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        p.rows[b * SL_ROW_FIELDS + SL_ROW_USED] = row.used + (row.used + 1 <= row.budget);
        p.rows[b * SL_ROW_FIELDS + SL_ROW_SEEN] = row.seen + 1;
    }
}

enum sl_status sl_decode_step(const struct sl_cuda_call *call, const struct sl_decode_params *p) {
    return sl_cuda_launch(call, "decode_step", decode_step, p->n_batch, SL_DECODE_THREADS, 0, *p);
}
