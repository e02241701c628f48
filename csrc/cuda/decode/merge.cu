// Decode, second kernel: puts the chunks of each query row together, and adds what each slot received to its
// score. One block a query row, then one block a span of slots.
#include "../ptx/convert.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"
#include "candidate.cuh"

enum {
    WARPS = SL_DECODE_THREADS / 32,
    FACTOR_ROWS = 32,                                   // rows whose factors are in shared memory at a time
    SPAN_CHUNKS = SL_DECODE_SPAN / 32,                  // at most
    SHARED_BYTES = SL_DECODE_THREADS * 16 + WARPS * 16, // a row's sums, or factors and candidates
    CANDIDATES = FACTOR_ROWS * SPAN_CHUNKS * 4,         // their offset
};

struct total {
    float top, sum;
};

// Of all chunks of a row, for every lane of the warp.
SL_DEV struct total total_of(const struct sl_decode_params *p, int64_t row, int n_chunk) {
    const float *max = p->max + row * p->n_chunk, *sum = p->sum + row * p->n_chunk;
    struct total total = {-INFINITY, 0};
    for (int c = threadIdx.x & 31; c < n_chunk; c += 32) {
        total.top = fmaxf(total.top, max[c]);
    }
    total.top = sl_warp_max<32>(total.top);
    for (int c = threadIdx.x & 31; c < n_chunk; c += 32) {
        total.sum = fmaf(sl_exp2(max[c] - total.top), sum[c], total.sum);
    }
    total.sum = sl_warp_sum<32>(total.sum);
    return total;
}

SL_DEV int chunks_of(const struct sl_decode_params *p, int visible) {
    return (int)(((int64_t)visible + (1 << p->chunk_shift) - 1) >> p->chunk_shift);
}

SL_DEV void store_pair(const struct sl_decode_params *p, int64_t at, float a, float b) {
    if (p->dtype == SL_F32) {
        ((float *)p->output.data)[at] = a;
        ((float *)p->output.data)[at + 1] = b;
    } else {
        *(uint32_t *)((uint16_t *)p->output.data + at) =
            p->dtype == SL_BF16 ? sl_pack<SL_BF16>(a, b) : sl_pack<SL_F16>(a, b);
    }
}

// Thread: four columns, and of the chunks every n_group-th; then the groups' sums in order.
SL_DEV void merge_row(const struct sl_decode_params *p, int64_t row) {
    const int64_t head = row / p->n_row, b = head / p->n_head_kv, hk = head % p->n_head_kv;
    const int in_head = (int)(row % p->n_row), i = in_head % p->n_query;
    const int64_t h = hk * p->ratio + in_head / p->n_query;
    const struct sl_decode_live live = sl_decode_live_of(p, b, hk);
    const int n_chunk = chunks_of(p, sl_decode_visible(p, &live, b, i));
    const struct total total = total_of(p, row, n_chunk);
    const int pieces = p->d_head / 4, n_group = SL_DECODE_THREADS / pieces;
    const int group = (int)threadIdx.x / pieces, piece = (int)threadIdx.x % pieces;
    const uint32_t shared = sl_shared_addr(SL_SHARED_BASE());
    float sums[4] = {0, 0, 0, 0};
    SL_UNROLL_4 for (int c = group < n_group ? group : n_chunk; c < n_chunk; c += n_group) {
        const int64_t at = row * p->n_chunk + c;
        const float factor = sl_exp2(p->max[at] - total.top);
        float part[4];
        sl_ld_global_floats(part, p->parts + at * p->d_head + piece * 4);
        SL_UNROLL for (int e = 0; e < 4; e++) {
            sums[e] = fmaf(factor, part[e], sums[e]);
        }
    }
    if (group < n_group) {
        sl_st_shared_floats(shared + (group * p->d_head + piece * 4) * 4, sums);
    }
    __syncthreads();
    const float inverse = 1.0f / total.sum;
    for (int d = threadIdx.x * 2; d < p->d_head; d += SL_DECODE_THREADS * 2) {
        float a = 0, c = 0;
        for (int g = 0; g < n_group; g++) {
            const uint2 two = sl_ld_shared_v2(shared + (g * p->d_head + d) * 4);
            a += sl_float_of(two.x);
            c += sl_float_of(two.y);
        }
        store_pair(p, b * p->output.batch + h * p->output.head + i * p->output.token + d,
                   n_chunk ? sl_mul(a, inverse) : 0.0f, n_chunk ? sl_mul(c, inverse) : 0.0f);
    }
    if (p->lse && threadIdx.x == 0) {
        p->lse[(b * p->n_head + h) * p->n_query + i] =
            n_chunk ? (total.top + log2f(total.sum)) * 0.693147180559945309f : -INFINITY;
    }
}

// What a row's probabilities in the span's chunks count: one warp, to shared memory.
SL_DEV void find_factors(const struct sl_decode_params *p, const struct sl_decode_live *live, int64_t head,
                         int span, int row, uint32_t to) {
    const int lane = threadIdx.x & 31, i = row % p->n_query, per_span = SL_DECODE_SPAN >> p->chunk_shift;
    const int64_t b = head / p->n_head_kv;
    const int n_chunk = sl_decode_counted(p, b, i) ? chunks_of(p, sl_decode_visible(p, live, b, i)) : 0;
    const struct total total = total_of(p, head * p->n_row + row, n_chunk);
    const int c = span * per_span + lane;
    if (lane < per_span) {
        const float max = c < n_chunk ? p->max[(head * p->n_row + row) * p->n_chunk + c] : 0.0f;
        sl_st_shared_float(to + lane * 4, c < n_chunk ? sl_exp2(max - total.top) / total.sum : 0.0f);
    }
}

// One slot a thread. In a step the new token's score starts at 0 and its position is written; what may be
// evicted is looked for on the way.
SL_DEV void add_scores(const struct sl_decode_params *p, int64_t head, int span) {
    const int64_t b = head / p->n_head_kv, hk = head % p->n_head_kv;
    const struct sl_decode_live live = sl_decode_live_of(p, b, hk);
    const int x = span * SL_DECODE_SPAN + (int)threadIdx.x, warp = threadIdx.x >> 5;
    const uint32_t shared = sl_shared_addr(SL_SHARED_BASE());
    if (span * SL_DECODE_SPAN >= live.n) {
        return; // the whole block
    }
    float sum = 0;
    for (int row0 = 0; row0 < p->n_row; row0 += FACTOR_ROWS) {
        const int n = min(FACTOR_ROWS, p->n_row - row0);
        __syncthreads(); // the factors before are read
        for (int r = warp; r < n; r += WARPS) {
            find_factors(p, &live, head, span, row0 + r, shared + r * SPAN_CHUNKS * 4);
        }
        __syncthreads();
        SL_UNROLL_4 for (int r = 0; r < n; r++) {
            const float factor =
                sl_ld_shared_float(shared + (r * SPAN_CHUNKS + (threadIdx.x >> p->chunk_shift)) * 4);
            const bool seen = factor != 0 && x < live.n;
            const float weight = seen ? p->weights[(head * p->n_row + row0 + r) * p->weight_stride + x] : 0;
            sum = seen ? fmaf(factor, weight, sum) : sum;
        }
    }
    struct sl_decode_candidate candidate = sl_no_candidate();
    if (x < live.n) {
        const int slot = sl_decode_slot(&live, x);
        float *score = p->scores + head * p->n_key + slot;
        const bool fresh = slot == live.free;
        const float now = (fresh ? 0.0f : *score) + sl_mul(sum, p->share);
        *score = now;
        if (p->rows) {
            int32_t *position = p->positions + head * p->n_key + slot;
            if (fresh) {
                *position = live.seen;
            }
            candidate = sl_candidate(p, &live, slot, fresh ? live.seen : *position, now);
        }
    }
    if (!p->rows || live.used + 1 <= live.budget) {
        return; // the whole block
    }
    candidate = sl_first_candidate(candidate);
    const uint32_t all = shared + CANDIDATES;
    if ((threadIdx.x & 31) == 0) {
        sl_st_shared_b32(all + warp * 12, candidate.score);
        sl_st_shared_b32(all + warp * 12 + 4, candidate.age);
        sl_st_shared_b32(all + warp * 12 + 8, (uint32_t)candidate.slot);
    }
    __syncthreads();
    for (int w = 0; w < WARPS && threadIdx.x == 0; w++) {
        const struct sl_decode_candidate other = {sl_ld_shared_b32(all + w * 12),
                                                  sl_ld_shared_b32(all + w * 12 + 4),
                                                  (int32_t)sl_ld_shared_b32(all + w * 12 + 8), 0};
        candidate = sl_goes_before(other, candidate) ? other : candidate;
    }
    if (threadIdx.x == 0) {
        p->candidates[head * p->n_span + span] = candidate;
    }
}

static __global__ void __launch_bounds__(SL_DECODE_THREADS)
    decode_merge(const __grid_constant__ struct sl_decode_params p) {
    const int64_t n_row = (int64_t)p.n_batch * p.n_head_kv * p.n_row, item = blockIdx.x;
    if (item < n_row) {
        merge_row(&p, item);
    } else {
        add_scores(&p, (item - n_row) / p.n_span, (int)((item - n_row) % p.n_span));
    }
}

enum sl_status sl_decode_merge(const struct sl_cuda_call *call, const struct sl_decode_params *p) {
    const int64_t heads = (int64_t)p->n_batch * p->n_head_kv, rows = heads * p->n_row;
    return sl_cuda_launch(call, "decode_merge", decode_merge, rows + (p->scores ? heads * p->n_span : 0),
                          SL_DECODE_THREADS, SHARED_BYTES, *p);
}
