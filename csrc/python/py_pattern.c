// The pattern's definition, for masks, pictures and counts.
#include "borrow.h"

static int check_mask(const struct sl_tensor *t) {
    if (t->dtype != SL_BOOL) {
        PyErr_Format(PyExc_TypeError, "output: expected dtype bool, got %s", sl_dtype_name(t->dtype));
        return -1;
    }
    if (t->n_dim != 3 || t->shape[1] != t->shape[2]) {
        PyErr_SetString(PyExc_ValueError, "output: expected shape (num_heads, num_tokens, num_tokens)");
        return -1;
    }
    if (t->device_type != SL_DEVICE_CPU) {
        PyErr_SetString(PyExc_NotImplementedError, "output: masks are written to CPU memory only");
        return -1;
    }
    if (sl_tensor_count(t) > 0 && (t->read_only || !t->data)) {
        PyErr_SetString(PyExc_BufferError, "output: expected writable memory");
        return -1;
    }
    return 0;
}

static void fill_mask(const struct sl_tensor *t, const struct sl_pattern *pattern) {
    bool *const data = t->data;
    const int64_t n_head = t->shape[0], n_token = t->shape[1];
    const int64_t first_shifted = sl_pattern_first_shifted_head(pattern, n_head);
    for (int64_t h = 0; h < n_head; h++) {
        for (int64_t q = 0; q < n_token; q++) {
            bool *const row = data + h * t->stride[0] + q * t->stride[1];
            for (int64_t k = 0; k < n_token; k++) {
                row[k * t->stride[2]] = sl_pattern_allows(pattern, h >= first_shifted, q, k);
            }
        }
    }
}

PyObject *sl_py_pattern_mask(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_pattern pattern;
    struct sl_tensor tensor;
    struct sl_hold hold;
    struct sl_call call = {.state = sl_state_of(module)};
    if (sl_check_count("pattern_mask", n_args, 6) < 0 || sl_read_pattern(args + 1, &pattern) < 0) {
        return NULL;
    }
    if (args[0] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "output: expected an array, got None");
        return NULL;
    }
    if (sl_borrow(&call, args[0], "output", &tensor, &hold) < 0) {
        return NULL;
    }
    const int rc = check_mask(&tensor);
    if (rc == 0) {
        Py_BEGIN_ALLOW_THREADS;
        fill_mask(&tensor, &pattern);
        Py_END_ALLOW_THREADS;
    }
    sl_release(&hold);
    return rc < 0 ? NULL : Py_NewRef(Py_None);
}

PyObject *sl_py_pattern_pairs(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    (void)module;
    // A causal mask of this many tokens still has fewer than 2^63 pairs, and 2^31 such heads are refused
    // below.
    const int64_t most = (int64_t)1 << 31;
    int64_t n_head, n_token;
    struct sl_pattern pattern;
    if (sl_check_count("pattern_pairs", n_args, 7) < 0 || sl_read_int64(args[0], "num_heads", &n_head) < 0 ||
        sl_read_int64(args[1], "num_tokens", &n_token) < 0 || sl_read_pattern(args + 2, &pattern) < 0) {
        return NULL;
    }
    if (n_head < 0 || n_head > most || n_token < 0 || n_token > most) {
        PyErr_Format(PyExc_ValueError, "%s: expected an integer from 0 to %lld, got %lld",
                     n_head < 0 || n_head > most ? "num_heads" : "num_tokens", (long long)most,
                     (long long)(n_head < 0 || n_head > most ? n_head : n_token));
        return NULL;
    }
    const int64_t n_plain = sl_pattern_first_shifted_head(&pattern, n_head);
    int64_t plain, shifted;
    Py_BEGIN_ALLOW_THREADS;
    plain = n_plain > 0 ? sl_pattern_pairs(&pattern, false, n_token) : 0;
    shifted = n_plain < n_head ? sl_pattern_pairs(&pattern, true, n_token) : 0;
    Py_END_ALLOW_THREADS;
    if (n_head > 0 && sl_max(plain, shifted) > INT64_MAX / n_head) {
        PyErr_SetString(PyExc_ValueError, "num_heads: expected a number of pairs that fits 64 bits");
        return NULL;
    }
    return PyLong_FromLongLong(n_plain * plain + (n_head - n_plain) * shifted);
}
