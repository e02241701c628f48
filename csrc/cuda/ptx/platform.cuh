// One header decides whether nvcc or the host emulator (tests/emulator) compiles the kernels.
//
// Every warp collective, asynchronous copy and access to shared memory goes through a wrapper in this folder:
// one function with two bodies, asm for the device and one emulator call for the host. SL_SITE adds the
// caller's file and line to its parameters on the host, so that the emulator's reports name them, and SL_PASS
// hands them on; they are nothing on the device.
#pragma once

#include <stdint.h>

extern "C" {
#include "../../core/dtype.h"
#include "../../core/pattern.h"
}

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SL_DEV static __device__ __forceinline__
#define SL_SITE
#define SL_SITE0
#define SL_PASS
#define SL_UNROLL _Pragma("unroll")
#define SL_ROLLED _Pragma("unroll 1")
#define SL_UNROLL_4 _Pragma("unroll 4")
#define SL_LAUNCH(kernel, grid, block, shared, stream, arg) kernel<<<grid, block, shared, stream>>>(arg)
#else
#include <emulator.h>
#define SL_DEV static inline __attribute__((unused))
#define SL_UNROLL
#define SL_ROLLED
#define SL_UNROLL_4
#define SL_LAUNCH(kernel, grid, block, shared, stream, arg)                                                  \
    emu_launch(emu_kernel{(const void *)(kernel), #kernel, sizeof(arg)}, grid, block, shared, stream,        \
               [&] { kernel(arg); })
#endif
