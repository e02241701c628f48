// ldmatrix: one, two or four 8x8 matrices of 16-bit elements, shared memory to registers. All 32 lanes call
// it. Lanes 8i..8i+7 give the addresses (16-byte aligned) of the rows of matrix i; those of other lanes are
// not used. Lane l receives of every matrix row l/4, columns 2(l%4) and 2(l%4)+1; with _trans, rows 2(l%4)
// and 2(l%4)+1, column l/4. The lower half of a register is the lower index.
#pragma once
#include "platform.cuh"

#ifdef __CUDACC__
#define SL_LDMATRIX_1(name)                                                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1." name " {%0}, [%1];" : "=r"(r[0]) : "r"(addr) : "memory")
#define SL_LDMATRIX_2(name)                                                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2." name " {%0,%1}, [%2];"                                     \
                 : "=r"(r[0]), "=r"(r[1])                                                                    \
                 : "r"(addr)                                                                                 \
                 : "memory")
#define SL_LDMATRIX_4(name)                                                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4." name " {%0,%1,%2,%3}, [%4];"                               \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                            \
                 : "r"(addr)                                                                                 \
                 : "memory")
#else
#define SL_LDMATRIX_1(name) emu_ldmatrix(r, addr, 1, name[0] == 't', SL_HERE)
#define SL_LDMATRIX_2(name) emu_ldmatrix(r, addr, 2, name[0] == 't', SL_HERE)
#define SL_LDMATRIX_4(name) emu_ldmatrix(r, addr, 4, name[0] == 't', SL_HERE)
#endif

SL_DEV void sl_ldmatrix_x1(uint32_t r[1], uint32_t addr SL_SITE) {
    SL_LDMATRIX_1("shared.b16");
}
SL_DEV void sl_ldmatrix_x2(uint32_t r[2], uint32_t addr SL_SITE) {
    SL_LDMATRIX_2("shared.b16");
}
SL_DEV void sl_ldmatrix_x4(uint32_t r[4], uint32_t addr SL_SITE) {
    SL_LDMATRIX_4("shared.b16");
}
SL_DEV void sl_ldmatrix_x1_trans(uint32_t r[1], uint32_t addr SL_SITE) {
    SL_LDMATRIX_1("trans.shared.b16");
}
SL_DEV void sl_ldmatrix_x2_trans(uint32_t r[2], uint32_t addr SL_SITE) {
    SL_LDMATRIX_2("trans.shared.b16");
}
SL_DEV void sl_ldmatrix_x4_trans(uint32_t r[4], uint32_t addr SL_SITE) {
    SL_LDMATRIX_4("trans.shared.b16");
}

#undef SL_LDMATRIX_1
#undef SL_LDMATRIX_2
#undef SL_LDMATRIX_4

// The transpose of an 8x8 matrix of 16-bit elements that the warp's registers hold, in ldmatrix's layout.
SL_DEV uint32_t sl_movmatrix_trans(uint32_t a SL_SITE) {
#ifdef __CUDACC__
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
#else
    return emu_movmatrix(a, SL_HERE);
#endif
}
