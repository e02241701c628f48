// NumPy arrays through NumPy's C API: the only file that sees NumPy's headers.
#include "borrow.h"

#include <numpy/arrayobject.h>

int sl_numpy_import(void) {
    return PyArray_ImportNumPyAPI();
}

static int find_dtype(int type_number, enum sl_dtype *out) {
    static const int npy_of[] = {
#define SL_DTYPE(id, name, bytes, dl_code, dl_bits, npy) npy,
#include "../core/dtype.def"
#undef SL_DTYPE
    };
    for (int i = 0; i < SL_DTYPE_COUNT; i++) {
        // long and long long are two type numbers of one int64, so equality is not enough.
        if (npy_of[i] == type_number || (npy_of[i] >= 0 && PyArray_EquivTypenums(npy_of[i], type_number))) {
            *out = (enum sl_dtype)i;
            return 0;
        }
    }
    return -1;
}

int sl_borrow_numpy(PyObject *object, const char *name, struct sl_tensor *out) {
    if (!PyArray_Check(object)) {
        return 1;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (find_dtype(PyArray_TYPE(array), &out->dtype) < 0) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected float32, float16, bool or an integer dtype, got NumPy's %S", name,
                     (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    if (PyArray_ISBYTESWAPPED(array)) {
        PyErr_Format(PyExc_BufferError, "%s: expected native byte order, got %S", name,
                     (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    const int n_dim = PyArray_NDIM(array);
    if (n_dim < 1 || n_dim > SL_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: expected 1 to %d dimensions, got %d", name, SL_MAX_DIMS, n_dim);
        return -1;
    }
    const int64_t size = sl_dtype_size(out->dtype);
    for (int i = 0; i < n_dim; i++) {
        const int64_t bytes = PyArray_STRIDE(array, i);
        out->shape[i] = PyArray_DIM(array, i);
        out->stride[i] = bytes / size;
        if (bytes % size != 0 && out->shape[i] > 1) {
            PyErr_Format(
                PyExc_BufferError,
                "%s: expected strides in whole elements of %lld bytes, got %lld bytes in dimension %d", name,
                (long long)size, (long long)bytes, i);
            return -1;
        }
    }
    out->data = PyArray_DATA(array);
    out->n_dim = n_dim;
    out->device_type = SL_DEVICE_CPU;
    out->read_only = !PyArray_ISWRITEABLE(array);
    return 0;
}
