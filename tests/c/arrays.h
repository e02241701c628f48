// Arrays for the C tests: heap blocks of exactly the bytes their strides span, so that AddressSanitizer sees
// the first byte beyond; what lies between their elements is NaN and must stay as it is.
#ifndef ARRAYS_H
#define ARRAYS_H

#include "../../csrc/core/tensor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum layout {
    LAYOUT_DENSE,       // (B, H, N, D)
    LAYOUT_TOKEN_MAJOR, // (B, N, H, D)
    LAYOUT_GAPS,        // dense with unused elements between rows
    LAYOUT_REVERSED,    // token-major, tokens last to first
    LAYOUT_SHARED,      // heads share their memory; inputs only
    LAYOUT_COUNT
};

struct array {
    unsigned char *block; // owned
    size_t bytes;
    struct sl_tensor tensor; // borrows block
};

static uint64_t random_state = 1;

static inline uint32_t random_bits(void) {
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 33);
}

// One of 0 .. n-1.
static inline int64_t random_below(int64_t n) {
    return (int64_t)(random_bits() % (uint64_t)n);
}

// Every element NaN, as are the gaps. shape has four dimensions.
static inline struct array array_make(enum sl_dtype dtype, const int64_t shape[4], enum layout layout) {
    struct array a = {.tensor = {.dtype = dtype, .device_type = SL_DEVICE_CPU, .n_dim = 4}};
    struct sl_tensor *t = &a.tensor;
    const int64_t d = shape[3];
    const int64_t row = layout == LAYOUT_GAPS ? d + 3 : d;
    const bool token_major = layout == LAYOUT_TOKEN_MAJOR || layout == LAYOUT_REVERSED;
    memcpy(t->shape, shape, 4 * sizeof *shape);
    t->stride[3] = 1;
    t->stride[2] = token_major ? row * shape[1] : row;
    t->stride[1] = layout == LAYOUT_SHARED ? 0 : token_major ? row : row * shape[2];
    t->stride[0] = row * shape[2] * (layout == LAYOUT_SHARED ? 1 : shape[1]);
    int64_t last = 0;
    for (int i = 0; i < 4; i++) {
        last += (shape[i] - 1) * t->stride[i];
    }
    a.bytes = sl_tensor_count(t) ? (size_t)((last + 1) * sl_dtype_size(dtype)) : 0;
    a.block = malloc(a.bytes ? a.bytes : 1);
    memset(a.block, 0xFF, a.bytes);
    t->data = a.bytes ? a.block : NULL;
    if (layout == LAYOUT_REVERSED && a.bytes) {
        t->data = a.block + (shape[2] - 1) * t->stride[2] * sl_dtype_size(dtype);
        t->stride[2] = -t->stride[2];
    }
    return a;
}

static inline void array_free(struct array *a) {
    free(a->block);
    memset(a, 0, sizeof *a);
}

static inline void *array_at(const struct array *a, int64_t b, int64_t h, int64_t n, int64_t d) {
    const int64_t *s = a->tensor.stride;
    return (char *)a->tensor.data + (b * s[0] + h * s[1] + n * s[2] + d) * sl_dtype_size(a->tensor.dtype);
}

// This machine's own conversions, which are not the library's.
static inline double array_get(const struct array *a, int64_t b, int64_t h, int64_t n, int64_t d) {
    const void *at = array_at(a, b, h, n, d);
    float f;
    uint16_t half;
    if (a->tensor.dtype == SL_F32) {
        memcpy(&f, at, sizeof f);
        return (double)f;
    }
    memcpy(&half, at, sizeof half);
    if (a->tensor.dtype == SL_BF16) {
        const uint32_t word = (uint32_t)half << 16;
        memcpy(&f, &word, sizeof f);
        return (double)f;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double sign = half >> 15 ? -1.0 : 1.0;
    if (exponent == 31) {
        return fraction ? (double)NAN : sign * (double)INFINITY;
    }
    return sign * (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
}

// Values of 8 significant bits, which every dtype holds exactly: float16 is built from 1.fffffff * 2^e.
static inline void array_set_random(const struct array *a, int64_t b, int64_t h, int64_t n, int64_t d) {
    const int fraction = (int)random_below(128), exponent = -(int)random_below(5),
              sign = (int)random_below(2);
    const float f = (sign ? -1.0f : 1.0f) * ldexpf(1.0f + (float)fraction / 128.0f, exponent);
    uint32_t word;
    memcpy(&word, &f, sizeof word);
    const uint16_t bf16 = (uint16_t)(word >> 16);
    const uint16_t f16 = (uint16_t)(sign << 15 | (exponent + 15) << 10 | fraction << 3);
    const void *from = a->tensor.dtype == SL_F32    ? (const void *)&f
                       : a->tensor.dtype == SL_BF16 ? &bf16
                                                    : &f16;
    memcpy(array_at(a, b, h, n, d), from, (size_t)sl_dtype_size(a->tensor.dtype));
}

// True while the bytes that belong to no element are what array_make put there.
static inline bool array_gaps_intact(const struct array *a) {
    unsigned char *copy = malloc(a->bytes + 1);
    const int64_t *n = a->tensor.shape;
    const size_t row = (size_t)(n[3] * sl_dtype_size(a->tensor.dtype));
    bool intact = true;
    memcpy(copy, a->block, a->bytes);
    for (int64_t i = 0; a->bytes && i < n[0] * n[1] * n[2]; i++) {
        const unsigned char *at = array_at(a, i / (n[1] * n[2]), i / n[2] % n[1], i % n[2], 0);
        memset(copy + (at - a->block), 0xFF, row);
    }
    for (size_t i = 0; i < a->bytes; i++) {
        intact = intact && copy[i] == 0xFF;
    }
    free(copy);
    return intact;
}

#endif
