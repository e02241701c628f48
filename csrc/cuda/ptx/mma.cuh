// mma.sync m16n8k16: D(16x8, f32) += A(16x16) B(16x8), one warp. With g = lane/4, t = lane%4:
//   a[0] (g, 2t..2t+1)  a[1] (g+8, 2t..)  a[2] (g, 2t+8..)  a[3] (g+8, 2t+8..)
//   b[0] (k 2t..2t+1, n g)  b[1] (k 2t+8.., n g)
//   d[0..1] (g, 2t..2t+1)  d[2..3] (g+8, 2t..2t+1);  lower half of a register is the lower index.
#pragma once
#include "platform.cuh"

template <enum sl_dtype DTYPE>
SL_DEV void sl_mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2] SL_SITE) {
#ifdef __CUDACC__
    if (DTYPE == SL_BF16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#else
    emu_mma_16816(d, a, b, DTYPE == SL_BF16, SL_HERE);
#endif
}
