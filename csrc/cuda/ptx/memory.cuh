// Loads and stores of shared memory, by 32-bit address, and of global memory; every address is aligned to its
// access.
#pragma once
#include "platform.cuh"

// Shared memory is one dynamic allocation, carved by config; static __shared__ is not used.
#ifdef __CUDACC__
extern __shared__ __align__(1024) unsigned char sl_shared_memory[];
#define SL_SHARED_BASE() ((void *)sl_shared_memory)
#else
#define SL_SHARED_BASE() emu_shared_base()
#endif

SL_DEV uint32_t sl_shared_addr(const void *p SL_SITE) {
#ifdef __CUDACC__
    return (uint32_t)__cvta_generic_to_shared(p);
#else
    return emu_shared_addr(p, SL_HERE);
#endif
}

// ---- shared
SL_DEV void sl_st_shared_b16(uint32_t addr, uint16_t v SL_SITE) {
#ifdef __CUDACC__
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(addr), "h"(v) : "memory");
#else
    emu_shared_write(addr, &v, 2, SL_HERE);
#endif
}

SL_DEV uint16_t sl_ld_shared_b16(uint32_t addr SL_SITE) {
    uint16_t v;
#ifdef __CUDACC__
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(addr) : "memory");
#else
    emu_shared_read(&v, addr, 2, SL_HERE);
#endif
    return v;
}

SL_DEV void sl_st_shared_b32(uint32_t addr, uint32_t v SL_SITE) {
#ifdef __CUDACC__
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(v) : "memory");
#else
    emu_shared_write(addr, &v, 4, SL_HERE);
#endif
}

SL_DEV uint32_t sl_ld_shared_b32(uint32_t addr SL_SITE) {
    uint32_t v;
#ifdef __CUDACC__
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
#else
    emu_shared_read(&v, addr, 4, SL_HERE);
#endif
    return v;
}

SL_DEV void sl_st_shared_v2(uint32_t addr, uint2 v SL_SITE) {
#ifdef __CUDACC__
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(addr), "r"(v.x), "r"(v.y) : "memory");
#else
    emu_shared_write(addr, &v, 8, SL_HERE);
#endif
}

SL_DEV uint2 sl_ld_shared_v2(uint32_t addr SL_SITE) {
    uint2 v;
#ifdef __CUDACC__
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(addr) : "memory");
#else
    emu_shared_read(&v, addr, 8, SL_HERE);
#endif
    return v;
}

SL_DEV void sl_st_shared_v4(uint32_t addr, uint4 v SL_SITE) {
#ifdef __CUDACC__
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#else
    emu_shared_write(addr, &v, 16, SL_HERE);
#endif
}

SL_DEV uint4 sl_ld_shared_v4(uint32_t addr SL_SITE) {
    uint4 v;
#ifdef __CUDACC__
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(addr)
                 : "memory");
#else
    emu_shared_read(&v, addr, 16, SL_HERE);
#endif
    return v;
}

// ---- global: T of 1, 2, 4, 8 or 16 bytes. The _once forms ask the caches not to keep what is touched once.
template <class T> SL_DEV T sl_ld_global(const T *p SL_SITE) {
#ifdef __CUDACC__
    return *p;
#else
    T v;
    emu_global_read(&v, p, (int)sizeof v, SL_HERE);
    return v;
#endif
}

template <class T> SL_DEV void sl_st_global(T *p, T v SL_SITE) {
#ifdef __CUDACC__
    *p = v;
#else
    emu_global_write(p, &v, (int)sizeof v, SL_HERE);
#endif
}

template <class T> SL_DEV T sl_ld_global_once(const T *p SL_SITE) {
    return __ldcs(p SL_PASS);
}

template <class T> SL_DEV void sl_st_global_once(T *p, T v SL_SITE) {
    __stcs(p, v SL_PASS);
}

SL_DEV void sl_st_global_v4(void *p, uint4 v SL_SITE) {
    sl_st_global((uint4 *)p, v SL_PASS);
}
