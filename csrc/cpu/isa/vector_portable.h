// Vector primitives for any C11 compiler: four floats, by loops that compilers turn into whatever they have.
#include <math.h>

#define VL 4
#define LANE_ROWS 4
#define GRAD_VECTORS 2
#define VALUE_VECTORS 4

typedef struct {
    float x[VL];
} vf;
typedef struct {
    bool on[VL];
} vmask;

#define EACH for (int i_ = 0; i_ < VL; i_++)

INLINE vf v_set1(float x) {
    vf r;
    EACH r.x[i_] = x;
    return r;
}
INLINE vf v_zero(void) {
    return v_set1(0.0f);
}
INLINE vf v_load(const void *p) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
INLINE void v_store(void *p, vf x) {
    memcpy(p, &x, sizeof x);
}
INLINE vf v_add(vf a, vf b) {
    EACH a.x[i_] += b.x[i_];
    return a;
}
INLINE vf v_sub(vf a, vf b) {
    EACH a.x[i_] -= b.x[i_];
    return a;
}
INLINE vf v_mul(vf a, vf b) {
    EACH a.x[i_] *= b.x[i_];
    return a;
}
INLINE vf v_fma(vf a, vf b, vf c) { // a * b + c, rounded once or twice as the compiler likes
    EACH c.x[i_] += a.x[i_] * b.x[i_];
    return c;
}
INLINE vf v_max(vf a, vf b) { // b where either is NaN
    EACH a.x[i_] = a.x[i_] > b.x[i_] ? a.x[i_] : b.x[i_];
    return a;
}
INLINE vf v_neg_if(vf x, bool negate) {
    EACH x.x[i_] = negate ? -x.x[i_] : x.x[i_];
    return x;
}
INLINE float v_sum(vf a) {
    return (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]);
}
INLINE vf v_sums(const vf c[VL]) { // lane i: the sum of c[i]'s lanes
    vf r;
    EACH r.x[i_] = v_sum(c[i_]);
    return r;
}
INLINE vf v_round(vf a) { // to the nearest integer, for |x| < 2^22: adding 1.5 * 2^23 drops the fraction
    EACH {
        const float big = a.x[i_] + 12582912.0f;
        a.x[i_] = big - 12582912.0f;
    }
    return a;
}
INLINE vf v_scale2(vf a, vf n) { // x * 2^n for integral n and x about 1; below 2^-125 it gives 0
    EACH {
        uint32_t bits;
        memcpy(&bits, &a.x[i_], 4);
        bits += (uint32_t)(n.x[i_] >= -125.0f && n.x[i_] <= 127.0f ? (int32_t)n.x[i_] : 0) << 23;
        memcpy(&a.x[i_], &bits, 4);
        a.x[i_] = n.x[i_] < -125.0f ? 0.0f : n.x[i_] > 127.0f ? INFINITY : a.x[i_];
    }
    return a;
}
// Lanes >= from.
INLINE vmask v_lanes_from(int64_t from) {
    vmask m;
    EACH m.on[i_] = i_ >= from;
    return m;
}
INLINE vf v_select(vmask m, vf x, vf other) {
    EACH x.x[i_] = m.on[i_] ? x.x[i_] : other.x[i_];
    return x;
}
INLINE vf v_keep(vmask m, vf x) { // x, 0 elsewhere
    return v_select(m, x, v_zero());
}

INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    uint32_t bits;
    float f;
    if (rest < 0x0400u) { // zero and subnormals: rest * 2^-24 exactly
        f = (float)rest * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | (rest >= 0x7c00u ? 0x7f800000u | rest << 13 : (rest << 13) + 0x38000000u);
    memcpy(&f, &bits, 4);
    return f;
}
INLINE uint16_t float_to_half(float x) { // nearest even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (rest >= 0x477ff000u) { // rounds beyond 65504
        return (uint16_t)(sign | 0x7c00u);
    }
    if (rest < 0x38800000u) { // subnormal: the float addition rounds at 2^-24
        float small, f;
        memcpy(&f, &rest, 4);
        small = f + 0.5f;
        uint32_t s;
        memcpy(&s, &small, 4);
        return (uint16_t)(sign | (s - 0x3f000000u));
    }
    return (uint16_t)(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}
INLINE uint16_t float_to_bf16(float x) { // nearest even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
INLINE float bf16_to_float(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// VL elements at p as floats; head dims are multiples of VL, so n is always VL.
INLINE vf v_load_as(enum sl_dtype dtype, const void *p, int64_t n) {
    (void)n;
    if (dtype == SL_F32) {
        return v_load(p);
    }
    uint16_t h[VL];
    vf r;
    memcpy(h, p, sizeof h);
    EACH r.x[i_] = dtype == SL_BF16 ? bf16_to_float(h[i_]) : half_to_float(h[i_]);
    return r;
}
INLINE void v_store_as(enum sl_dtype dtype, void *p, vf x, int64_t n) {
    (void)n;
    if (dtype == SL_F32) {
        v_store(p, x);
        return;
    }
    uint16_t h[VL];
    EACH h[i_] = dtype == SL_BF16 ? float_to_bf16(x.x[i_]) : float_to_half(x.x[i_]);
    memcpy(p, h, sizeof h);
}

INLINE void v_transpose(vf r[VL]) {
    vf t[VL];
    for (int i = 0; i < VL; i++) {
        EACH t[i_].x[i] = r[i].x[i_];
    }
    for (int i = 0; i < VL; i++) {
        r[i] = t[i];
    }
}
#undef EACH
