#include "common.inc"

#if defined(__x86_64__) || defined(_M_X64)
#include "vector_avx2.h"

#include "float_words.inc"

#include "pack.inc"

#include "forward.inc"

#include "backward.inc"

#include "column_sums.inc"

#include "decode.inc"

#include "evict.inc"

#define TABLE sl_kernels_avx2
#include "table.inc"

#endif
