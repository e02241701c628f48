#include "kernels.h"

const struct sl_cpu_kernels *sl_cpu_kernels_for(enum sl_cpu_level level, enum sl_dtype dtype) {
#if defined(__x86_64__) || defined(_M_X64)
    if (level == SL_CPU_AVX512_BF16 && dtype == SL_BF16) {
        return &sl_kernels_avx512_bf16;
    }
    if (level >= SL_CPU_AVX512) {
        return &sl_kernels_avx512;
    }
    if (level == SL_CPU_AVX2) {
        return &sl_kernels_avx2;
    }
#endif
    (void)level;
    (void)dtype;
    return &sl_kernels_portable;
}
