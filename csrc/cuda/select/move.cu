// Select, second kernel: moves the kept rows of keys and values to the first slots, and counts them. A block
// has some columns of the rows of one head, so that it can move them in place: front to back, all rows of a
// batch read before the first is written. Into other memory heads are split further.
#include "params.cuh"

enum { THREADS = 512, ROWS = 8 }; // rows of a thread in a batch: what is in flight

// Heads that disagree (they never should) leave the fewest.
SL_DEV void count_used(const struct sl_select_params *p, int64_t b) {
    int least = p->n_slot;
    for (int hk = 0; hk < p->n_head_kv; hk++) {
        least = min(least, p->n_kept[b * p->n_head_kv + hk]);
    }
    p->rows[b * SL_ROW_FIELDS + SL_ROW_USED] = least;
}

template <class WORD>
static __global__ void __launch_bounds__(THREADS)
    select_move(const __grid_constant__ struct sl_select_params p) {
    const int split = blockIdx.x % p.n_split, slice = blockIdx.x / p.n_split % p.n_slice;
    const int64_t item = blockIdx.x / p.n_split / p.n_slice, head = item / 2;
    const int64_t b = head / p.n_head_kv, hk = head % p.n_head_kv;
    const struct sl_heads &from = p.from[item % 2], &to = p.to[item % 2];
    const int word = slice * p.n_lane + (int)threadIdx.x % p.n_lane, per = THREADS / p.n_lane;
    const int lo = split * p.n_rows, hi = min(lo + p.n_rows, p.n_kept[head]);
    const WORD *in = (const WORD *)from.data + b * from.batch + hk * from.head + word;
    WORD *out = (WORD *)to.data + b * to.batch + hk * to.head + word;
    const int32_t *list = p.list + head * p.n_list;
    for (int i0 = lo; i0 < hi; i0 += per * ROWS) {
        WORD row[ROWS] = {};
        SL_UNROLL for (int r = 0; r < ROWS; r++) {
            const int i = i0 + r * per + (int)threadIdx.x / p.n_lane;
            if (i < hi && word < p.n_word) {
                row[r] = in[list[i] * from.token];
            }
        }
        __syncthreads();
        SL_UNROLL for (int r = 0; r < ROWS; r++) {
            const int i = i0 + r * per + (int)threadIdx.x / p.n_lane;
            if (i < hi && word < p.n_word) {
                out[i * to.token] = row[r];
            }
        }
    }
    if (item % 2 == 0 && hk == 0 && slice == 0 && split == 0 && threadIdx.x == 0) {
        count_used(&p, b);
    }
}

enum sl_status sl_select_move(const struct sl_cuda_call *call, const struct sl_select_params *p,
                              int word_bytes) {
    void (*kernel)(struct sl_select_params) = word_bytes == 16  ? select_move<uint4>
                                              : word_bytes == 4 ? select_move<uint32_t>
                                                                : select_move<uint16_t>;
    return sl_cuda_launch(call, "select_move", kernel,
                          (int64_t)p->n_batch * p->n_head_kv * 2 * p->n_slice * p->n_split, THREADS, 0, *p);
}
