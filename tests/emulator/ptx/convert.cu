// in: 512 floats. out: [what][256]: sl_pack of pairs, sl_pack_one of the even ones, both sl_unpack of the
// pairs' words, sl_unpack_one of their lower halves (modes 0 bfloat16, 1 float16); or exp2, log2, rcp of the
// first 256 (mode 2).
#include "../../../csrc/cuda/ptx/convert.cuh"
#include "unit.cuh"

template <enum sl_dtype DTYPE> SL_DEV void convert_pair(const unit_params &p, int i) {
    const float *in = (const float *)p.in;
    const uint32_t packed = sl_pack<DTYPE>(in[2 * i], in[2 * i + 1]);
    p.out[i] = packed;
    p.out[256 + i] = sl_pack_one<DTYPE>(in[2 * i]);
    const uint32_t word = p.in[2 * i] >> 16 | (p.in[2 * i + 1] & 0xffff0000u);
    const float2 both = sl_unpack<DTYPE>(word);
    p.out[512 + i] = __float_as_uint(both.x);
    p.out[768 + i] = __float_as_uint(both.y);
    p.out[1024 + i] = __float_as_uint(sl_unpack_one<DTYPE>((uint16_t)word));
}

static __global__ void __launch_bounds__(256) convert(const __grid_constant__ unit_params p) {
    const int i = threadIdx.x;
    if (p.mode == 0) {
        convert_pair<SL_BF16>(p, i);
    } else if (p.mode == 1) {
        convert_pair<SL_F16>(p, i);
    } else {
        const float v = ((const float *)p.in)[i];
        p.out[i] = __float_as_uint(sl_exp2(v));
        p.out[256 + i] = __float_as_uint(sl_log2(v));
        p.out[512 + i] = __float_as_uint(sl_rcp(v));
    }
}

UNIT(convert, convert, 256, 0)
