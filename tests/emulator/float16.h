// bfloat16 and float16 to and from float, without help of the processor: round to nearest even, NaN stays
// NaN.
#pragma once

#include <stdint.h>
#include <string.h>

static inline uint32_t emu_f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float emu_f32_from(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t emu_f32_to_bf16(float f) {
    const uint32_t u = emu_f32_bits(f);
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static inline uint16_t emu_f32_to_f16(float f) {
    const uint32_t u = emu_f32_bits(f), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) {
        return 0x7fff;
    }
    if (a >= 0x477ff000u) { // rounds to 65536 or more
        return (uint16_t)(sign | 0x7c00u);
    }
    if (a < 0x38800000u) { // subnormal: the adder rounds at 2^-24, the last bit of 0.5
        return (uint16_t)(sign | (emu_f32_bits(emu_f32_from(a) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13);
}

static inline float emu_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, a = h & 0x7fffu;
    if (a >= 0x7c00u) {
        return emu_f32_from(sign | 0x7f800000u | (a & 0x3ffu) << 13);
    }
    if (a < 0x400u) {
        return emu_f32_from(sign | emu_f32_bits((float)a * 0x1p-24f));
    }
    return emu_f32_from(sign | ((a << 13) + 0x38000000u));
}

static inline uint32_t emu_f32_to_16(float f, bool bf16) {
    return bf16 ? emu_f32_to_bf16(f) : emu_f32_to_f16(f);
}

static inline float emu_16_to_f32(uint32_t h, bool bf16) {
    return bf16 ? emu_f32_from(h << 16) : emu_f16_to_f32((uint16_t)h);
}
