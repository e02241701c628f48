// What this binary was built with, and which GPUs are there.
#include "module.h"

#include "../core/attention.h"
#ifdef SL_WITH_CUDA
#include "../cuda/device.h"
#endif

// setup.py says why there is no CUDA; other builds do not ask for it.
#ifndef SL_CUDA_ABSENT
#define SL_CUDA_ABSENT "it was not asked for"
#endif

PyObject *sl_py_build_info(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    const char *compiler = "gcc " __VERSION__;
#else
    const char *compiler = "unknown";
#endif
#ifdef SL_WITH_CUDA
    const char *archs = SL_CUDA_ARCHS, *toolkit = SL_CUDA_TOOLKIT, *absent = NULL;
    PyObject *cuda = Py_True;
#else
    const char *archs = "", *toolkit = NULL, *absent = SL_CUDA_ABSENT;
    PyObject *cuda = Py_False;
#endif
    return Py_BuildValue("{sssOsssssssisi}", "compiler", compiler, "cuda", cuda, "cuda_archs", archs,
                         "cuda_toolkit", toolkit, "cuda_absent", absent, "max_head_dim", (int)SL_MAX_HEAD_DIM,
                         "max_threads", (int)SL_MAX_THREADS);
}

#ifdef SL_WITH_CUDA
// ((name, (major, minor)), ...) of n devices, or NULL with a RuntimeError.
static PyObject *list_devices(int n) {
    PyObject *devices = PyTuple_New(n);
    for (int i = 0; devices && i < n; i++) {
        struct sl_cuda_device device;
        struct sl_error err;
        const enum sl_status status = sl_cuda_device_read(i, &device, &err);
        PyObject *item = status == SL_OK ? Py_BuildValue("(s(ii))", device.name, device.major, device.minor)
                                         : sl_raise(status, &err);
        if (!item || PyTuple_SetItem(devices, i, item) < 0) { // takes the reference
            Py_CLEAR(devices);
        }
    }
    return devices;
}
#endif

PyObject *sl_py_cuda_state(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
#ifdef SL_WITH_CUDA
    int n = 0;
    struct sl_error err = {""};
    const int version = sl_cuda_driver_version();
    const enum sl_status status = sl_cuda_device_count(&n, &err);
    PyObject *devices = list_devices(n);
    if (!devices) {
        return NULL;
    }
    return Py_BuildValue("{sisNss}", "driver", version, "devices", devices, "problem",
                         status == SL_OK ? NULL : err.text);
#else
    return Py_BuildValue("{sis()ss}", "driver", 0, "devices", "problem",
                         "built without CUDA: " SL_CUDA_ABSENT);
#endif
}
