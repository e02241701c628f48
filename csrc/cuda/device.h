// The driver and the GPUs of this machine, for those who include none of CUDA's headers. Nothing here makes a
// context on a device or changes the current one.
#ifndef SL_CUDA_DEVICE_H
#define SL_CUDA_DEVICE_H

#ifdef __cplusplus
extern "C" {
#endif

#include "../core/status.h"

struct sl_cuda_device {
    char name[256];
    int major, minor; // compute capability
};

// The newest CUDA version that the installed driver supports, as 1000 * major + 10 * minor; 0: no driver.
int sl_cuda_driver_version(void);

// How many GPUs can be used. SL_UNSUPPORTED where none can, with the reason. Starts the driver: a process
// that forks afterwards cannot use CUDA in the child.
enum sl_status sl_cuda_device_count(int *n_device, struct sl_error *err) SL_MUST_CHECK;

// Device i's name and capability; SL_RUNTIME with CUDA's message.
enum sl_status sl_cuda_device_read(int i, struct sl_cuda_device *out, struct sl_error *err) SL_MUST_CHECK;

#ifdef __cplusplus
}
#endif

#endif
