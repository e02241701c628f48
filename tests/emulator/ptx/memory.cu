// in: 128 words. out: 128 words. The lanes write what they read to shared memory, and read what lane ^ 1
// wrote (modes 0-3: 2, 4, 8, 16 bytes); or they copy global memory (modes 4-7: 2, 4, 8, 16 bytes; 8: 16 bytes
// that are touched once).
#include "../../../csrc/cuda/ptx/memory.cuh"
#include "unit.cuh"

template <class T> SL_DEV void copy_global(const unit_params &p, int lane) {
    sl_st_global((T *)p.out + lane, sl_ld_global((const T *)p.in + (lane ^ 1)));
}

SL_DEV void exchange_shared(const unit_params &p, int lane) {
    const uint32_t base = sl_shared_addr(SL_SHARED_BASE());
    const uint4 v = ((const uint4 *)p.in)[lane];
    switch (p.mode) {
    case 0:
        sl_st_shared_b16(base + lane * 2, (uint16_t)v.x);
        break;
    case 1:
        sl_st_shared_b32(base + lane * 4, v.x);
        break;
    case 2:
        sl_st_shared_v2(base + lane * 8, make_uint2(v.x, v.y));
        break;
    default:
        sl_st_shared_v4(base + lane * 16, v);
    }
    __syncwarp();
    const int other = lane ^ 1;
    uint4 got = make_uint4(0, 0, 0, 0);
    switch (p.mode) {
    case 0:
        got.x = sl_ld_shared_b16(base + other * 2);
        break;
    case 1:
        got.x = sl_ld_shared_b32(base + other * 4);
        break;
    case 2:
        got.x = sl_ld_shared_v2(base + other * 8).x;
        got.y = sl_ld_shared_v2(base + other * 8).y;
        break;
    default:
        got = sl_ld_shared_v4(base + other * 16);
    }
    sl_st_global_v4((uint4 *)p.out + lane, got);
}

static __global__ void __launch_bounds__(32) memory(const __grid_constant__ unit_params p) {
    const int lane = threadIdx.x;
    if (p.mode == 4) {
        copy_global<uint16_t>(p, lane);
    } else if (p.mode == 5) {
        copy_global<uint32_t>(p, lane);
    } else if (p.mode == 6) {
        copy_global<uint2>(p, lane);
    } else if (p.mode == 7) {
        copy_global<uint4>(p, lane);
    } else if (p.mode == 8) {
        sl_st_global_once((uint4 *)p.out + lane, sl_ld_global_once((const uint4 *)p.in + (lane ^ 1)));
    } else {
        exchange_shared(p, lane);
    }
}

UNIT(memory, memory, 32, 512)
