// Addresses that a loop takes with it.
#pragma once
#include "platform.cuh"

// base + a * b bytes, one instruction where a 64-bit product takes several.
SL_DEV const char *sl_address(const char *base, int a, int b) {
#ifdef __CUDACC__
    const char *r;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(r) : "r"(a), "r"(b), "l"(base));
    return r;
#else
    return base + (int64_t)a * b;
#endif
}

// base + step bytes, where the compiler would multiply steps out.
SL_DEV const char *sl_address_step(const char *base, int64_t step) {
#ifdef __CUDACC__
    const char *r;
    asm("add.s64 %0, %1, %2;" : "=l"(r) : "l"(base), "l"(step));
    return r;
#else
    return base + step;
#endif
}

// Keeps a value in its register: without this the compiler computes addresses anew in every turn of a loop.
SL_DEV void sl_keep(uint32_t &x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#else
    (void)x;
#endif
}
SL_DEV void sl_keep(int &x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#else
    (void)x;
#endif
}
SL_DEV void sl_keep(const char *&x) {
#ifdef __CUDACC__
    asm volatile("" : "+l"(x));
#else
    (void)x;
#endif
}
