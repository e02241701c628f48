// ldmatrix, movmatrix and mma.sync, by the layouts of the PTX manual ("Matrix fragments", "ldmatrix").
#include "engine.h"

template <class T> static T *operand(int warp, int lane) {
    return (T *)emu_at(warp, lane)->op.arg;
}

// ---- ldmatrix: lanes 8i .. 8i+7 name the rows of matrix i
struct ldmatrix_operand {
    uint32_t *r, addr;
    int count;
    bool trans;
};
typedef uint16_t matrix8[8][8];

static uint32_t fragment(const matrix8 m, int lane, bool trans) {
    const int row = lane >> 2, column = 2 * (lane & 3);
    return trans ? m[column][row] | (uint32_t)m[column + 1][row] << 16
                 : m[row][column] | (uint32_t)m[row][column + 1] << 16;
}

static void run_ldmatrix(int warp, uint32_t) {
    matrix8 m[4];
    const int count = operand<ldmatrix_operand>(warp, 0)->count;
    emu_coords *const caller = emu_self;
    for (int i = 0; i < count; i++) {
        int use[8] = {0}, wavefronts = 0;
        for (int row = 0; row < 8; row++) {
            emu_fiber *f = emu_at(warp, i * 8 + row);
            const uint32_t addr = operand<ldmatrix_operand>(warp, i * 8 + row)->addr;
            emu_self = f; // the lane that gives the address is the one that reads
            const unsigned char *p = emu_shared_at(addr, 16, 16, "ldmatrix", f->op.site);
            emu_shadow_read(emu_shared_shadow, (size_t)(p - emu_b.shared), 16, f->op.site);
            memcpy(m[i][row], p, 16);
            const int n = ++use[addr / 16 % 8];
            wavefronts = n > wavefronts ? n : wavefronts;
        }
        emu_conflict_matrix(wavefronts, emu_at(warp, 0)->op.site);
    }
    emu_self = caller;
    for (int lane = 0; lane < 32; lane++) {
        const ldmatrix_operand *o = operand<ldmatrix_operand>(warp, lane);
        for (int i = 0; i < count; i++) {
            o->r[i] = fragment(m[i], lane, o->trans);
        }
    }
}

static void check_whole_warp(const char *what, emu_site site) {
    if (emu_lanes_of(emu_me()->warp) != 0xffffffffu) {
        emu_fail(site, "%s: a warp of fewer than 32 threads", what);
    }
}

void emu_ldmatrix(uint32_t *r, uint32_t addr, int count, bool trans, emu_site site) {
    check_whole_warp("ldmatrix", site);
    ldmatrix_operand o = {r, addr, count, trans};
    emu_collective(EMU_LOADS, 0xffffffffu, &o, run_ldmatrix, site);
}

// ---- movmatrix: transposes an 8x8 matrix that the warp holds
static void run_movmatrix(int warp, uint32_t) {
    matrix8 m;
    for (int lane = 0; lane < 32; lane++) {
        const uint32_t a = *operand<uint32_t>(warp, lane);
        m[lane >> 2][2 * (lane & 3)] = (uint16_t)a;
        m[lane >> 2][2 * (lane & 3) + 1] = (uint16_t)(a >> 16);
    }
    for (int lane = 0; lane < 32; lane++) {
        *operand<uint32_t>(warp, lane) = fragment(m, lane, true);
    }
}

uint32_t emu_movmatrix(uint32_t a, emu_site site) {
    check_whole_warp("movmatrix", site);
    emu_collective(EMU_MOVES, 0xffffffffu, &a, run_movmatrix, site);
    return a;
}

// ---- mma.m16n8k16. Sums are float; the device's rounding inside a step is not known and not modelled.
struct mma_operand {
    float *d;
    const uint32_t *a, *b;
    bool bf16;
};

__attribute__((optimize("O3"))) static void multiply(float c[16][8], const float a[16][16],
                                                     const float b[16][8]) {
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 16; k++) {
            for (int j = 0; j < 8; j++) {
                c[i][j] += a[i][k] * b[k][j];
            }
        }
    }
}

static void run_mma(int warp, uint32_t) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const mma_operand *o = operand<mma_operand>(warp, lane);
        const int g = lane >> 2, t = lane & 3;
        for (int i = 0; i < 4; i++) {
            const int row = g + 8 * (i & 1), k = 2 * t + 8 * (i >> 1);
            a[row][k] = emu_16_to_f32(o->a[i] & 0xffff, o->bf16);
            a[row][k + 1] = emu_16_to_f32(o->a[i] >> 16, o->bf16);
            c[g + 8 * (i >> 1)][2 * t + (i & 1)] = o->d[i];
        }
        for (int i = 0; i < 2; i++) {
            const int k = 2 * t + 8 * i;
            b[k][g] = emu_16_to_f32(o->b[i] & 0xffff, o->bf16);
            b[k + 1][g] = emu_16_to_f32(o->b[i] >> 16, o->bf16);
        }
    }
    multiply(c, a, b);
    for (int lane = 0; lane < 32; lane++) {
        const mma_operand *o = operand<mma_operand>(warp, lane);
        for (int i = 0; i < 4; i++) {
            o->d[i] = c[(lane >> 2) + 8 * (i >> 1)][2 * (lane & 3) + (i & 1)];
        }
    }
    emu_counts.mma++;
}

void emu_mma_16816(float *d, const uint32_t *a, const uint32_t *b, bool bf16, emu_site site) {
    check_whole_warp("mma", site);
    mma_operand o = {d, a, b, bf16};
    emu_collective(EMU_MMAS, 0xffffffffu, &o, run_mma, site);
}
