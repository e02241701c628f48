// Which instruction set and how many threads.
#include "module.h"

#include "../cpu/detect.h"
#include "../cpu/parallel.h"

#include <stdlib.h>

void sl_cpu_init(struct sl_state *state) {
    state->threads_refused = sl_parallel_init(&state->threads_error) != SL_OK;
    const char *name = getenv("SINKLORA_CPU");
    state->cpu_refused = sl_cpu_level_select(name, &state->cpu_error) != SL_OK;
}

int sl_cpu_require(const struct sl_state *state) {
    if (state->threads_refused) {
        sl_raise(SL_INVALID, &state->threads_error);
        return -1;
    }
    if (state->cpu_refused) {
        sl_raise(SL_INVALID, &state->cpu_error);
        return -1;
    }
    return 0;
}

PyObject *sl_py_cpu_levels(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < SL_CPU_LEVEL_COUNT; i++) {
        if (!sl_cpu_level_available((enum sl_cpu_level)i)) {
            continue;
        }
        PyObject *name = PyUnicode_FromString(sl_cpu_level_name((enum sl_cpu_level)i));
        if (!name || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    PyObject *tuple = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

PyObject *sl_py_cpu_level(PyObject *module, PyObject *unused) {
    (void)unused;
    if (sl_cpu_require(sl_state_of(module)) < 0) {
        return NULL;
    }
    return PyUnicode_FromString(sl_cpu_level_name(sl_cpu_level_active()));
}

PyObject *sl_py_select_cpu_level(PyObject *module, PyObject *name) {
    struct sl_state *state = sl_state_of(module);
    struct sl_error err;
    PyObject *bytes = NULL;
    const char *text = NULL;
    if (name != Py_None) {
        if (!PyUnicode_Check(name)) {
            return PyErr_Format(PyExc_TypeError, "name: expected a str or None, got %R",
                                (PyObject *)Py_TYPE(name));
        }
        bytes = PyUnicode_AsUTF8String(name);
        text = bytes ? PyBytes_AsString(bytes) : NULL;
        if (!text) {
            Py_XDECREF(bytes);
            return NULL;
        }
    }
    const enum sl_status status = sl_cpu_level_select(text, &err);
    Py_XDECREF(bytes);
    if (status != SL_OK) {
        return sl_raise(status, &err);
    }
    state->cpu_refused = false;
    return Py_NewRef(Py_None);
}

PyObject *sl_py_default_threads(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyLong_FromLong(sl_parallel_default_threads());
}
