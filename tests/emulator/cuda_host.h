// The part of the CUDA runtime that the kernels' host code calls, and what tests call by ctypes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda_types.h"

// ---- runtime API. Streams are names: the work is done when a call returns.
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
typedef struct CUstream_st *cudaStream_t;

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t error); // a launch failure's is the emulator's report
const char *cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status);
cudaError_t emu_func_attribute(const void *kernel, enum cudaFuncAttribute attribute, int value);
template <class F>
static inline cudaError_t cudaFuncSetAttribute(F *kernel, enum cudaFuncAttribute attribute, int value) {
    return emu_func_attribute((const void *)kernel, attribute, value);
}

// ---- launch: run is called once by every thread of every block
struct emu_kernel {
    const void *function;
    const char *name;
    size_t parameter_bytes;
};
void emu_launch_blocks(emu_kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                       void (*run)(const void *f), const void *f);
template <class F>
static inline void emu_launch(emu_kernel kernel, dim3 grid, dim3 block, size_t shared_bytes,
                              cudaStream_t stream, const F &f) {
    emu_launch_blocks(
        kernel, grid, block, shared_bytes, stream, [](const void *g) { (*(const F *)g)(); }, &f);
}

// ---- what tests call
extern "C" {
struct emu_stats {
    uint64_t launches, blocks, switches, collectives, mma, global_bytes;
    // Wavefronts: passes through shared memory that accesses took, and would take without bank conflicts.
    uint64_t ldmatrix, ldmatrix_wavefronts; // matrices: 1 wavefront each
    uint64_t read_ideal, read_wavefronts;   // ld.shared
    uint64_t write_ideal, write_wavefronts; // st.shared
    uint64_t copy_ideal, copy_wavefronts;   // cp.async
};
enum {
    EMU_READ = 1,
    EMU_WRITE = 2,
    EMU_BLANK = 4
}; // BLANK: holds nothing that may be read before it is written

void emu_seed(uint64_t seed); // order of blocks and threads; default: SINKLORA_EMULATOR_SEED, else 1
const char *emu_report(void); // of the last failure, "" if none since emu_clear
void emu_clear(void);         // forgets failures, errors, statistics and all memory
void emu_memory_allow(const void *p, size_t bytes, int access);
void emu_memory_forbid(const void *p, size_t bytes);
void emu_memory_reset(void);
// Rows in strided memory: allows the elements, and forbids nothing of what lies between them elsewhere.
void emu_memory_allow_strided(const void *p, int n_dim, const int64_t *shape, const int64_t *stride_bytes,
                              int item_bytes, int access);
void emu_statistics(struct emu_stats *stats);
int emu_conflicts(char *text, int bytes); // one line a call site with bank conflicts; returns their number
void emu_device(int n_processor, int max_shared); // of the device pretended to be
void emu_expect_stream(const void *stream, int expect);
const char *emu_build(void); // race, hook or asan
}
