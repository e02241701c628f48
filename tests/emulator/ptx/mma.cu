// in: a[lane][4], b[lane][2], then c[lane][4] as floats. out: d[lane][4]. mode: 0 bfloat16, 1 float16.
#include "../../../csrc/cuda/ptx/mma.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(32) mma(const __grid_constant__ unit_params p) {
    const int lane = threadIdx.x;
    const uint32_t *a = p.in + lane * 4, *b = p.in + 128 + lane * 2, *c = p.in + 192 + lane * 4;
    float d[4];
    for (int i = 0; i < 4; i++) {
        d[i] = __uint_as_float(c[i]);
    }
    if (p.mode == 0) {
        sl_mma_16816<SL_BF16>(d, a, b);
    } else {
        sl_mma_16816<SL_F16>(d, a, b);
    }
    for (int i = 0; i < 4; i++) {
        p.out[lane * 4 + i] = __float_as_uint(d[i]);
    }
}

UNIT(mma, mma, 32, 0)
