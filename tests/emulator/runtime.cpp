// CUDA's runtime API, as far as the kernels' host code uses it, for one or two pretended devices.
#include "engine.h"

int emu_device_processors();
int emu_device_shared();
void emu_set_error(cudaError_t error);
bool emu_stream_expected(const void *stream, const char *what);

enum { DEVICES = 2 };
static int current_device;

static cudaError_t result(cudaError_t error) {
    emu_set_error(error);
    return error;
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "cudaSuccess";
    case cudaErrorInvalidValue:
        return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
        return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
        return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
        return "cudaErrorLaunchFailure";
    }
    return "cudaErrorUnknown";
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorLaunchFailure:
        return *emu_report() ? emu_report() : "unspecified launch failure";
    }
    return "unknown error";
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = DEVICES;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) {
        return result(cudaErrorInvalidDevice);
    }
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= DEVICES) {
        return result(cudaErrorInvalidDevice);
    }
    switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = 48 << 10;
        return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
        *value = emu_device_processors();
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
        *value = 8;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
        *value = emu_device_shared() > 99 << 10 ? 0 : 9;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = emu_device_shared() + 1024;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = emu_device_shared();
        return cudaSuccess;
    }
    return result(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    if (!emu_stream_expected(stream, "cudaMemsetAsync")) {
        return cudaErrorLaunchFailure;
    }
    if (bytes && !emu_global_host_range(p, bytes, true)) {
        return result(cudaErrorInvalidValue);
    }
    memset(p, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind,
                            cudaStream_t stream) {
    if (!emu_stream_expected(stream, "cudaMemcpyAsync")) {
        return cudaErrorLaunchFailure;
    }
    if (bytes && (!emu_global_host_range(from, bytes, false) || !emu_global_host_range(to, bytes, true))) {
        return result(cudaErrorInvalidValue);
    }
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

// ---- what tests ask
const char *emu_build(void) {
#if defined(EMU_HOOKS)
    return "hook";
#elif defined(EMU_ASAN)
    return "asan";
#else
    return "race";
#endif
}

void emu_statistics(struct emu_stats *stats) {
    *stats = emu_counts;
}

void emu_clear(void) {
    emu_clear_report();
    emu_counts = emu_stats();
    emu_memory_reset();
    emu_expect_stream(NULL, 0);
    emu_conflict_clear();
    (void)cudaGetLastError();
    current_device = 0;
}
