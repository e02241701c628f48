// in: 4 floats for each lane, then 1. out: what lane ^ 1 had, through shared and global memory.
#include "../../../csrc/cuda/ptx/floats.cuh"
#include "../../../csrc/cuda/ptx/memory.cuh"
#include "../../../csrc/cuda/ptx/widen.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(32) floats(const __grid_constant__ unit_params p) {
    const int lane = threadIdx.x, other = lane ^ 1;
    const uint32_t base = sl_shared_addr(SL_SHARED_BASE());
    const float *in = (const float *)p.in;
    float v[4];
    sl_ld_global_floats(v, in + lane * 4);
    sl_st_shared_floats(base + lane * 16, v);
    sl_st_shared_float(base + 512 + lane * 4, in[128 + lane]);
    __syncwarp();
    sl_ld_shared_floats(v, base + other * 16);
    sl_st_global_floats((float *)p.out + lane * 4, v);
    p.out[128 + lane] = __float_as_uint(sl_ld_shared_float(base + 512 + other * 4));
}

UNIT(floats, floats, 32, 640)
