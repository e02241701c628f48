// Vector primitives for AVX2 with FMA and F16C.
#include <immintrin.h>

#define VL 8
#define LANE_ROWS 4     // 4 x 3 accumulators of 16 registers
#define GRAD_VECTORS 2  // 6 x 2 accumulators
#define VALUE_VECTORS 4 // 2 x 4 accumulators

typedef __m256 vf;
typedef __m256 vmask;

INLINE vf v_zero(void) {
    return _mm256_setzero_ps();
}
INLINE vf v_set1(float x) {
    return _mm256_set1_ps(x);
}
INLINE vf v_load(const void *p) {
    return _mm256_loadu_ps(p);
}
INLINE void v_store(void *p, vf x) {
    _mm256_storeu_ps(p, x);
}
INLINE vf v_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
INLINE vf v_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
INLINE vf v_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
INLINE vf v_fma(vf a, vf b, vf c) { // a * b + c
    return _mm256_fmadd_ps(a, b, c);
}
INLINE vf v_max(vf a, vf b) { // b where either is NaN
    return _mm256_max_ps(a, b);
}
INLINE vf v_neg_if(vf x, bool negate) {
    return negate ? _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)) : x;
}
INLINE float v_sum(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// Lane i: the sum of c[i]'s lanes, added in the same order in every lane.
INLINE vf v_sums(const vf c[VL]) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(c[0], c[1]), _mm256_hadd_ps(c[2], c[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(c[4], c[5]), _mm256_hadd_ps(c[6], c[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
INLINE vf v_round(vf x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vf v_scale2(vf x, vf n) { // x * 2^n for integral n <= 0 and x about 1; below 2^-125 it gives 0
    const __m256i e = _mm256_cvtps_epi32(n);
    const vf y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(e, 23)));
    return _mm256_andnot_ps(_mm256_cmp_ps(n, _mm256_set1_ps(-125.0f), _CMP_LT_OQ), y);
}
// Lanes >= from.
INLINE vmask v_lanes_from(int64_t from) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int first = from < 0 ? 0 : from > VL ? VL : (int)from;
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1)));
}
INLINE vf v_keep(vmask m, vf x) { // x, 0 elsewhere
    return _mm256_and_ps(m, x);
}
INLINE vf v_select(vmask m, vf x, vf other) {
    return _mm256_blendv_ps(other, x, m);
}

// VL elements at p as floats; head dims are multiples of VL, so n is always VL.
INLINE vf v_load_as(enum sl_dtype dtype, const void *p, int64_t n) {
    (void)n;
    if (dtype == SL_F32) {
        return _mm256_loadu_ps(p);
    }
    const __m128i half = _mm_loadu_si128(p);
    if (dtype == SL_BF16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    return _mm256_cvtph_ps(half);
}
INLINE void v_store_as(enum sl_dtype dtype, void *p, vf x, int64_t n) {
    (void)n;
    if (dtype == SL_F32) {
        _mm256_storeu_ps(p, x);
    } else if (dtype == SL_BF16) {
        // Round to nearest even; a NaN must stay one.
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(up),
                                             _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
        const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
        _mm_storeu_si128(p, _mm256_castsi256_si128(packed));
    } else {
        _mm_storeu_si128(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
}

INLINE void v_transpose(vf r[VL]) {
    __m256 t[8], u[8];
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL(2)
    for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
        r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
}
