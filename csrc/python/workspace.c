#include "workspace.h"

enum { STACK_WORKSPACE = 65536 };

void *sl_allocate_workspace(struct sl_call *call, PyObject *allocate, int64_t n_byte, PyObject **owner,
                            struct sl_hold *hold) {
    struct sl_tensor tensor;
    *owner = PyObject_CallFunction(allocate, "L", (long long)n_byte);
    if (!*owner || sl_borrow(call, *owner, "allocate", &tensor, hold) < 0) {
        return NULL;
    }
    const bool dense = tensor.n_dim == 1 && (tensor.shape[0] == 1 || tensor.stride[0] == 1);
    if (tensor.device_type != call->device_type || tensor.device_id != call->device_id) {
        PyErr_Format(PyExc_ValueError,
                     "allocate: expected scratch memory on the arrays' DLPack device %d:%d, got %d:%d",
                     (int)call->device_type, (int)call->device_id, (int)tensor.device_type,
                     (int)tensor.device_id);
        return NULL;
    }
    if (!dense || tensor.dtype != SL_U8 || tensor.shape[0] < n_byte || tensor.read_only || !tensor.data) {
        PyErr_Format(PyExc_ValueError,
                     "allocate: expected %lld writable contiguous uint8 in one dimension, got %R",
                     (long long)n_byte, *owner);
        return NULL;
    }
    return tensor.data;
}

int sl_run(struct sl_call *call, const struct sl_operation *operation, void *args, int n_thread,
           PyObject *allocate) {
    *(void **)((char *)args + operation->stream) = call->stream;
    struct sl_error err;
    enum sl_status status = operation->check(args, &err);
    if (status != SL_OK) {
        sl_raise(status, &err);
        return -1;
    }
    // Small calls are bound by overhead: their scratch memory is not worth a Python call.
    _Alignas(64) char small[STACK_WORKSPACE];
    const bool on_host = call->device_type == SL_DEVICE_CPU;
    void *workspace = on_host ? small : NULL;
    bool ready = true;
    PyObject *owner = NULL;
    struct sl_hold hold = {0};
    const int64_t n_byte = operation->workspace(args, n_thread);
    if (n_byte > (on_host ? STACK_WORKSPACE : 0)) {
        workspace = sl_allocate_workspace(call, allocate, n_byte, &owner, &hold);
        ready = workspace != NULL;
    }
    int rc = -1;
    if (ready) {
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
