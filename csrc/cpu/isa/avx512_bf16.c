// bfloat16 by pairs: VDPBF16PS multiplies two of them a lane and adds both products to a float32. It flushes
// subnormals to zero, which only values below 1e-38 notice.
#include "common.inc"

#if defined(__x86_64__) || defined(_M_X64)
#include "vector_avx512.h"

#define PAIR 2

INLINE vf word_broadcast(const sl_word *p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm512_castsi512_ps(_mm512_set1_epi32(x));
}
INLINE vf word_dot(vf sum, vf a, vf b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
INLINE vf word_negate_if(vf x, bool negate) {
    const __m512i signs = _mm512_set1_epi32((int)0x80008000u);
    return negate ? _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), signs)) : x;
}
// Lane l: the bfloat16 of low (exact in its float) in the lower half, of high in the upper half.
INLINE vf word_pair(vf low, vf high) {
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high)));
}
// The same with rounding: one conversion of both and one interleaving permutation.
INLINE vf words_of(vf low, vf high) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
}
INLINE void store_bf16(sl_word *out, vf x) {
    _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(x));
}
// Words of two rows' n <= 32 columns: lane l of low is column l of both rows, of high column 16 + l.
INLINE void words_zip(const void *a, const void *b, int64_t n, vf *low, vf *high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39,
                                           7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const __mmask32 m = (__mmask32)((UINT64_C(1) << n) - 1);
    const __m512i x = n == 32 ? _mm512_loadu_si512(a) : _mm512_maskz_loadu_epi16(m, a);
    const __m512i y = n == 32 ? _mm512_loadu_si512(b) : _mm512_maskz_loadu_epi16(m, b);
    *low = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, first, y));
    *high = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, second, y));
}

#include "pack.inc"

#include "forward.inc"

#include "backward.inc"

#include "column_sums.inc"

#include "decode.inc"

#include "evict.inc"

#define TABLE sl_kernels_avx512_bf16
#include "table.inc"

#endif
