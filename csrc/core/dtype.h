// Element types and their properties, from dtype.def.
#ifndef SL_DTYPE_H
#define SL_DTYPE_H

#include "portable.h"

#include <string.h>

enum sl_dtype {
#define SL_DTYPE(id, name, bytes, dl_code, dl_bits, npy) SL_##id,
#include "dtype.def"
#undef SL_DTYPE
    SL_DTYPE_COUNT
};

static inline int64_t sl_dtype_size(enum sl_dtype dtype) {
    static const int64_t size[] = {
#define SL_DTYPE(id, name, bytes, dl_code, dl_bits, npy) bytes,
#include "dtype.def"
#undef SL_DTYPE
    };
    return size[dtype];
}

static inline const char *sl_dtype_name(enum sl_dtype dtype) {
    static const char *const name_of[] = {
#define SL_DTYPE(id, name, bytes, dl_code, dl_bits, npy) name,
#include "dtype.def"
#undef SL_DTYPE
    };
    return name_of[dtype];
}

// The types attention computes on; all products accumulate in float32.
static inline bool sl_dtype_is_compute(enum sl_dtype dtype) {
    return dtype == SL_F32 || dtype == SL_BF16 || dtype == SL_F16;
}

#endif
