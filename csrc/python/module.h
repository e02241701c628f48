// What the files of this folder share: the module's state, errors, checked arguments and the methods' names.
// The only folder that includes Python.h; the extension is built for the limited API of 3.11.
#ifndef SL_MODULE_H
#define SL_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../core/pattern.h"
#include "../core/status.h"
#include "dlpack_abi.h"

enum { SL_EXCHANGE_CACHE = 8, SL_MAX_THREADS = 1024 };

// One for each interpreter that imports the module; no Python object lives outside it.
struct sl_state {
    // The exchange tables of the types met so far. Each type is a strong reference, so that no other type can
    // take its address; the oldest entry goes when a ninth type comes.
    PyObject *exchange_type[SL_EXCHANGE_CACHE];
    const struct dl_exchange_api *exchange_api[SL_EXCHANGE_CACHE];
    int exchange_next;
    // SINKLORA_CPU named a level that is not available: every kernel call raises this until one is selected.
    bool cpu_refused;
    struct sl_error cpu_error;
    bool threads_refused; // SINKLORA_THREADS likewise
    struct sl_error threads_error;
};

struct sl_state *sl_state_of(PyObject *module);

// ---- errors.c: each sets a Python exception and returns NULL or -1 ----

// The exception that status.def gives for status, with err's text.
PyObject *sl_raise(enum sl_status status, const struct sl_error *err);

// Reads a checked argument into *out and returns 0. An integer is anything with __index__ but a bool, a
// number anything with __float__ or __index__ but a bool or a string; other kinds are TypeErrors, values that
// do not fit ValueErrors, both naming the argument.
int sl_read_int64(PyObject *object, const char *name, int64_t *out);
int sl_read_double(PyObject *object, const char *name, double *out);
int sl_read_bool(PyObject *object, const char *name, bool *out);
int sl_read_threads(PyObject *object, int *out);

// group_size, shift, num_sink_tokens, shifted_fraction, causal, in this order; validated.
int sl_read_pattern(PyObject *const *args, struct sl_pattern *out);

// TypeError unless n_given == n_wanted.
int sl_check_count(const char *function, Py_ssize_t n_given, Py_ssize_t n_wanted);

// Replaces the pending exception of a producer by a BufferError that names the argument, the old one as its
// cause. Exceptions that are no Exception (KeyboardInterrupt), and MemoryError, stay; without one there is a
// BufferError all the same.
void sl_wrap_producer_error(const char *name);

// ---- methods, each METH_FASTCALL with positional arguments only; signatures in sinklora/_C.pyi ----

PyObject *sl_py_attention_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_check_cu_seqlens(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_causal_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_h2o_score(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_h2o_decode(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_h2o_select(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_pattern_mask(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_pattern_pairs(PyObject *module, PyObject *const *args, Py_ssize_t n_args);
PyObject *sl_py_cpu_levels(PyObject *module, PyObject *unused);
PyObject *sl_py_cpu_level(PyObject *module, PyObject *unused);
PyObject *sl_py_select_cpu_level(PyObject *module, PyObject *name);
PyObject *sl_py_default_threads(PyObject *module, PyObject *unused);
PyObject *sl_py_build_info(PyObject *module, PyObject *unused);
PyObject *sl_py_cuda_state(PyObject *module, PyObject *unused);

// Prepares the threads and selects the level that SINKLORA_CPU names; an unusable name is remembered, not
// raised, so that the module imports.
void sl_cpu_init(struct sl_state *state);

// -1 with ValueError where SINKLORA_CPU named an unusable level and none was selected since.
int sl_cpu_require(const struct sl_state *state);

#endif
