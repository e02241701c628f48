#include "borrow.h"

// Sizes that later arithmetic relies on, whoever produced them: no negative size, a count that fits, memory
// aligned to its elements (kernels read whole elements).
static int check_sound(const struct sl_tensor *t, const char *name) {
    int64_t count = 1;
    for (int32_t i = 0; i < t->n_dim; i++) {
        if (t->shape[i] < 0 || (t->shape[i] > 0 && count > INT64_MAX / 8 / t->shape[i])) {
            PyErr_Format(PyExc_BufferError,
                         "%s: expected sizes >= 0 whose product fits 60 bits, got %lld in dimension %d", name,
                         (long long)t->shape[i], (int)i);
            return -1;
        }
        count *= t->shape[i];
    }
    if (count > 0 && (uintptr_t)t->data % (uintptr_t)sl_dtype_size(t->dtype) != 0) {
        PyErr_Format(PyExc_BufferError,
                     "%s: expected memory aligned to its %s elements, got a misaligned address", name,
                     sl_dtype_name(t->dtype));
        return -1;
    }
    return 0;
}

int sl_call_begin(struct sl_call *call, int32_t device_type, int32_t device_id,
                  const struct dl_exchange_api *api, const char *name) {
    if (call->begun) {
        return 0;
    }
    if (device_type == SL_DEVICE_CUDA && api && api->current_work_stream &&
        api->current_work_stream(device_type, device_id, &call->stream) != 0) {
        sl_wrap_producer_error(name);
        return -1;
    }
    call->begun = true;
    call->device_type = device_type;
    call->device_id = device_id;
    return 0;
}

int sl_borrow(struct sl_call *call, PyObject *object, const char *name, struct sl_tensor *out,
              struct sl_hold *hold) {
    *out = (struct sl_tensor){0};
    *hold = (struct sl_hold){0};
    if (object == Py_None) {
        return 0;
    }
    int rc = sl_borrow_exchange(call, object, name, out);
    if (rc > 0) {
        rc = sl_borrow_numpy(object, name, out);
        if (rc == 0) {
            rc = sl_call_begin(call, SL_DEVICE_CPU, 0, NULL, name);
        }
    }
    if (rc > 0) {
        rc = sl_borrow_capsule(call, object, name, out, hold);
    }
    if (rc > 0) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a torch tensor, a NumPy array or another DLPack producer, got %R", name,
                     (PyObject *)Py_TYPE(object));
        rc = -1;
    }
    if (rc == 0) {
        rc = check_sound(out, name);
    }
    if (rc < 0) {
        sl_release(hold);
    }
    return rc;
}

int sl_borrow_arguments(struct sl_call *call, const struct sl_argument *arguments, Py_ssize_t n,
                        PyObject *const *args, void *out, struct sl_hold *hold) {
    for (Py_ssize_t i = 0; i < n; i++) {
        struct sl_tensor *tensor = (struct sl_tensor *)((char *)out + arguments[i].member);
        if (args[i] == Py_None && !arguments[i].optional) {
            PyErr_Format(PyExc_TypeError, "%s: expected an array, got None", arguments[i].name);
            return -1;
        }
        if (sl_borrow(call, args[i], arguments[i].name, tensor, &hold[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

void sl_release(struct sl_hold *hold) {
    if (!hold->legacy && !hold->versioned) {
        return;
    }
    // A deleter may run Python code, which must not run with an exception set.
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (hold->legacy && hold->legacy->deleter) {
        hold->legacy->deleter(hold->legacy);
    }
    if (hold->versioned && hold->versioned->deleter) {
        hold->versioned->deleter(hold->versioned);
    }
    *hold = (struct sl_hold){0};
    PyErr_Restore(type, value, traceback);
}
