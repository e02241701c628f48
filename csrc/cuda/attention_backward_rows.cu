// Before and after the tiles of the backward: delta, and the sinks' gradients from the sums of their chunks.
#include "attention_backward_params.cuh"
#include "ptx/convert.cuh"
#include "ptx/widen.cuh"

enum { THREADS = 128, SINKS = 8 };

// As many lanes a row, a power of 2, as it takes to read it 16 bytes a lane.
static SL_HD int delta_lanes(int d_head, int wide) {
    int lanes = 1;
    while (lanes * wide < d_head) {
        lanes *= 2;
    }
    return lanes < 32 ? lanes : 32;
}

template <enum sl_dtype DTYPE>
static __global__ void __launch_bounds__(THREADS)
    backward_delta(const __grid_constant__ struct sl_backward_params p) {
    constexpr int WIDE = sl_element_of<DTYPE>::WIDE, SIZE = sl_element_of<DTYPE>::SIZE;
    const int lanes = delta_lanes(p.d_head, WIDE);
    const int64_t row = (int64_t)blockIdx.x * (THREADS / lanes) + threadIdx.x / lanes;
    const int64_t n = row % p.n_token, h = row / p.n_token % p.n_head, b = row / p.n_token / p.n_head;
    const struct sl_heads *o = &p.output, *g = &p.grad_output;
    float sum = 0;
    for (int d = (int)threadIdx.x % lanes * WIDE; b < p.n_batch && d < p.d_head; d += lanes * WIDE) {
        float x[WIDE], y[WIDE];
        sl_widen<DTYPE>(*(const uint4 *)(o->data + (b * o->batch + h * o->head + n * o->token + d) * SIZE),
                        x);
        sl_widen<DTYPE>(*(const uint4 *)(g->data + (b * g->batch + h * g->head + n * g->token + d) * SIZE),
                        y);
        SL_UNROLL for (int i = 0; i < WIDE; i++) {
            sum += x[i] * y[i];
        }
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (b < p.n_batch && threadIdx.x % lanes == 0) {
        p.delta[row] = sum;
    }
}

// One block a sequence, key/value head and SINKS sinks. Blocks are numbered by chunks: those of a sequence's
// first chunk do it.
template <enum sl_dtype DTYPE>
static __global__ void __launch_bounds__(THREADS)
    backward_sum_sinks(const __grid_constant__ struct sl_backward_params p) {
    const int parts = (p.n_sink + SINKS - 1) / SINKS, part = (int)(blockIdx.x % parts);
    const int64_t chunk = blockIdx.x / parts / p.n_head_kv;
    const int hk = (int)(blockIdx.x / parts % p.n_head_kv);
    struct sl_work work;
    if (!sl_work_find(&p.chunks, chunk, true, &work) || work.tile != 0 || !sl_backward_has_sums(&p, &work)) {
        return; // the whole block
    }
    const int count = (work.length + p.chunks.query_tile - 1) / p.chunks.query_tile;
    const int k0 = part * SINKS, n = min(min(k0 + SINKS, p.n_sink), work.length) - k0;
    for (int i = threadIdx.x; i < 2 * n * p.d_head; i += THREADS) {
        const int d = i % p.d_head, k = k0 + i / p.d_head % n;
        const bool of_key = i < n * p.d_head;
        float sum = 0;
        for (int c = 0; c < count; c++) {
            struct sl_work at = work;
            at.tile = c;
            const float *from = sl_backward_partial(&p, &at, chunk + c, hk);
            sum += from[((int64_t)(of_key ? 0 : p.n_sink) + k) * p.d_head + d];
        }
        const struct sl_heads *to = of_key ? &p.grad_key : &p.grad_value;
        const int64_t row = work.batch * to->batch + hk * to->head + sl_work_column(&work, k) * to->token + d;
        sum *= of_key ? p.scale : 1.0f;
        if (DTYPE == SL_F32) {
            ((float *)to->data)[row] = sum;
        } else {
            ((uint16_t *)to->data)[row] = (uint16_t)sl_pack<DTYPE>(sum, 0);
        }
    }
}

enum sl_status sl_backward_delta(const struct sl_cuda_call *call, const struct sl_backward_params *p,
                                 enum sl_dtype dtype) {
    const int rows = THREADS / delta_lanes(p->d_head, 16 / (int)sl_dtype_size(dtype));
    return sl_cuda_launch(call, "backward_delta",
                          dtype == SL_F32    ? backward_delta<SL_F32>
                          : dtype == SL_BF16 ? backward_delta<SL_BF16>
                                             : backward_delta<SL_F16>,
                          sl_ceil_div((int64_t)p->n_batch * p->n_head * p->n_token, rows), THREADS, 0, *p);
}

enum sl_status sl_backward_sum_sinks(const struct sl_cuda_call *call, const struct sl_backward_params *p,
                                     enum sl_dtype dtype) {
    return sl_cuda_launch(call, "backward_sum_sinks",
                          dtype == SL_F32    ? backward_sum_sinks<SL_F32>
                          : dtype == SL_BF16 ? backward_sum_sinks<SL_BF16>
                                             : backward_sum_sinks<SL_F16>,
                          p->n_chunk * p->n_head_kv * sl_ceil_div(p->n_sink, SINKS), THREADS, 0, *p);
}
