#include "chunks.cuh"

enum sl_status sl_decode_chunks_bf16(const struct sl_cuda_call *call, const struct sl_decode_params *p) {
    return launch_chunks<SL_BF16>(call, p);
}
