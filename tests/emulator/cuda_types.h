// CUDA's words for g++: qualifiers, vector types, call sites.
#pragma once

#include <stdint.h>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// No __shared__ on purpose: shared memory comes from SL_SHARED_BASE() (ptx/memory.cuh) only.

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct __align__(8) int2 {
    int x, y;
};
struct __align__(8) uint2 {
    uint32_t x, y;
};
struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) int4 {
    int x, y, z, w;
};
struct __align__(16) uint4 {
    uint32_t x, y, z, w;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
static inline int2 make_int2(int x, int y) {
    return int2{x, y};
}
static inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return uint2{x, y};
}
static inline float2 make_float2(float x, float y) {
    return float2{x, y};
}
static inline int4 make_int4(int x, int y, int z, int w) {
    return int4{x, y, z, w};
}
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return uint4{x, y, z, w};
}
static inline float4 make_float4(float x, float y, float z, float w) {
    return float4{x, y, z, w};
}

// Where an operation stands in the sources. Wrappers append SL_SITE to their parameters; the compiler fills
// it in at the caller. Two plain parameters: in a braced default gcc 12 would name the wrapper's own line.
// file NULL: a plain access, line is the offset of its instruction in the library.
struct emu_site {
    const char *file;
    int line;
};
#define SL_SITE0 const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SL_SITE , SL_SITE0
#define SL_HERE (emu_site{file, line})
#define SL_PASS , file, line
