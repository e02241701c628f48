#include "../kernels.h"
#include "attention_backward.cuh"

enum sl_status sl_sm80_attention_backward_f16(const struct sl_cuda_call *call,
                                              const struct sl_backward_params *p, bool owner) {
#define SL_HEAD_DIM(n)                                                                                       \
    if (p->d_head <= n) {                                                                                    \
        return launch_backward<SL_F16, n>(call, p, owner);                                                   \
    }
#include "../head_dims.def"
#undef SL_HEAD_DIM
    return sl_error_set(call->err, SL_UNSUPPORTED, "query: this build has no kernel for head_dim %d",
                        p->d_head);
}
