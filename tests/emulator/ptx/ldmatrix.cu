// in: 32 rows of 8 16-bit numbers. out: [lane][register]. Row r lies at chunk (7 r) mod 32 of shared memory.
#include "../../../csrc/cuda/ptx/ldmatrix.cuh"
#include "../../../csrc/cuda/ptx/memory.cuh"
#include "unit.cuh"

static __global__ void __launch_bounds__(32) ldmatrix(const __grid_constant__ unit_params p) {
    const int lane = threadIdx.x;
    const uint32_t base = sl_shared_addr(SL_SHARED_BASE()), row = base + lane * 7 % 32 * 16;
    sl_st_shared_v4(row, ((const uint4 *)p.in)[lane]);
    __syncwarp();
    uint32_t r[4] = {0, 0, 0, 0};
    if (p.mode == 0) {
        sl_ldmatrix_x1(r, row);
    } else if (p.mode == 1) {
        sl_ldmatrix_x2(r, row);
    } else if (p.mode == 2) {
        sl_ldmatrix_x4(r, row);
    } else if (p.mode == 3) {
        sl_ldmatrix_x1_trans(r, row);
    } else if (p.mode == 4) {
        sl_ldmatrix_x2_trans(r, row);
    } else if (p.mode == 5) {
        sl_ldmatrix_x4_trans(r, row);
    } else {
        r[0] = sl_movmatrix_trans(p.in[lane]);
    }
    for (int i = 0; i < 4; i++) {
        p.out[lane * 4 + i] = r[i];
    }
}

UNIT(ldmatrix, ldmatrix, 32, 512)
