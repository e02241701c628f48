// Exceptions and checked arguments.
#include "module.h"

#include "../core/pattern_check.h"

static PyObject *exception_of(enum sl_status status) {
    switch (status) {
#define SL_STATUS(name, exception)                                                                           \
    case SL_##name:                                                                                          \
        return exception;
#include "../core/status.def"
#undef SL_STATUS
    }
    return NULL;
}

PyObject *sl_raise(enum sl_status status, const struct sl_error *err) {
    PyObject *exception = exception_of(status);
    PyErr_SetString(exception ? exception : PyExc_SystemError, err->text);
    return NULL;
}

static int raise_kind(const char *name, const char *expected, PyObject *got) {
    PyErr_Format(PyExc_TypeError, "%s: expected %s, got %R", name, expected, (PyObject *)Py_TYPE(got));
    return -1;
}

int sl_read_int64(PyObject *object, const char *name, int64_t *out) {
    // A bool has __index__ too; taking True for 1 would hide a swapped argument.
    PyObject *index = PyBool_Check(object) ? NULL : PyNumber_Index(object);
    if (!index) {
        PyErr_Clear();
        return raise_kind(name, "an integer", object);
    }
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(index, &overflow);
    if (overflow) {
        PyErr_Format(PyExc_ValueError, "%s: expected an integer that fits 64 bits, got %S", name, index);
    }
    Py_DECREF(index);
    if (PyErr_Occurred()) {
        return -1;
    }
    *out = number;
    return 0;
}

int sl_read_double(PyObject *object, const char *name, double *out) {
    if (PyBool_Check(object) || PyUnicode_Check(object)) {
        return raise_kind(name, "a number", object);
    }
    *out = PyFloat_AsDouble(object);
    if (*out == -1.0 && PyErr_Occurred()) {
        const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
        PyErr_Clear();
        if (!too_large) {
            return raise_kind(name, "a number", object);
        }
        PyErr_Format(PyExc_ValueError, "%s: expected a number that fits a double, got one that does not",
                     name);
        return -1;
    }
    return 0;
}

int sl_read_bool(PyObject *object, const char *name, bool *out) {
    if (!PyBool_Check(object)) {
        return raise_kind(name, "a bool", object);
    }
    *out = object == Py_True;
    return 0;
}

int sl_read_threads(PyObject *object, int *out) {
    int64_t number;
    if (sl_read_int64(object, "num_threads", &number) < 0) {
        return -1;
    }
    if (number < 1 || number > SL_MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "num_threads: expected an integer from 1 to %d, got %lld",
                     SL_MAX_THREADS, (long long)number);
        return -1;
    }
    *out = (int)number;
    return 0;
}

int sl_read_pattern(PyObject *const *args, struct sl_pattern *out) {
    if (sl_read_int64(args[0], "group_size", &out->group_size) < 0 ||
        sl_read_int64(args[1], "shift", &out->shift) < 0 ||
        sl_read_int64(args[2], "num_sink_tokens", &out->n_sink) < 0 ||
        sl_read_double(args[3], "shifted_fraction", &out->shifted_fraction) < 0 ||
        sl_read_bool(args[4], "causal", &out->causal) < 0) {
        return -1;
    }
    struct sl_error err;
    const enum sl_status status = sl_pattern_check(out, &err);
    if (status != SL_OK) {
        sl_raise(status, &err);
        return -1;
    }
    // Groups beyond any sequence all mean the same; the pattern's sums of two of them must not overflow.
    const int64_t most = INT64_MAX / 8;
    out->group_size = sl_min(out->group_size, most);
    out->shift = sl_min(out->shift, most);
    return 0;
}

int sl_check_count(const char *function, Py_ssize_t n_given, Py_ssize_t n_wanted) {
    if (n_given != n_wanted) {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd positional arguments, got %zd", function, n_wanted,
                     n_given);
        return -1;
    }
    return 0;
}

void sl_wrap_producer_error(const char *name) {
    if (!PyErr_Occurred()) { // it broke its own rules
        PyErr_Format(PyExc_BufferError, "%s: its memory could not be exchanged", name);
        return;
    }
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) {
        return;
    }
    PyObject *type, *cause, *traceback;
    PyErr_Fetch(&type, &cause, &traceback);
    PyErr_NormalizeException(&type, &cause, &traceback);
    if (traceback) {
        PyException_SetTraceback(cause, traceback);
    }
    PyErr_Format(PyExc_BufferError, "%s: its memory could not be exchanged: %S", name, cause);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    PyObject *wrapped;
    PyErr_Fetch(&type, &wrapped, &traceback);
    PyErr_NormalizeException(&type, &wrapped, &traceback);
    PyException_SetCause(wrapped, cause); // takes the reference
    PyErr_Restore(type, wrapped, traceback);
}
