// The smaller of two floats; NaN where either is (fminf gives the other one).
#pragma once
#include "platform.cuh"

SL_DEV float sl_min_nan(float a, float b) {
#ifdef __CUDACC__
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return a != a || b != b ? NAN : fminf(a, b);
#endif
}
