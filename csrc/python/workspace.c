#include "workspace.h"

void *sl_allocate_workspace(struct sl_state *state, PyObject *allocate, int64_t n_byte, PyObject **owner,
                            struct sl_hold *hold) {
    struct sl_tensor tensor;
    *owner = PyObject_CallFunction(allocate, "L", (long long)n_byte);
    if (!*owner || sl_borrow(state, *owner, "allocate", &tensor, hold) < 0) {
        return NULL;
    }
    const bool dense = tensor.n_dim == 1 && (tensor.shape[0] == 1 || tensor.stride[0] == 1);
    if (!dense || tensor.dtype != SL_U8 || tensor.device_type != SL_DEVICE_CPU || tensor.shape[0] < n_byte ||
        tensor.read_only || !tensor.data) {
        PyErr_Format(PyExc_ValueError,
                     "allocate: expected %lld writable contiguous uint8 in one dimension, got %R",
                     (long long)n_byte, *owner);
        return NULL;
    }
    return tensor.data;
}
