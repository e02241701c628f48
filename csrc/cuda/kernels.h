// The launchers that the operations choose from, by architecture and dtype.
#pragma once

#include "attention_backward_params.cuh"
#include "attention_params.cuh"
#include "h2o_score_params.cuh"

// The head dimension that kernels are instantiated for and that d_head is rounded up to; 0: none.
static inline int sl_head_dim(int64_t d_head) {
#define SL_HEAD_DIM(n)                                                                                       \
    if (d_head <= n) {                                                                                       \
        return n;                                                                                            \
    }
#include "head_dims.def"
#undef SL_HEAD_DIM
    return 0;
}

enum sl_status sl_sm80_attention_forward_bf16(const struct sl_cuda_call *call,
                                              const struct sl_attention_params *p) SL_MUST_CHECK;
enum sl_status sl_sm80_attention_forward_f16(const struct sl_cuda_call *call,
                                             const struct sl_attention_params *p) SL_MUST_CHECK;

enum sl_status sl_sm80_h2o_score_bf16(const struct sl_cuda_call *call,
                                      const struct sl_score_params *p) SL_MUST_CHECK;
enum sl_status sl_sm80_h2o_score_f16(const struct sl_cuda_call *call,
                                     const struct sl_score_params *p) SL_MUST_CHECK;
enum sl_status sl_simt_attention_forward(const struct sl_cuda_call *call,
                                         const struct sl_attention_params *p) SL_MUST_CHECK;
enum sl_status sl_simt_h2o_score(const struct sl_cuda_call *call,
                                 const struct sl_score_params *p) SL_MUST_CHECK;

// The whole backward in float32.
int64_t sl_simt_attention_backward_workspace(const struct sl_attention_args *a);
enum sl_status sl_simt_attention_backward(const struct sl_cuda_call *call, const struct sl_attention_args *a,
                                          void *workspace) SL_MUST_CHECK;

enum sl_status sl_sm80_attention_backward_bf16(const struct sl_cuda_call *call,
                                               const struct sl_backward_params *p, bool owner) SL_MUST_CHECK;
enum sl_status sl_sm80_attention_backward_f16(const struct sl_cuda_call *call,
                                              const struct sl_backward_params *p, bool owner) SL_MUST_CHECK;
