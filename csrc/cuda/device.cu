// Left out where the sources run on the host: there is no driver to ask.
#ifdef __CUDACC__
#include "device.h"

#include <cuda_runtime.h>
#include <stdio.h>

// An error stays with the runtime until it is asked for: it must not show as a later launch's.
static enum sl_status report(cudaError_t error, enum sl_status status, struct sl_error *err) {
    (void)cudaGetLastError();
    return sl_error_set(err, status, "%s", cudaGetErrorString(error));
}

int sl_cuda_driver_version(void) {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return version;
}

enum sl_status sl_cuda_device_count(int *n_device, struct sl_error *err) {
    *n_device = 0;
    if (sl_cuda_driver_version() == 0) {
        return sl_error_set(err, SL_UNSUPPORTED, "no NVIDIA driver is installed");
    }
    const cudaError_t error = cudaGetDeviceCount(n_device);
    return error == cudaSuccess ? SL_OK : report(error, SL_UNSUPPORTED, err);
}

enum sl_status sl_cuda_device_read(int i, struct sl_cuda_device *out, struct sl_error *err) {
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, i);
    if (error != cudaSuccess) {
        return report(error, SL_RUNTIME, err);
    }
    snprintf(out->name, sizeof out->name, "%s", properties.name);
    out->major = properties.major;
    out->minor = properties.minor;
    return SL_OK;
}
#endif
