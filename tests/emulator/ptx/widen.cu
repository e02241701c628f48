// in: 4 words for each lane. out: [lane][8] sl_widen of them, [lane] sl_element of the words as an array, in
// mode's format: 0 float32, 1 bfloat16, 2 float16; then bits to floats and back, and a product.
#include "../../../csrc/cuda/ptx/widen.cuh"
#include "unit.cuh"

template <enum sl_dtype DTYPE> SL_DEV void widen_words(const unit_params &p, int lane) {
    float wide[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    sl_widen<DTYPE>(((const uint4 *)p.in)[lane], wide);
    for (int i = 0; i < 8; i++) {
        p.out[lane * 8 + i] = sl_bits_of(wide[i]);
    }
    p.out[256 + lane] = sl_bits_of(sl_element<DTYPE>(p.in, lane * 2 + 1));
    p.out[288 + lane] = sl_bits_of(sl_mul(sl_float_of(p.in[lane]), sl_float_of_f16(p.in[lane + 32] >> 16)));
}

static __global__ void __launch_bounds__(32) widen(const __grid_constant__ unit_params p) {
    const int lane = threadIdx.x;
    if (p.mode == 0) {
        widen_words<SL_F32>(p, lane);
    } else if (p.mode == 1) {
        widen_words<SL_BF16>(p, lane);
    } else {
        widen_words<SL_F16>(p, lane);
    }
}

UNIT(widen, widen, 32, 0)
