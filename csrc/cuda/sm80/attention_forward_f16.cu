#include "attention_forward.cuh"

enum sl_status sl_sm80_attention_forward_f16(const struct sl_cuda_call *call,
                                             const struct sl_attention_params *p) {
#define SL_HEAD_DIM(n)                                                                                       \
    if (p->d_head <= n) {                                                                                    \
        return launch_forward<SL_F16, n>(call, p);                                                           \
    }
#include "../head_dims.def"
#undef SL_HEAD_DIM
    return sl_error_set(call->err, SL_UNSUPPORTED, "query: this build has no kernel for head_dim %d",
                        p->d_head);
}
