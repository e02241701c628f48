// float to and from bfloat16 and float16 (round to nearest even), two to a register, lo in the lower half;
// and the special function unit's exp2, log2 and reciprocal: within 2^-22 of the value, subnormals taken for
// 0.
#pragma once
#include "platform.cuh"

template <enum sl_dtype DTYPE> SL_DEV uint32_t sl_pack(float lo, float hi) {
#ifdef __CUDACC__
    uint32_t r;
    if (DTYPE == SL_BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    }
    return r;
#else
    return emu_f32_to_16(lo, DTYPE == SL_BF16) | emu_f32_to_16(hi, DTYPE == SL_BF16) << 16;
#endif
}

template <enum sl_dtype DTYPE> SL_DEV uint16_t sl_pack_one(float v) {
#ifdef __CUDACC__
    uint16_t r;
    if (DTYPE == SL_BF16) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    }
    return r;
#else
    return (uint16_t)emu_f32_to_16(v, DTYPE == SL_BF16);
#endif
}

template <enum sl_dtype DTYPE> SL_DEV float sl_unpack_one(uint16_t v) {
#ifdef __CUDACC__
    if (DTYPE == SL_BF16) {
        return __uint_as_float((uint32_t)v << 16);
    }
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
#else
    return emu_16_to_f32(v, DTYPE == SL_BF16);
#endif
}

template <enum sl_dtype DTYPE> SL_DEV float2 sl_unpack(uint32_t v) {
    if (DTYPE == SL_BF16) {
        return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
    }
    return make_float2(sl_unpack_one<DTYPE>((uint16_t)v), sl_unpack_one<DTYPE>((uint16_t)(v >> 16)));
}

SL_DEV float sl_exp2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return emu_flush(exp2f(emu_flush(x)));
#endif
}

SL_DEV float sl_log2(float x) {
#ifdef __CUDACC__
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return log2f(emu_flush(x));
#endif
}

SL_DEV float sl_rcp(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return emu_flush(1.0f / emu_flush(x));
#endif
}
