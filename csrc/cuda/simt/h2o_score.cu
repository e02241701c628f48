#include "../kernels.h"
#include "h2o_score.cuh"

enum { THREAD_ROWS = 4 }; // for every head dimension

enum sl_status sl_simt_h2o_score(const struct sl_cuda_call *call, const struct sl_score_params *p) {
    return sl_cuda_launch(call, "h2o_score_f32", h2o_score_f32<THREAD_ROWS>, sl_score_blocks_of(p),
                          sl_simt_threads<THREAD_ROWS>, SL_SIMT_SCORE_SHARED, *p);
}
