#include "../kernels.h"
#include "attention_forward.cuh"

template <int D, int R>
static enum sl_status launch(const struct sl_cuda_call *call, const struct sl_attention_params *p) {
    return sl_cuda_launch(call, "attention_forward_f32", attention_forward_f32<D, R>, p->n_tile * p->n_head,
                          sl_simt_threads<R>, SL_SIMT_FORWARD_SHARED, *p);
}

enum sl_status sl_simt_attention_forward(const struct sl_cuda_call *call,
                                         const struct sl_attention_params *p) {
#define SL_HEAD_DIM(n)                                                                                       \
    if (p->d_head <= n) {                                                                                    \
        return launch<n, sl_simt_thread_rows<n>>(call, p);                                                   \
    }
#include "../head_dims.def"
#undef SL_HEAD_DIM
    return sl_error_set(call->err, SL_UNSUPPORTED, "query: this build has no kernel for head_dim %d",
                        p->d_head);
}
