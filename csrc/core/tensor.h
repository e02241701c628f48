// A borrowed strided array: what every binding produces and every operation takes.
#ifndef SL_TENSOR_H
#define SL_TENSOR_H

#include "dtype.h"

enum { SL_MAX_DIMS = 8 };

// Device types carry DLPack's numbers.
enum sl_device_type { SL_DEVICE_CPU = 1, SL_DEVICE_CUDA = 2 };

// data points at element [0, ..., 0] (DLPack's byte_offset is already added). It is never owned and may be
// NULL only where the tensor has no elements. strides count elements, may be zero or negative for inputs; the
// stride of a dimension of size 1 means nothing. An optional argument that was not given has data NULL and
// n_dim 0.
struct sl_tensor {
    void *data;
    enum sl_dtype dtype;
    int32_t device_type;
    int32_t device_id;
    int32_t n_dim;
    bool read_only;
    int64_t shape[SL_MAX_DIMS];
    int64_t stride[SL_MAX_DIMS];
};

static inline bool sl_tensor_given(const struct sl_tensor *tensor) {
    return tensor->n_dim > 0;
}

static inline int64_t sl_tensor_count(const struct sl_tensor *tensor) {
    int64_t count = 1;
    for (int32_t i = 0; i < tensor->n_dim; i++) {
        count *= tensor->shape[i];
    }
    return count;
}

// Row [b, h, n] of a tensor of heads, [n_batch, heads, tokens or slots, d_head].
static inline char *sl_tensor_row(const struct sl_tensor *t, int64_t b, int64_t h, int64_t n) {
    return (char *)t->data +
           (b * t->stride[0] + h * t->stride[1] + n * t->stride[2]) * sl_dtype_size(t->dtype);
}

// Element [b, n] of a mask. Any byte but 0 is true: NumPy and torch keep other bytes than 0 and 1 where bytes
// are viewed as bool, and C's bool must not be read from those.
static inline bool sl_mask_at(const struct sl_tensor *mask, int64_t b, int64_t n) {
    return ((const uint8_t *)mask->data)[b * mask->stride[0] + n * mask->stride[1]] != 0;
}

#endif
