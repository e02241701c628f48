// in: a number for each lane. out: [what][lane]; floats for mode 0, integers for mode 1.
#include "../../../csrc/cuda/ptx/warp.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(32) warp(const __grid_constant__ unit_params p) {
    const uint32_t all = 0xffffffffu;
    const int lane = threadIdx.x;
    uint32_t *out = p.out + lane;
    const int n = (int)p.in[lane];
    if (p.mode == 0) {
        const float v = __uint_as_float(p.in[lane]);
        out[0] = __float_as_uint(sl_warp_sum<32>(v));
        out[32] = __float_as_uint(sl_warp_sum<4>(v));
        out[64] = __float_as_uint(sl_warp_max<32>(v));
        out[96] = __float_as_uint(sl_warp_max<8>(v));
        return;
    }
    out[0] = (uint32_t)__shfl_sync(all, n, 5);
    out[32] = (uint32_t)__shfl_sync(all, n, 9, 8);
    out[64] = (uint32_t)__shfl_xor_sync(all, n, 6);
    out[96] = (uint32_t)__shfl_up_sync(all, n, 3);
    out[128] = (uint32_t)__shfl_up_sync(all, n, 3, 16);
    out[160] = (uint32_t)__shfl_down_sync(all, n, 7);
    out[192] = (uint32_t)__shfl_down_sync(all, n, 1, 4);
    out[224] = __ballot_sync(all, n & 1);
    out[256] = (uint32_t)(__any_sync(all, n == (int)p.in[3]) + 2 * __any_sync(all, 0));
    out[288] = (uint32_t)(__all_sync(all, n == n + 0) + 2 * __all_sync(all, n & 1));
    out[320] = __match_any_sync(all, n & 3);
    out[352] = (uint32_t)__reduce_add_sync(all, n);
    out[384] = (uint32_t)__reduce_min_sync(all, n);
    out[416] = __reduce_max_sync(all, (uint32_t)n);
    const bool low = lane < 16; // two halves on their own
    const int half = low ? __reduce_max_sync(0x0000ffffu, n) : __reduce_max_sync(0xffff0000u, n);
    out[448] = (uint32_t)half;
}

UNIT(warp, warp, 32, 0)
