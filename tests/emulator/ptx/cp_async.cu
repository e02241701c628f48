// in: 256 words. out: 256 words of shared memory. modes 0, 1, 2: every lane copies 16, 8, 4 bytes, of which
// lane % 5 quarters (at most all) come from memory. mode 3: two groups, the first is waited for and written,
// then the second. mode 4: the same, not committed.
#include "../../../csrc/cuda/ptx/cp_async.cuh"
#include "../../../csrc/cuda/ptx/memory.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(32) cp_async(const __grid_constant__ unit_params p) {
    const int lane = threadIdx.x, quarters = min(lane % 5, 4);
    const uint32_t base = sl_shared_addr(SL_SHARED_BASE());
    for (int i = lane; i < 256; i += 32) {
        sl_st_shared_b32(base + i * 4, 0xabababab);
    }
    __syncwarp();
    if (p.mode == 0) {
        sl_cp_async_16(base + lane * 16, p.in + lane * 4, quarters * 4);
    } else if (p.mode == 1) {
        sl_cp_async_8(base + lane * 16, p.in + lane * 2, quarters * 2);
    } else if (p.mode == 2) {
        sl_cp_async_4(base + lane * 16, p.in + lane, quarters);
    } else if (p.mode == 5) {
        sl_cp_async_16_if(lane % 2 == 0, base + lane * 16, p.in + lane * 4);
    } else {
        sl_cp_async_16(base + lane * 16, p.in + lane * 4, 16);
        if (p.mode == 3) {
            sl_cp_async_commit();
        }
        sl_cp_async_16(base + 512 + lane * 16, p.in + 128 + lane * 4, 16);
    }
    if (p.mode == 4) {
        sl_cp_async_wait_all();
    } else {
        sl_cp_async_commit();
    }
    if (p.mode == 3) {
        sl_cp_async_wait<1>();
        __syncwarp();
        for (int i = lane; i < 128; i += 32) {
            p.out[i] = sl_ld_shared_b32(base + i * 4);
        }
    }
    sl_cp_async_wait<0>();
    __syncwarp();
    for (int i = p.mode == 3 ? 128 + lane : lane; i < 256; i += 32) {
        p.out[i] = sl_ld_shared_b32(base + i * 4);
    }
}

UNIT(cp_async, cp_async, 32, 1024)
