#include "workspace.h"

enum { STACK_WORKSPACE = 65536 };

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

int sl_run(struct sl_state *state, const struct sl_operation *operation, const void *args, int n_thread,
           PyObject *allocate) {
    struct sl_error err;
    enum sl_status status = operation->check(args, &err);
    if (status != SL_OK) {
        sl_raise(status, &err);
        return -1;
    }
    // Small calls are bound by overhead: their scratch memory is not worth a Python call.
    _Alignas(64) char small[STACK_WORKSPACE];
    void *workspace = small;
    PyObject *owner = NULL;
    struct sl_hold hold = {0};
    const int64_t n_byte = operation->workspace(args, n_thread);
    if (n_byte > STACK_WORKSPACE) {
        workspace = sl_allocate_workspace(state, allocate, n_byte, &owner, &hold);
    }
    int rc = -1;
    if (workspace) {
        Py_BEGIN_ALLOW_THREADS;
        status = operation->compute(args, workspace, n_byte, n_thread, &err);
        Py_END_ALLOW_THREADS;
        if (status == SL_OK) {
            rc = 0;
        } else {
            sl_raise(status, &err);
        }
    }
    sl_release(&hold);
    Py_XDECREF(owner);
    return rc;
}

PyObject *sl_finish(struct sl_hold *hold, Py_ssize_t n, int rc) {
    for (Py_ssize_t i = 0; i < n; i++) {
        sl_release(&hold[i]);
    }
    return rc < 0 ? NULL : Py_NewRef(Py_None);
}
