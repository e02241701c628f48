// Floats in shared and global memory: one, or four at once, which must be 16-byte aligned.
#pragma once
#include "platform.cuh"

SL_DEV void sl_ld_shared_floats(float v[4], uint32_t addr SL_SITE) {
#ifdef __CUDACC__
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "r"(addr)
                 : "memory");
#else
    emu_shared_read(v, addr, 16, SL_HERE);
#endif
}

SL_DEV void sl_st_shared_floats(uint32_t addr, const float v[4] SL_SITE) {
#ifdef __CUDACC__
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(addr), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                 "f"(v[3])
                 : "memory");
#else
    emu_shared_write(addr, v, 16, SL_HERE);
#endif
}

SL_DEV void sl_st_shared_float(uint32_t addr, float v SL_SITE) {
#ifdef __CUDACC__
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(addr), "f"(v) : "memory");
#else
    emu_shared_write(addr, &v, 4, SL_HERE);
#endif
}

SL_DEV float sl_ld_shared_float(uint32_t addr SL_SITE) {
    float v;
#ifdef __CUDACC__
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(addr) : "memory");
#else
    emu_shared_read(&v, addr, 4, SL_HERE);
#endif
    return v;
}

SL_DEV void sl_ld_global_floats(float v[4], const float *p SL_SITE) {
#ifdef __CUDACC__
    const float4 x = *(const float4 *)p;
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
#else
    emu_global_read(v, p, 16, SL_HERE);
#endif
}

SL_DEV void sl_st_global_floats(float *p, const float v[4] SL_SITE) {
#ifdef __CUDACC__
    *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
#else
    emu_global_write(p, v, 16, SL_HERE);
#endif
}
