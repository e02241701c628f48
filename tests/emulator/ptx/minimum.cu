// in: 64 floats. out: the smaller of neighbours.
#include "../../../csrc/cuda/ptx/minimum.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(32) minimum(const __grid_constant__ unit_params p) {
    const float *in = (const float *)p.in + threadIdx.x * 2;
    p.out[threadIdx.x] = __float_as_uint(sl_min_nan(in[0], in[1]));
}

UNIT(minimum, minimum, 32, 0)
