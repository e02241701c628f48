// DLPack's binary interface, written from its specification (1.3): the structures an exchange passes between
// two libraries that share no header. Names and layouts are the specification's; nothing here may be
// reordered.
#ifndef SL_DLPACK_ABI_H
#define SL_DLPACK_ABI_H

#include "../core/portable.h"

// Device types whose memory the CPU reads: plain, and page-locked for CUDA or ROCm.
enum { DL_CPU = 1, DL_CUDA_HOST = 3, DL_ROCM_HOST = 11 };

enum { DL_FLAG_READ_ONLY = 1 };

struct dl_version {
    uint32_t major; // a consumer of another major version may only call the deleter
    uint32_t minor;
};

struct dl_device {
    int32_t type;
    int32_t id;
};

struct dl_data_type {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

// strides count elements; NULL means compact row-major. Element 0 is at data + byte_offset.
struct dl_tensor {
    void *data;
    struct dl_device device;
    int32_t n_dim;
    struct dl_data_type dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
};

// In a capsule "dltensor"; the consumer renames it "used_dltensor" and then calls deleter (may be NULL) once.
struct dl_managed_tensor {
    struct dl_tensor tensor;
    void *manager_ctx;
    void (*deleter)(struct dl_managed_tensor *self);
};

// In a capsule "dltensor_versioned", renamed "used_dltensor_versioned".
struct dl_managed_tensor_versioned {
    struct dl_version version;
    void *manager_ctx;
    void (*deleter)(struct dl_managed_tensor_versioned *self);
    uint64_t flags;
    struct dl_tensor tensor;
};

struct dl_exchange_api_header {
    struct dl_version version;
    struct dl_exchange_api_header *prev_api; // an older major version of the same table, or NULL
};

// type.__dlpack_c_exchange_api__, a capsule "dlpack_exchange_api" around this, which lives as long as the
// process. Functions return 0, or -1 with a Python error set. Only the fields up to the one we call are
// described by use.
struct dl_exchange_api {
    struct dl_exchange_api_header header;
    int (*managed_tensor_allocator)(struct dl_tensor *prototype, struct dl_managed_tensor_versioned **out,
                                    void *error_ctx,
                                    void (*set_error)(void *error_ctx, const char *kind,
                                                      const char *message));
    int (*managed_tensor_from_py_object_no_sync)(void *object, struct dl_managed_tensor_versioned **out);
    int (*managed_tensor_to_py_object_no_sync)(struct dl_managed_tensor_versioned *tensor, void **out);
    // May be NULL. Fills *out with pointers into the object; they are good until Python runs again.
    int (*dltensor_from_py_object_no_sync)(void *object, struct dl_tensor *out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
};

SL_STATIC_ASSERT(sizeof(void *) == 8, "the layouts below are those of 64-bit platforms");
SL_STATIC_ASSERT(sizeof(struct dl_tensor) == 48, "DLTensor");
SL_STATIC_ASSERT(offsetof(struct dl_tensor, n_dim) == 16, "DLTensor.ndim");
SL_STATIC_ASSERT(offsetof(struct dl_tensor, dtype) == 20, "DLTensor.dtype");
SL_STATIC_ASSERT(offsetof(struct dl_tensor, shape) == 24, "DLTensor.shape");
SL_STATIC_ASSERT(offsetof(struct dl_tensor, byte_offset) == 40, "DLTensor.byte_offset");
SL_STATIC_ASSERT(sizeof(struct dl_managed_tensor) == 64, "DLManagedTensor");
SL_STATIC_ASSERT(sizeof(struct dl_managed_tensor_versioned) == 80, "DLManagedTensorVersioned");
SL_STATIC_ASSERT(offsetof(struct dl_managed_tensor_versioned, tensor) == 32,
                 "DLManagedTensorVersioned.dl_tensor");
SL_STATIC_ASSERT(sizeof(struct dl_exchange_api_header) == 16, "DLPackExchangeAPIHeader");
SL_STATIC_ASSERT(offsetof(struct dl_exchange_api, dltensor_from_py_object_no_sync) == 40,
                 "DLPackExchangeAPI");

#endif
