// Decode, first kernel: attention of all query rows of a key/value head to one chunk of its live slots. All
// of the chunk's keys and values are asked for at once (cp.async) and lie in shared memory, so that memory is
// kept busy by what is in flight, not by the number of warps. Leaves each row's maximum, sum and part of the
// output, and its probabilities where scores are wanted. In a step the new token stands in for its slot, and
// goes there.
#pragma once

#include "../ptx/convert.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"
#include "../ptx/widen.cuh"
#include "params.cuh"

// Slots that a thread computes dot products of side by side, so that what it reads of the queries serves all.
enum { SLOTS = 4 };

// Shared memory: keys | values, later logits in the keys' place, then sums in the place of both; queries,
// later probabilities in their place. Rows of keys are an odd number of 16-byte pieces apart, so that threads
// of neighbouring slots read from different banks.
struct chunk_plan {
    int pieces;               // of 16 bytes in a row
    int key_stride;           // bytes
    int values, queries, all; // offsets
};

template <enum sl_dtype DTYPE, int ROWS>
static __host__ __device__ struct chunk_plan chunk_plan_of(int d_head, int chunk_shift) {
    struct chunk_plan plan;
    plan.pieces = d_head / sl_element_of<DTYPE>::WIDE;
    plan.key_stride = (plan.pieces | 1) * 16;
    const int keys = plan.key_stride << chunk_shift, logits = SL_DECODE_THREADS * (SLOTS * ROWS + 1) * 4;
    plan.values = keys > logits ? keys : logits;
    const int both = plan.values + (plan.pieces << (4 + chunk_shift));
    const int sums = SL_DECODE_THREADS / plan.pieces * ROWS * d_head * 4;
    plan.queries = both > sums ? both : sums;
    plan.all = plan.queries + ROWS * 4 * (d_head > 1 << chunk_shift ? d_head : 1 << chunk_shift);
    return plan;
}

// What one block works on.
struct chunk_work {
    int64_t b, hk;
    struct sl_decode_live live;
    int x0, n;       // its live slots
    int row0, n_row; // its query rows
};

// Starts the copy of the chunk's rows.
SL_DEV void load_slots(uint32_t to, int stride, int pieces, const struct sl_heads *t,
                       const struct sl_heads *fresh, int size, const struct chunk_work *w) {
    const char *rows = t->data + (w->b * t->batch + w->hk * t->head) * size;
    const char *new_row = fresh->data + (w->b * fresh->batch + w->hk * fresh->head) * size;
    const int64_t apart = t->token * size;
    const int rows_on = SL_DECODE_THREADS / pieces, pieces_on = SL_DECODE_THREADS % pieces;
    int i = (int)threadIdx.x / pieces, piece = (int)threadIdx.x % pieces;
    while (i < w->n) {
        const int slot = sl_decode_slot(&w->live, w->x0 + i);
        const char *row = slot == w->live.free ? new_row : rows + slot * apart;
        sl_cp_async_16(to + i * stride + piece * 16, row + piece * 16, 16);
        i += rows_on;
        piece += pieces_on;
        if (piece >= pieces) {
            piece -= pieces;
            i++;
        }
    }
    sl_cp_async_commit();
}

// Copies the new token's row into the cache, elements of any alignment.
template <class ELEMENT>
SL_DEV void insert_row(const struct sl_heads *cache, const struct sl_heads *fresh, int d_head,
                       const struct chunk_work *w) {
    ELEMENT *to =
        (ELEMENT *)cache->data + w->b * cache->batch + w->hk * cache->head + w->live.free * cache->token;
    const ELEMENT *from = (const ELEMENT *)fresh->data + w->b * fresh->batch + w->hk * fresh->head;
    for (int d = threadIdx.x; d < d_head; d += SL_DECODE_THREADS) {
        to[d] = from[d];
    }
}

// Queries as floats, [d_head][ROWS], zeros for rows that do not exist; a negative scale's sign goes into
// them.
template <enum sl_dtype DTYPE, int ROWS>
SL_DEV void load_queries(uint32_t to, const struct sl_decode_params *p, const struct chunk_work *w) {
    for (int at = threadIdx.x; at < p->d_head * ROWS; at += SL_DECODE_THREADS) {
        const int r = at % ROWS, row = w->row0 + r;
        float q = 0;
        if (r < w->n_row) {
            const int64_t h = w->hk * p->ratio + row / p->n_query, i = row % p->n_query;
            q = sl_element<DTYPE>(p->query.data,
                                  w->b * p->query.batch + h * p->query.head + i * p->query.token + at / ROWS);
        }
        sl_st_shared_float(to + at * 4, p->negative ? -q : q);
    }
}

// ROWS floats that lie together.
template <int ROWS> SL_DEV void load_rows(float *v, uint32_t from) {
    if (ROWS == 1) {
        v[0] = sl_ld_shared_float(from);
    }
    SL_UNROLL for (int r = 0; r + 4 <= ROWS; r += 4) {
        sl_ld_shared_floats(v + r, from + r * 4);
    }
}

// Threads that share a slot's dot products.
SL_DEV int parts_of(int chunk_shift) {
    return SL_DECODE_THREADS * SLOTS >> chunk_shift;
}

// Where the parts of dot products stand, [part][ROWS][slot]: parts that one warp computes are in different
// banks.
template <int ROWS> SL_DEV int dot_at(int chunk_shift, int part, int r, int slot) {
    return part * ((ROWS << chunk_shift) + (1 << chunk_shift) / SLOTS) + (r << chunk_shift) + slot;
}

// Thread: SLOTS slots, and of their rows' pieces every n_part-th.
template <enum sl_dtype DTYPE, int ROWS>
SL_DEV void dot_slots(uint32_t shared, const struct chunk_plan *plan, int chunk_shift, int n) {
    constexpr int WIDE = sl_element_of<DTYPE>::WIDE;
    const int apart = (1 << chunk_shift) / SLOTS, n_part = parts_of(chunk_shift);
    const int slot = threadIdx.x % apart, part = threadIdx.x / apart;
    float dots[SLOTS][ROWS];
    uint32_t key[SLOTS];
    SL_UNROLL for (int j = 0; j < SLOTS; j++) {
        key[j] = shared + min(slot + j * apart, n - 1) * plan->key_stride;
        SL_UNROLL for (int r = 0; r < ROWS; r++) {
            dots[j][r] = 0;
        }
    }
    for (int piece = part; piece < plan->pieces; piece += n_part) {
        float k[SLOTS][WIDE];
        SL_UNROLL for (int j = 0; j < SLOTS; j++) {
            sl_widen<DTYPE>(sl_ld_shared_v4(key[j] + piece * 16), k[j]);
        }
        SL_UNROLL for (int e = 0; e < WIDE; e++) {
            float q[ROWS];
            load_rows<ROWS>(q, shared + plan->queries + (piece * WIDE + e) * ROWS * 4);
            SL_UNROLL for (int j = 0; j < SLOTS; j++) {
                SL_UNROLL for (int r = 0; r < ROWS; r++) {
                    dots[j][r] = fmaf(q[r], k[j][e], dots[j][r]);
                }
            }
        }
    }
    __syncthreads(); // keys and queries are read
    SL_UNROLL for (int j = 0; j < SLOTS; j++) {
        SL_UNROLL for (int r = 0; r < ROWS; r++) {
            const int at = dot_at<ROWS>(chunk_shift, part, r, slot + j * apart);
            sl_st_shared_float(shared + at * 4, dots[j][r]);
        }
    }
}

// One warp: the softmax of a row over the chunk, from the parts of its dot products.
template <int ROWS>
SL_DEV void soften_row(uint32_t shared, const struct chunk_plan *plan, const struct sl_decode_params *p,
                       const struct chunk_work *w, int r) {
    constexpr int MOST = 8; // slots of a lane
    const int lane = threadIdx.x & 31;
    const int n_part = min(parts_of(p->chunk_shift), plan->pieces);
    const int64_t row = (w->b * p->n_head_kv + w->hk) * p->n_row + w->row0 + r;
    const bool real = r < w->n_row;
    const int all = real ? sl_decode_visible(p, &w->live, w->b, (w->row0 + r) % p->n_query) : 0;
    const int visible = sl_clamp(all - w->x0, 0, w->n);
    float s[MOST], highest = -FLT_MAX, sum = 0;
    SL_UNROLL for (int i = 0; i < MOST; i++) {
        const int x = lane + i * 32;
        s[i] = 0;
        if (x < visible) {
            for (int part = 0; part < n_part; part++) {
                s[i] += sl_ld_shared_float(shared + dot_at<ROWS>(p->chunk_shift, part, r, x) * 4);
            }
            highest = fmaxf(highest, s[i]);
        }
    }
    const float top = sl_mul(sl_warp_max<32>(highest), p->scale2);
    SL_UNROLL for (int i = 0; i < MOST; i++) {
        const int x = lane + i * 32;
        if (x < w->n) {
            const float weight = x < visible ? sl_exp2(sl_mul(s[i], p->scale2) - top) : 0.0f;
            sum += weight;
            sl_st_shared_float(shared + plan->queries + (x * ROWS + r) * 4, weight);
            if (p->weights && real) {
                p->weights[row * p->weight_stride + w->x0 + x] = weight;
            }
        }
    }
    sum = sl_warp_sum<32>(sum);
    if (lane == 0 && real) {
        const int64_t at = row * p->n_chunk + (w->x0 >> p->chunk_shift);
        p->max[at] = top;
        p->sum[at] = sum;
    }
}

// Thread: one piece of the columns, and of the slots every n_group-th; then the groups' sums in order.
template <enum sl_dtype DTYPE, int ROWS>
SL_DEV void sum_values(uint32_t shared, const struct chunk_plan *plan, const struct sl_decode_params *p,
                       const struct chunk_work *w) {
    constexpr int WIDE = sl_element_of<DTYPE>::WIDE;
    const int n_group = SL_DECODE_THREADS / plan->pieces, group = threadIdx.x / plan->pieces;
    const int piece = threadIdx.x % plan->pieces, d_head = p->d_head;
    float sums[ROWS][WIDE];
    SL_UNROLL for (int r = 0; r < ROWS; r++) {
        SL_UNROLL for (int e = 0; e < WIDE; e++) {
            sums[r][e] = 0;
        }
    }
    for (int i = group < n_group ? group : w->n; i < w->n; i += n_group) {
        float v[WIDE], weight[ROWS];
        sl_widen<DTYPE>(sl_ld_shared_v4(shared + plan->values + (i * plan->pieces + piece) * 16), v);
        load_rows<ROWS>(weight, shared + plan->queries + i * ROWS * 4);
        SL_UNROLL for (int r = 0; r < ROWS; r++) {
            SL_UNROLL for (int e = 0; e < WIDE; e++) {
                sums[r][e] = fmaf(weight[r], v[e], sums[r][e]);
            }
        }
    }
    __syncthreads(); // all values are read
    // Fours of neighbouring threads stand side by side: [group][ROWS][WIDE / 4][piece][4].
    SL_UNROLL for (int r = 0; r < ROWS; r++) {
        SL_UNROLL for (int e = 0; e < WIDE; e += 4) {
            if (group < n_group) {
                const int at = (group * ROWS + r) * d_head + (e / 4 * plan->pieces + piece) * 4;
                sl_st_shared_floats(shared + at * 4, &sums[r][e]);
            }
        }
    }
    __syncthreads();
    const int64_t row0 = (w->b * p->n_head_kv + w->hk) * p->n_row + w->row0;
    for (int at = threadIdx.x; at < w->n_row * d_head; at += SL_DECODE_THREADS) {
        const int r = at / d_head, in_row = at - r * d_head, four = in_row / 4;
        const int d = four % plan->pieces * WIDE + four / plan->pieces * 4 + in_row % 4;
        float sum = 0;
        for (int g = 0; g < n_group; g++) {
            sum += sl_ld_shared_float(shared + (g * ROWS * d_head + at) * 4);
        }
        p->parts[((row0 + r) * p->n_chunk + (w->x0 >> p->chunk_shift)) * d_head + d] = sum;
    }
}

template <enum sl_dtype DTYPE, int ROWS>
static __global__ void __launch_bounds__(SL_DECODE_THREADS, ROWS == 8 ? 2 : 3)
    decode_chunks(const __grid_constant__ struct sl_decode_params p) {
    constexpr int SIZE = sl_element_of<DTYPE>::SIZE;
    const int tile = blockIdx.x % p.n_tile, c = blockIdx.x / p.n_tile % p.n_chunk;
    const int head = blockIdx.x / p.n_tile / p.n_chunk;
    struct chunk_work w;
    w.b = head / p.n_head_kv;
    w.hk = head % p.n_head_kv;
    w.live = sl_decode_live_of(&p, w.b, w.hk);
    w.x0 = c << p.chunk_shift;
    w.n = min(1 << p.chunk_shift, w.live.n - w.x0);
    w.row0 = tile * ROWS;
    w.n_row = min(ROWS, p.n_row - w.row0);
    if (w.n <= 0) {
        return; // the whole block
    }
    const struct chunk_plan plan = chunk_plan_of<DTYPE, ROWS>(p.d_head, p.chunk_shift);
    const uint32_t shared = sl_shared_addr(SL_SHARED_BASE());
    load_slots(shared, plan.key_stride, plan.pieces, &p.key, &p.new_key, SIZE, &w);
    load_slots(shared + plan.values, plan.pieces * 16, plan.pieces, &p.value, &p.new_value, SIZE, &w);
    load_queries<DTYPE, ROWS>(shared + plan.queries, &p, &w);
    if (tile == 0 && w.live.free >= w.x0 && w.live.free < w.x0 + w.n) {
        typedef typename sl_element_of<DTYPE>::type element;
        insert_row<element>(&p.key_to, &p.new_key, p.d_head, &w);
        insert_row<element>(&p.value_to, &p.new_value, p.d_head, &w);
    }
    sl_cp_async_wait<1>(); // the keys have landed
    __syncthreads();
    dot_slots<DTYPE, ROWS>(shared, &plan, p.chunk_shift, w.n);
    __syncthreads();
    if ((int)threadIdx.x / 32 < ROWS) {
        soften_row<ROWS>(shared, &plan, &p, &w, threadIdx.x / 32);
    }
    sl_cp_async_wait<0>(); // the values have landed
    __syncthreads();
    sum_values<DTYPE, ROWS>(shared, &plan, &p, &w);
}

template <enum sl_dtype DTYPE, int ROWS>
static enum sl_status launch_rows(const struct sl_cuda_call *call, struct sl_decode_params p) {
    p.n_tile = (int32_t)sl_ceil_div(p.n_row, ROWS);
    const int shared = chunk_plan_of<DTYPE, ROWS>(p.d_head, p.chunk_shift).all;
    return sl_cuda_launch(call, "decode_chunks", decode_chunks<DTYPE, ROWS>,
                          (int64_t)p.n_batch * p.n_head_kv * p.n_chunk * p.n_tile, SL_DECODE_THREADS, shared,
                          p);
}

template <enum sl_dtype DTYPE>
static enum sl_status launch_chunks(const struct sl_cuda_call *call, const struct sl_decode_params *p) {
    return p->n_row == 1   ? launch_rows<DTYPE, 1>(call, *p)
           : p->n_row <= 4 ? launch_rows<DTYPE, 4>(call, *p)
                           : launch_rows<DTYPE, 8>(call, *p);
}
