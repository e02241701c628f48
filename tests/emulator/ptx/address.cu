// in: 32 words, then one for each lane. out: in[a * b / 4] found through sl_address; that number kept by
// sl_keep.
#include "../../../csrc/cuda/ptx/address.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(32) address(const __grid_constant__ unit_params p) {
    const int lane = threadIdx.x;
    const char *from = sl_address_step(sl_address((const char *)p.in, lane - 16, 4), 64);
    sl_keep(from);
    uint32_t v = *(const uint32_t *)from;
    p.out[lane] = v;
    sl_keep(v);
    p.out[32 + lane] = v + p.in[32 + lane];
}

UNIT(address, address, 32, 0)
