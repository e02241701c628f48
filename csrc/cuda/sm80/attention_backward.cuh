// The launches of one dtype and head dimension.
#pragma once

#include "attention_backward_keys.cuh"
#include "attention_backward_queries.cuh"

template <enum sl_dtype DTYPE, int D>
static enum sl_status launch_backward(const struct sl_cuda_call *call, const struct sl_backward_params *p,
                                      bool owner) {
    constexpr int THREADS = backward_plan<D>::THREADS, SHARED = sl_backward_shared(D, true);
    if (owner) {
        return sl_cuda_launch(call, "backward_owner", backward_owner<DTYPE, D>, p->n_chunk * p->n_run,
                              THREADS, SHARED, *p);
    }
    const int64_t sinks = p->n_chunk * sl_ceil_div(p->n_sink, backward_plan<D>::MK);
    SL_TRY(sl_cuda_launch(call, "backward_keys", backward_keys<DTYPE, D>, (sinks + p->n_key_tile) * p->n_run,
                          THREADS, SHARED, *p));
    return sl_cuda_launch(call, "backward_queries", backward_queries<DTYPE, D>,
                          p->n_query_tile * p->n_run * (p->n_head / p->n_head_kv), THREADS,
                          sl_backward_shared(D, false), *p);
}
