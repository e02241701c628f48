// A unit kernel calls the wrappers of one header in one block and dumps what they gave. g++ and nvcc compile
// the same file; tests/test_ptx.py knows what to expect, from the PTX manual.
#pragma once

#include "../../../csrc/cuda/ptx/platform.cuh"

struct unit_params {
    const uint32_t *in;
    uint32_t *out;
    int mode;
};

// Defines unit_<name>(in, out, mode, stream), which launches kernel; it returns a cudaError_t. Pointers into
// device memory.
#define UNIT(name, kernel, threads, shared)                                                                  \
    extern "C" int unit_##name(const void *in, void *out, int mode, void *stream) {                          \
        const unit_params p = {(const uint32_t *)in, (uint32_t *)out, mode};                                 \
        SL_LAUNCH(kernel, dim3(1), dim3(threads), (size_t)(shared), (cudaStream_t)stream, p);                \
        return (int)cudaGetLastError();                                                                      \
    }
