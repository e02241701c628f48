// What every operation shares on the host: the tensors' device, checked launches, scratch memory, rows that
// kernels can read 16 bytes at a time.
#pragma once

#include "ptx/platform.cuh"

extern "C" {
#include "../core/attention.h"
#include "../core/h2o.h"
}

#include <float.h>
#include <math.h>

// A call in progress. Owns nothing but the duty to select the caller's device again.
struct sl_cuda_call {
    cudaStream_t stream;
    int device, device_before;
    int n_processor; // multiprocessors
    int max_shared;  // bytes of shared memory that one block may have
    struct sl_error *err;
};

// Selects like's device. SL_RUNTIME with CUDA's message where that fails.
enum sl_status sl_cuda_begin(struct sl_cuda_call *call, const struct sl_tensor *like, void *stream,
                             struct sl_error *err) SL_MUST_CHECK;
// Selects the caller's device again; returns status.
enum sl_status sl_cuda_end(struct sl_cuda_call *call, enum sl_status status);

// SL_OK, or SL_RUNTIME with the name of what failed and CUDA's message.
enum sl_status sl_cuda_check(const struct sl_cuda_call *call, cudaError_t error,
                             const char *what) SL_MUST_CHECK;

// Launches kernel<<<n_block, n_thread, shared>>>(params) on the call's stream; nothing where n_block is 0.
template <class PARAMS>
enum sl_status sl_cuda_launch(const struct sl_cuda_call *call, const char *name, void (*kernel)(PARAMS),
                              int64_t n_block, int n_thread, int shared, const PARAMS &params) {
    if (n_block <= 0) {
        return SL_OK;
    }
    if (n_block > INT32_MAX) {
        return sl_error_set(call->err, SL_UNSUPPORTED, "%s: expected fewer than 2^31 blocks, got %lld", name,
                            (long long)n_block);
    }
    if (shared > 48 * 1024) {
        SL_TRY(sl_cuda_check(
            call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name));
    }
    SL_LAUNCH(kernel, dim3((unsigned)n_block), dim3((unsigned)n_thread), (size_t)shared, call->stream,
              params);
    return sl_cuda_check(call, cudaGetLastError(), name);
}

// A region of device memory, cut front to back in 256-byte steps. With base NULL nothing is handed out and
// used only measures. The workspace may have any alignment: ask for 256 bytes more than `used` says.
struct sl_device_scratch {
    char *base;
    int64_t used;
};

static inline struct sl_device_scratch sl_device_scratch_in(void *workspace) {
    struct sl_device_scratch scratch = {NULL, 0};
    if (workspace) {
        scratch.base = (char *)workspace + (256 - (uintptr_t)workspace % 256) % 256;
    }
    return scratch;
}

static inline void *sl_device_take(struct sl_device_scratch *scratch, int64_t bytes) {
    void *memory = scratch->base ? scratch->base + scratch->used : NULL;
    scratch->used += (bytes + 255) / 256 * 256;
    return memory;
}

// Rows [b, h, n] of a tensor of heads as kernels take them: strides count elements.
struct sl_heads {
    char *data;
    int64_t batch, head, token;
};

// May kernels read the rows of t in pieces of 16 bytes, and step between tokens by a 32-bit stride?
bool sl_heads_aligned(const struct sl_tensor *t);

// t's rows, or where they are not aligned those of a contiguous copy of t in scratch memory, which is only
// reserved here: sl_heads_load fills it from t (an input), sl_heads_store copies it to t (an output). Absent
// tensors give NULL.
struct sl_heads sl_heads_of(const struct sl_tensor *t, struct sl_device_scratch *scratch);
enum sl_status sl_heads_load(const struct sl_cuda_call *call, const struct sl_tensor *t,
                             const struct sl_heads *heads) SL_MUST_CHECK;
enum sl_status sl_heads_store(const struct sl_cuda_call *call, const struct sl_tensor *t,
                              const struct sl_heads *heads) SL_MUST_CHECK;

// What scores are multiplied by for exp2: |scale| * log2(e), positive and finite, because 0 times it must be
// 0, and it times the lowest float no NaN. The sign of scale goes into the queries.
static inline float sl_cuda_scale2(double scale) {
    const float log2_e = 1.44269504088896341f;
    return fminf(fmaxf(fabsf((float)scale) * log2_e, FLT_MIN), FLT_MAX);
}

static inline int64_t sl_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
