// CUDA's built-in device functions by their own names. Included at the end of emulator.h.
#pragma once

// ---- warp and block
template <class T> static inline uint32_t emu_bits_of(T v) {
    static_assert(sizeof(T) == 4, "32-bit values only");
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}
template <class T> static inline T emu_from_bits(uint32_t u) {
    T v;
    memcpy(&v, &u, 4);
    return v;
}
#define EMU_SHFL(name, mode, by_name)                                                                        \
    template <class T> static inline T name(uint32_t mask, T v, int by_name, int width = 32 SL_SITE) {       \
        return emu_from_bits<T>(emu_shuffle(mask, emu_bits_of(v), mode, by_name, width, SL_HERE));           \
    }
EMU_SHFL(emu_shfl, EMU_SHUFFLE_IDX, source)
EMU_SHFL(emu_shfl_xor, EMU_SHUFFLE_XOR, lanes)
EMU_SHFL(emu_shfl_up, EMU_SHUFFLE_UP, delta)
EMU_SHFL(emu_shfl_down, EMU_SHUFFLE_DOWN, delta)
#undef EMU_SHFL
#define __shfl_sync emu_shfl
#define __shfl_xor_sync emu_shfl_xor
#define __shfl_up_sync emu_shfl_up
#define __shfl_down_sync emu_shfl_down

static inline uint32_t emu_ballot(uint32_t mask, int p SL_SITE) {
    return emu_vote(mask, p != 0, EMU_BALLOT, SL_HERE);
}
static inline int emu_any(uint32_t mask, int p SL_SITE) {
    return (int)emu_vote(mask, p != 0, EMU_ANY, SL_HERE);
}
static inline int emu_all(uint32_t mask, int p SL_SITE) {
    return (int)emu_vote(mask, p != 0, EMU_ALL, SL_HERE);
}
template <class T> static inline uint32_t emu_match_any(uint32_t mask, T v SL_SITE) {
    return emu_vote(mask, emu_bits_of(v), EMU_MATCH_ANY, SL_HERE);
}
#define __ballot_sync emu_ballot
#define __any_sync emu_any
#define __all_sync emu_all
#define __match_any_sync emu_match_any

#define EMU_REDUCE(name, op)                                                                                 \
    static inline int name(uint32_t mask, int v SL_SITE) {                                                   \
        return (int)emu_warp_reduce(mask, (uint32_t)v, op, true, SL_HERE);                                   \
    }                                                                                                        \
    static inline uint32_t name(uint32_t mask, uint32_t v SL_SITE) {                                         \
        return emu_warp_reduce(mask, v, op, false, SL_HERE);                                                 \
    }
EMU_REDUCE(emu_reduce_add, EMU_ADD)
EMU_REDUCE(emu_reduce_min, EMU_MIN)
EMU_REDUCE(emu_reduce_max, EMU_MAX)
EMU_REDUCE(emu_reduce_and, EMU_AND)
EMU_REDUCE(emu_reduce_or, EMU_OR)
#undef EMU_REDUCE
#define __reduce_add_sync emu_reduce_add
#define __reduce_min_sync emu_reduce_min
#define __reduce_max_sync emu_reduce_max
#define __reduce_and_sync emu_reduce_and
#define __reduce_or_sync emu_reduce_or

static inline void emu_syncthreads(SL_SITE0) {
    emu_barrier(0, 0, true, SL_HERE);
}
static inline int emu_syncthreads_or(int p SL_SITE) {
    return emu_barrier_reduce(p, EMU_OR, SL_HERE);
}
static inline int emu_syncthreads_and(int p SL_SITE) {
    return emu_barrier_reduce(p, EMU_AND, SL_HERE);
}
static inline int emu_syncthreads_count(int p SL_SITE) {
    return emu_barrier_reduce(p, EMU_ADD, SL_HERE);
}
static inline void emu_syncwarp_mask(uint32_t mask = 0xffffffffu SL_SITE) {
    emu_syncwarp(mask, SL_HERE);
}
static inline void emu_fence(SL_SITE0) {
    emu_threadfence(SL_HERE);
}
#define __syncthreads emu_syncthreads
#define __syncthreads_or emu_syncthreads_or
#define __syncthreads_and emu_syncthreads_and
#define __syncthreads_count emu_syncthreads_count
#define __syncwarp emu_syncwarp_mask
#define __threadfence emu_fence

// ---- atomics on global memory; those on shared memory are in ptx/atomic.cuh
#define EMU_ATOMIC(name, op, T, is_signed)                                                                   \
    static inline T name(T *p, T v SL_SITE) {                                                                \
        return (T)emu_global_atomic(p, (uint32_t)v, 0, op, is_signed, SL_HERE);                              \
    }
#define EMU_ATOMICS(name, op) EMU_ATOMIC(name, op, int, true) EMU_ATOMIC(name, op, uint32_t, false)
EMU_ATOMICS(atomicAdd, EMU_ADD)
EMU_ATOMICS(atomicMin, EMU_MIN)
EMU_ATOMICS(atomicMax, EMU_MAX)
EMU_ATOMICS(atomicAnd, EMU_AND)
EMU_ATOMICS(atomicOr, EMU_OR)
EMU_ATOMICS(atomicExch, EMU_EXCHANGE)
#undef EMU_ATOMICS
#undef EMU_ATOMIC
static inline int atomicCAS(int *p, int compare, int v SL_SITE) {
    return (int)emu_global_atomic(p, (uint32_t)v, (uint32_t)compare, EMU_CAS, true, SL_HERE);
}
static inline uint32_t atomicCAS(uint32_t *p, uint32_t compare, uint32_t v SL_SITE) {
    return emu_global_atomic(p, v, compare, EMU_CAS, false, SL_HERE);
}

template <class T> static inline T emu_load(const T *p SL_SITE) {
    T v;
    emu_global_read(&v, p, (int)sizeof v, SL_HERE);
    return v;
}
template <class T> static inline void emu_store(T *p, T v SL_SITE) {
    emu_global_write(p, &v, (int)sizeof v, SL_HERE);
}
#define __ldg emu_load
#define __ldcs emu_load
#define __ldcg emu_load
#define __stcs emu_store
#define __stcg emu_store

// ---- arithmetic
#define __float_as_int emu_bits_signed
#define __float_as_uint emu_bits_of<float>
#define __int_as_float(i) emu_from_bits<float>((uint32_t)(i))
#define __uint_as_float(u) emu_from_bits<float>(u)
static inline int emu_bits_signed(float v) {
    return (int)emu_bits_of(v);
}
static inline int __popc(uint32_t v) {
    return __builtin_popcount(v);
}
static inline int __clz(int v) {
    return v ? __builtin_clz((uint32_t)v) : 32;
}
static inline int __ffs(int v) {
    return __builtin_ffs(v);
}
static inline uint32_t __brev(uint32_t v) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i++) {
        r |= (v >> i & 1) << (31 - i);
    }
    return r;
}
static inline float emu_flush(float v) {
    return fabsf(v) < 1.17549435e-38f ? copysignf(0.0f, v) : v;
} // .ftz
static inline float __fdividef(float a, float b) {
    return a / b;
}
#define __expf expf
#define __logf logf
static inline float __fmul_rn(float a, float b) {
    return a * b;
}
static inline float __fadd_rn(float a, float b) {
    return a + b;
}
static inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
static inline int __float2int_rn(float v) {
    return (int)rintf(v);
}
static inline float rsqrtf(float v) {
    return 1.0f / sqrtf(v);
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return (uint32_t)((uint64_t)a * b >> 32);
}
static inline float __saturatef(float v) {
    return v > 0.0f ? fminf(v, 1.0f) : 0.0f;
}
static inline uint32_t __funnelshift_l(uint32_t lo, uint32_t hi, int n) {
    return (uint32_t)((((uint64_t)hi << 32 | lo) << (n & 31)) >> 32);
}
#define EMU_MIN_MAX(T)                                                                                       \
    static inline T min(T a, T b) {                                                                          \
        return a < b ? a : b;                                                                                \
    }                                                                                                        \
    static inline T max(T a, T b) {                                                                          \
        return a > b ? a : b;                                                                                \
    }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long)
#undef EMU_MIN_MAX
static inline float min(float a, float b) {
    return fminf(a, b);
}
static inline float max(float a, float b) {
    return fmaxf(a, b);
}
