// DLPack, both ways: the C exchange table of a type (torch 2.10 and later; some 30 ns a tensor), and the
// Python protocol of __dlpack__ for everyone else.
#include "borrow.h"

#ifdef SL_WITH_CUDA
enum { SL_COMPUTE_DEVICE = SL_DEVICE_CUDA };
#define SL_COMPUTES_ON "this build computes on CPU and CUDA memory only"
#else
enum { SL_COMPUTE_DEVICE = SL_DEVICE_CPU };
#define SL_COMPUTES_ON "this build computes on CPU memory only"
#endif

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

static bool is_host(long device_type) {
    return device_type == DL_CPU || device_type == DL_CUDA_HOST || device_type == DL_ROCM_HOST;
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
    const bool host = is_host(type);
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

int sl_borrow_exchange(struct sl_call *call, PyObject *object, const char *name, struct sl_tensor *out) {
    const struct dl_exchange_api *api = cached_exchange(call->state, (PyObject *)Py_TYPE(object));
    if (!api) {
        return 1;
    }
    struct dl_tensor dl = {0};
    if (api->dltensor_from_py_object_no_sync(object, &dl) != 0) {
        sl_wrap_producer_error(name);
        return -1;
    }
    if (read_tensor(&dl, name, out) < 0) {
        return -1;
    }
    return sl_call_begin(call, out->device_type, out->device_id, api, name);
}

// ---- __dlpack__ ----

// Where the object says that its memory is, as sl_tensor has it; -1 with an exception where this build cannot
// compute there.
static int read_device(PyObject *object, const char *name, struct dl_device *out) {
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    long type = -1, id = 0;
    if (device && PyTuple_Check(device) && PyTuple_Size(device) == 2) {
        type = PyLong_AsLong(PyTuple_GetItem(device, 0));
        id = PyErr_Occurred() ? 0 : PyLong_AsLong(PyTuple_GetItem(device, 1));
    }
    Py_XDECREF(device);
    if (PyErr_Occurred()) {
        sl_wrap_producer_error(name);
        return -1;
    }
    const bool host = is_host(type);
    if (!host && type != SL_COMPUTE_DEVICE) {
        PyErr_Format(PyExc_NotImplementedError, "%s: " SL_COMPUTES_ON ", got DLPack device type %ld", name,
                     type);
        return -1;
    }
    *out = (struct dl_device){host ? SL_DEVICE_CPU : (int32_t)type, host ? 0 : (int32_t)id};
    return 0;
}

// The number of the stream that waits for the memory, as the array API standard has it: 1 is CUDA's legacy
// default stream, which its library calls NULL, and -1 asks for no waiting (on another device than the
// call's, which the operation refuses anyway).
static long long stream_number(const struct sl_call *call, const struct dl_device *device) {
    if (device->type != call->device_type || device->id != call->device_id) {
        return -1;
    }
    return call->stream ? (long long)(intptr_t)call->stream : 1;
}

// A new reference to the object's capsule: a versioned one where the producer knows how, else what it has.
static PyObject *take_capsule(const struct sl_call *call, PyObject *object, const struct dl_device *device,
                              const char *name) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    PyObject *none = PyTuple_New(0);
    PyObject *options = PyDict_New(), *version = Py_BuildValue("(ii)", 1, 3), *stream = NULL;
    PyObject *capsule = NULL;
    int rc = method && none && options && version ? 0 : -1;
    if (rc == 0 && device->type == SL_DEVICE_CUDA) { // for the CPU the standard knows no stream
        stream = PyLong_FromLongLong(stream_number(call, device));
        rc = stream ? PyDict_SetItemString(options, "stream", stream) : -1;
    }
    if (rc == 0 && PyDict_SetItemString(options, "max_version", version) == 0) {
        capsule = PyObject_Call(method, none, options);
        if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear(); // producers older than DLPack 1.0 do not know the keyword
            rc = PyDict_DelItemString(options, "max_version");
            capsule = rc == 0 ? PyObject_Call(method, none, options) : NULL;
        }
    }
    Py_XDECREF(stream);
    Py_XDECREF(version);
    Py_XDECREF(options);
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

int sl_borrow_capsule(struct sl_call *call, PyObject *object, const char *name, struct sl_tensor *out,
                      struct sl_hold *hold) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    if (!PyObject_HasAttrString(type, "__dlpack__") || !PyObject_HasAttrString(type, "__dlpack_device__")) {
        return 1;
    }
    struct dl_device device;
    if (read_device(object, name, &device) < 0 ||
        sl_call_begin(call, device.type, device.id, NULL, name) < 0) {
        return -1;
    }
    PyObject *capsule = take_capsule(call, object, &device, name);
    if (!capsule) {
        return -1;
    }
    const int rc = open_capsule(capsule, name, out, hold);
    Py_DECREF(capsule);
    if (rc == 0 && (out->device_type != device.type || out->device_id != device.id)) {
        PyErr_Format(PyExc_BufferError,
                     "%s: expected memory on DLPack device %d:%d, as its __dlpack_device__ says, got %d:%d",
                     name, (int)device.type, (int)device.id, (int)out->device_type, (int)out->device_id);
        return -1;
    }
    return rc;
}
