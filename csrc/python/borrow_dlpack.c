// DLPack, both ways: the C exchange table of a type (torch 2.10 and later; some 30 ns a tensor), and the
// Python protocol of __dlpack__ for everyone else.
#include "borrow.h"

#include <string.h>

static int find_dtype(const struct dl_data_type *type, enum sl_dtype *out) {
    static const struct {
        uint8_t code, bits;
    } dl_of[] = {
#define SL_DTYPE(id, name, bytes, dl_code, dl_bits, npy) {dl_code, dl_bits},
#include "../core/dtype.def"
#undef SL_DTYPE
    };
    for (int i = 0; i < SL_DTYPE_COUNT; i++) {
        if (dl_of[i].code == type->code && dl_of[i].bits == type->bits && type->lanes == 1) {
            *out = (enum sl_dtype)i;
            return 0;
        }
    }
    return -1;
}

// Copies what *dl says into *out; shape and strides are not referred to afterwards.
static int read_tensor(const struct dl_tensor *dl, const char *name, struct sl_tensor *out) {
    if (find_dtype(&dl->dtype, &out->dtype) < 0) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected float32, bfloat16, float16, bool or an integer dtype, got DLPack type "
                     "code %d of %d bits",
                     name, (int)dl->dtype.code, (int)dl->dtype.bits);
        return -1;
    }
    if (dl->n_dim < 1 || dl->n_dim > SL_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: expected 1 to %d dimensions, got %d", name, SL_MAX_DIMS,
                     (int)dl->n_dim);
        return -1;
    }
    out->n_dim = dl->n_dim;
    int64_t dense = 1;
    for (int32_t i = dl->n_dim - 1; i >= 0; i--) {
        out->shape[i] = dl->shape[i];
        out->stride[i] = dl->strides ? dl->strides[i] : dense;
        dense *= dl->shape[i] > 0 ? dl->shape[i] : 1;
    }
    const int32_t type = dl->device.type;
    const bool host = type == DL_CPU || type == DL_CUDA_HOST || type == DL_ROCM_HOST;
    out->device_type = host ? SL_DEVICE_CPU : type;
    out->device_id = host ? 0 : dl->device.id;
    // A NULL pointer stays one whatever the offset, so that the core can refuse it.
    out->data = dl->data ? (char *)dl->data + dl->byte_offset : NULL;
    return 0;
}

// ---- the C exchange table ----

// The table of this type that we understand, or NULL without an exception.
static const struct dl_exchange_api *find_exchange(PyObject *type) {
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    const struct dl_exchange_api *api = NULL;
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    }
    while (api && api->header.version.major != 1) {
        api = (const struct dl_exchange_api *)api->header.prev_api;
    }
    Py_XDECREF(capsule);
    PyErr_Clear();
    return api && api->dltensor_from_py_object_no_sync ? api : NULL;
}

static const struct dl_exchange_api *cached_exchange(struct sl_state *state, PyObject *type) {
    for (int i = 0; i < SL_EXCHANGE_CACHE; i++) {
        if (state->exchange_type[i] == type) {
            return state->exchange_api[i];
        }
    }
    const struct dl_exchange_api *api = find_exchange(type);
    if (api) {
        const int slot = state->exchange_next;
        PyObject *old = state->exchange_type[slot];
        Py_INCREF(type);
        state->exchange_type[slot] = type;
        state->exchange_api[slot] = api;
        state->exchange_next = (slot + 1) % SL_EXCHANGE_CACHE;
        Py_XDECREF(old);
    }
    return api;
}

int sl_borrow_exchange(struct sl_state *state, PyObject *object, const char *name, struct sl_tensor *out) {
    const struct dl_exchange_api *api = cached_exchange(state, (PyObject *)Py_TYPE(object));
    if (!api) {
        return 1;
    }
    struct dl_tensor dl = {0};
    if (api->dltensor_from_py_object_no_sync(object, &dl) != 0) {
        sl_wrap_producer_error(name);
        return -1;
    }
    return read_tensor(&dl, name, out);
}

// ---- __dlpack__ ----

// -1 with an exception unless the object says that its memory is the CPU's.
static int check_device(PyObject *object, const char *name) {
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    long type = -1;
    if (device && PyTuple_Check(device) && PyTuple_Size(device) == 2) {
        type = PyLong_AsLong(PyTuple_GetItem(device, 0));
    }
    Py_XDECREF(device);
    if (PyErr_Occurred()) {
        sl_wrap_producer_error(name);
        return -1;
    }
    if (type != DL_CPU && type != DL_CUDA_HOST && type != DL_ROCM_HOST) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s: this build computes on CPU memory only, got DLPack device type %ld", name, type);
        return -1;
    }
    return 0;
}

// A new reference to the object's capsule: a versioned one where the producer knows how, else what it has.
static PyObject *take_capsule(PyObject *object, const char *name) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    PyObject *none = PyTuple_New(0);
    PyObject *version = Py_BuildValue("{s(ii)}", "max_version", 1, 3);
    PyObject *capsule = NULL;
    if (method && none && version) {
        capsule = PyObject_Call(method, none, version);
        if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear(); // producers older than DLPack 1.0 do not know the keyword
            capsule = PyObject_Call(method, none, NULL);
        }
    }
    Py_XDECREF(version);
    Py_XDECREF(none);
    Py_XDECREF(method);
    if (!capsule) {
        sl_wrap_producer_error(name);
    }
    return capsule;
}

// Moves the managed tensor out of the capsule into *hold; from the renaming on, the deleter is ours to call.
static int open_capsule(PyObject *capsule, const char *name, struct sl_tensor *out, struct sl_hold *hold) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        hold->versioned = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) {
            hold->versioned = NULL;
            return -1;
        }
        if (hold->versioned->version.major != 1) {
            PyErr_Format(PyExc_BufferError, "%s: expected DLPack version 1, got %u", name,
                         (unsigned)hold->versioned->version.major);
            return -1;
        }
        out->read_only = (hold->versioned->flags & DL_FLAG_READ_ONLY) != 0;
        return read_tensor(&hold->versioned->tensor, name, out);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        hold->legacy = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0) {
            hold->legacy = NULL;
            return -1;
        }
        // It cannot say whether it may be written to, so nobody writes to it.
        out->read_only = true;
        return read_tensor(&hold->legacy->tensor, name, out);
    }
    PyErr_Format(PyExc_BufferError, "%s: expected an unused DLPack capsule from __dlpack__, got %R", name,
                 capsule);
    return -1;
}

int sl_borrow_capsule(PyObject *object, const char *name, struct sl_tensor *out, struct sl_hold *hold) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    if (!PyObject_HasAttrString(type, "__dlpack__") || !PyObject_HasAttrString(type, "__dlpack_device__")) {
        return 1;
    }
    if (check_device(object, name) < 0) {
        return -1;
    }
    PyObject *capsule = take_capsule(object, name);
    if (!capsule) {
        return -1;
    }
    const int rc = open_capsule(capsule, name, out, hold);
    Py_DECREF(capsule);
    return rc;
}
