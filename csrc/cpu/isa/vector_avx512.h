// Vector primitives for AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#define VL 16
#define LANE_ROWS 8     // rows of the micro-kernel against lane vectors: 8 x 3 accumulators of 32 registers
#define GRAD_VECTORS 4  // columns of the rows_add micro-kernel: 6 x 4 accumulators
#define VALUE_VECTORS 8 // columns that decode adds up at a time: 2 x 8 accumulators

typedef __m512 vf;
typedef __mmask16 vmask;

INLINE vf v_zero(void) {
    return _mm512_setzero_ps();
}
INLINE vf v_set1(float x) {
    return _mm512_set1_ps(x);
}
INLINE vf v_load(const void *p) {
    return _mm512_loadu_ps(p);
}
INLINE void v_store(void *p, vf x) {
    _mm512_storeu_ps(p, x);
}
INLINE vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
INLINE vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
INLINE vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
INLINE vf v_fma(vf a, vf b, vf c) { // a * b + c
    return _mm512_fmadd_ps(a, b, c);
}
INLINE vf v_max(vf a, vf b) { // b where either is NaN
    return _mm512_max_ps(a, b);
}
INLINE vf v_neg_if(vf x, bool negate) {
    return negate
               ? _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN)))
               : x;
}
INLINE float v_sum(vf x) {
    return _mm512_reduce_add_ps(x);
}
// Lane i: the sum of c[i]'s lanes, added in the same order in every lane.
INLINE vf v_sums(const vf c[VL]) {
    __m512 t[8];
    __m512 u[4];
    UNROLL(8)
    for (int i = 0; i < 8; i++) {
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(c[2 * i], c[2 * i + 1]),
                             _mm512_unpackhi_ps(c[2 * i], c[2 * i + 1]));
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    UNROLL(2)
    for (int i = 0; i < 2; i++) {
        t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
}
INLINE vf v_round(vf x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vf v_scale2(vf x, vf n) { // x * 2^n for integral n <= 0
    return _mm512_scalef_ps(x, n);
}
// Lanes >= from.
INLINE vmask v_lanes_from(int64_t from) {
    return from <= 0 ? 0xffff : from >= VL ? 0 : (vmask)(0xffffu << from);
}
INLINE vf v_keep(vmask m, vf x) { // x, 0 elsewhere
    return _mm512_maskz_mov_ps(m, x);
}
INLINE vf v_select(vmask m, vf x, vf other) {
    return _mm512_mask_blend_ps(m, other, x);
}

// n <= VL elements at p as floats, zeros beyond.
INLINE vf v_load_as(enum sl_dtype dtype, const void *p, int64_t n) {
    if (dtype == SL_F32 && n == VL) {
        return _mm512_loadu_ps(p);
    }
    const __mmask16 m = (__mmask16)((1u << n) - 1);
    if (dtype == SL_F32) {
        return _mm512_maskz_loadu_ps(m, p);
    }
    const __m256i half = _mm256_maskz_loadu_epi16(m, p);
    if (dtype == SL_BF16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    return _mm512_cvtph_ps(half);
}
INLINE void v_store_as(enum sl_dtype dtype, void *p, vf x, int64_t n) {
    if (dtype == SL_F32 && n == VL) {
        _mm512_storeu_ps(p, x);
        return;
    }
    const __mmask16 m = (__mmask16)((1u << n) - 1);
    if (dtype == SL_F32) {
        _mm512_mask_storeu_ps(p, m, x);
    } else if (dtype == SL_BF16) {
        // Round to nearest even; a NaN must stay one.
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
        _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    } else {
        _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
}

// VL x VL transpose of 32-bit words: four rounds of 2-way exchanges.
INLINE void v_transpose(vf r[VL]) {
    __m512 t[16];
    UNROLL(8)
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
        const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
