#include "host.h"

enum sl_status sl_cuda_check(const struct sl_cuda_call *call, cudaError_t error, const char *what) {
    if (error == cudaSuccess) {
        return SL_OK;
    }
    (void)cudaGetLastError(); // forgotten here, so that the next call starts clean
    return sl_error_set(call->err, SL_RUNTIME, "%s: expected no CUDA error, got %s", what,
                        cudaGetErrorString(error));
}

enum sl_status sl_cuda_begin(struct sl_cuda_call *call, const struct sl_tensor *like, void *stream,
                             struct sl_error *err) {
    call->stream = (cudaStream_t)stream;
    call->device = like->device_id;
    call->err = err;
    SL_TRY(sl_cuda_check(call, cudaGetDevice(&call->device_before), "cudaGetDevice"));
    if (call->device != call->device_before) {
        SL_TRY(sl_cuda_check(call, cudaSetDevice(call->device), "cudaSetDevice"));
    }
    enum sl_status status = sl_cuda_check(
        call, cudaDeviceGetAttribute(&call->n_processor, cudaDevAttrMultiProcessorCount, call->device),
        "cudaDeviceGetAttribute");
    if (status == SL_OK) {
        status = sl_cuda_check(
            call,
            cudaDeviceGetAttribute(&call->max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, call->device),
            "cudaDeviceGetAttribute");
    }
    return status == SL_OK ? SL_OK : sl_cuda_end(call, status);
}

enum sl_status sl_cuda_end(struct sl_cuda_call *call, enum sl_status status) {
    if (call->device != call->device_before) {
        (void)cudaSetDevice(call->device_before);
    }
    return status;
}

// ---- rows of any alignment ----

enum { COPY_THREADS = 256 };

struct copy_params {
    struct sl_heads from, to;
    int64_t n_element; // of 2 or 4 bytes
    int32_t n_head, n_token, d_head, element_size;
};

// One element a thread: only for memory that the kernels cannot read in wider pieces.
static __global__ void __launch_bounds__(COPY_THREADS)
    copy_rows(const __grid_constant__ struct copy_params p) {
    const int64_t at = (int64_t)blockIdx.x * COPY_THREADS + threadIdx.x;
    if (at >= p.n_element) {
        return;
    }
    const int64_t row = at / p.d_head, d = at % p.d_head, n = row % p.n_token;
    const int64_t h = row / p.n_token % p.n_head, b = row / p.n_token / p.n_head;
    const int64_t from = b * p.from.batch + h * p.from.head + n * p.from.token + d;
    const int64_t to = b * p.to.batch + h * p.to.head + n * p.to.token + d;
    if (p.element_size == 4) {
        ((uint32_t *)p.to.data)[to] = ((const uint32_t *)p.from.data)[from];
    } else {
        ((uint16_t *)p.to.data)[to] = ((const uint16_t *)p.from.data)[from];
    }
}

static struct sl_heads plain_heads(const struct sl_tensor *t) {
    const struct sl_heads heads = {(char *)t->data, t->stride[0], t->stride[1], t->stride[2]};
    return heads;
}

static enum sl_status copy(const struct sl_cuda_call *call, const struct sl_tensor *t,
                           const struct sl_heads *from, const struct sl_heads *to) {
    const int64_t n = sl_tensor_count(t);
    const struct copy_params params = {*from,
                                       *to,
                                       n,
                                       (int32_t)t->shape[1],
                                       (int32_t)t->shape[2],
                                       (int32_t)t->shape[3],
                                       (int32_t)sl_dtype_size(t->dtype)};
    return sl_cuda_launch(call, "copy_rows", copy_rows, sl_ceil_div(n, COPY_THREADS), COPY_THREADS, 0,
                          params);
}

bool sl_heads_aligned(const struct sl_tensor *t) {
    const int64_t size = sl_dtype_size(t->dtype);
    bool aligned = (uintptr_t)t->data % 16 == 0;
    for (int i = 0; i < 3; i++) {
        aligned = aligned && (t->shape[i] <= 1 || t->stride[i] * size % 16 == 0);
    }
    // Kernels step from token to token in 32 bits.
    aligned = aligned && (t->shape[2] <= 1 || (t->stride[2] < INT32_MAX && t->stride[2] > INT32_MIN));
    return aligned;
}

struct sl_heads sl_heads_of(const struct sl_tensor *t, struct sl_device_scratch *scratch) {
    if (!sl_tensor_given(t) || sl_heads_aligned(t)) {
        return plain_heads(t);
    }
    const int64_t d = t->shape[3], n = t->shape[2], n_head = t->shape[1];
    const struct sl_heads heads = {
        (char *)sl_device_take(scratch, sl_tensor_count(t) * sl_dtype_size(t->dtype)), n * n_head * d, n * d,
        d};
    return heads;
}

enum sl_status sl_heads_load(const struct sl_cuda_call *call, const struct sl_tensor *t,
                             const struct sl_heads *heads) {
    const struct sl_heads from = plain_heads(t);
    return heads->data == t->data ? SL_OK : copy(call, t, &from, heads);
}

enum sl_status sl_heads_store(const struct sl_cuda_call *call, const struct sl_tensor *t,
                              const struct sl_heads *heads) {
    const struct sl_heads to = plain_heads(t);
    return heads->data == t->data ? SL_OK : copy(call, t, heads, &to);
}
