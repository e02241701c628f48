#include "attention_backward_key.cuh"

template <int D, int R>
static enum sl_status launch(const struct sl_cuda_call *call, const struct sl_simt_backward_params *p) {
    const int64_t n_tile = p->sinks ? p->n_query_tile * p->n_sink_tile : p->n_key_tile;
    return sl_cuda_launch(call, "attention_backward_key_f32", attention_backward_key_f32<D, R>,
                          n_tile * p->n_head_kv, sl_simt_threads<R>, SL_SIMT_BACKWARD_SHARED, *p);
}

enum sl_status sl_simt_backward_key(const struct sl_cuda_call *call,
                                    const struct sl_simt_backward_params *p) {
#define SL_HEAD_DIM(n)                                                                                       \
    if (p->d_head <= n) {                                                                                    \
        return launch<n, (n <= 64 ? 4 : 2)>(call, p);                                                        \
    }
#include "../head_dims.def"
#undef SL_HEAD_DIM
    return sl_error_set(call->err, SL_UNSUPPORTED, "query: this build has no kernel for head_dim %d",
                        p->d_head);
}
