// 16 bytes of elements to floats; a product that stays one.
#pragma once
#include "floats.cuh"

// What an element is where nobody looks at it, its bytes, and how many 16 bytes hold.
template <enum sl_dtype DTYPE> struct sl_element_of {
    typedef uint16_t type;
    enum { SIZE = 2, WIDE = 8 };
};
template <> struct sl_element_of<SL_F32> {
    typedef uint32_t type;
    enum { SIZE = 4, WIDE = 4 };
};

SL_DEV float sl_float_of(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float v;
    memcpy(&v, &bits, 4);
    return v;
#endif
}

SL_DEV uint32_t sl_bits_of(float v) {
#ifdef __CUDACC__
    return __float_as_uint(v);
#else
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
#endif
}

// The lower 16 bits as float16.
SL_DEV float sl_float_of_f16(uint32_t bits) {
#ifdef __CUDACC__
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"((unsigned short)bits));
    return v;
#else
    const uint16_t half = (uint16_t)bits;
    _Float16 v;
    memcpy(&v, &half, 2);
    return (float)v;
#endif
}

template <enum sl_dtype DTYPE> SL_DEV void sl_widen(uint4 from, float *to) {
    const uint32_t word[4] = {from.x, from.y, from.z, from.w};
    SL_UNROLL for (int i = 0; i < 4; i++) {
        if (DTYPE == SL_F32) {
            to[i] = sl_float_of(word[i]);
        } else if (DTYPE == SL_BF16) {
            to[2 * i] = sl_float_of(word[i] << 16);
            to[2 * i + 1] = sl_float_of(word[i] & 0xffff0000u);
        } else {
            to[2 * i] = sl_float_of_f16(word[i]);
            to[2 * i + 1] = sl_float_of_f16(word[i] >> 16);
        }
    }
}

// Element i of an array of DTYPE.
template <enum sl_dtype DTYPE> SL_DEV float sl_element(const void *array, int64_t i) {
    return DTYPE == SL_F32    ? ((const float *)array)[i]
           : DTYPE == SL_BF16 ? sl_float_of((uint32_t)((const uint16_t *)array)[i] << 16)
                              : sl_float_of_f16(((const uint16_t *)array)[i]);
}

// a * b rounded, never part of a fused multiply-add: x * s - max(x * s) is exactly 0 somewhere, however large
// s is.
SL_DEV float sl_mul(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
