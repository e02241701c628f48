// attention_forward and attention_backward: borrow, check, find scratch memory, compute without the GIL.
#include "workspace.h"

#include "../core/attention.h"

enum { MAX_TENSORS = 12, N_SETTINGS = 8 };

#define ARGUMENT(member) {#member, offsetof(struct sl_attention_args, member), false}
#define OPTIONAL(member) {#member, offsetof(struct sl_attention_args, member), true}

static const struct sl_argument forward_arguments[] = {
    ARGUMENT(query), ARGUMENT(key),        ARGUMENT(value),        ARGUMENT(output),
    ARGUMENT(lse),   OPTIONAL(cu_seqlens), OPTIONAL(padding_mask), OPTIONAL(position_ids),
};

static const struct sl_argument backward_arguments[] = {
    ARGUMENT(grad_output), ARGUMENT(query),      ARGUMENT(key),          ARGUMENT(value),
    ARGUMENT(output),      ARGUMENT(lse),        ARGUMENT(grad_query),   ARGUMENT(grad_key),
    ARGUMENT(grad_value),  OPTIONAL(cu_seqlens), OPTIONAL(padding_mask), OPTIONAL(position_ids),
};

SL_OPERATION(attention_forward, sl_attention_args);
SL_OPERATION(attention_backward, sl_attention_args);

// What tells the two directions apart.
struct direction {
    const char *name;
    const struct sl_argument *arguments;
    Py_ssize_t n_tensor;
    const struct sl_operation *operation;
};

static const struct direction forward = {"attention_forward", forward_arguments,
                                         sizeof forward_arguments / sizeof *forward_arguments,
                                         &attention_forward};
static const struct direction backward = {"attention_backward", backward_arguments,
                                          sizeof backward_arguments / sizeof *backward_arguments,
                                          &attention_backward};

static PyObject *run(PyObject *module, const struct direction *direction, PyObject *const *args,
                     Py_ssize_t n_args) {
    struct sl_state *state = sl_state_of(module);
    if (sl_check_count(direction->name, n_args, direction->n_tensor + N_SETTINGS) < 0 ||
        sl_cpu_require(state) < 0) {
        return NULL;
    }
    struct sl_attention_args op = {0};
    struct sl_call call = {.state = state};
    struct sl_hold hold[MAX_TENSORS] = {{0}};
    PyObject *const *settings = args + direction->n_tensor;
    int n_thread, rc = -1;
    if (sl_read_pattern(settings, &op.pattern) == 0 && sl_read_double(settings[5], "scale", &op.scale) == 0 &&
        sl_read_threads(settings[6], &n_thread) == 0 &&
        sl_borrow_arguments(&call, direction->arguments, direction->n_tensor, args, &op, hold) == 0) {
        rc = sl_run(&call, direction->operation, &op, n_thread, settings[7]);
    }
    return sl_finish(hold, direction->n_tensor, rc);
}

PyObject *sl_py_attention_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    return run(module, &forward, args, n_args);
}

PyObject *sl_py_attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    return run(module, &backward, args, n_args);
}

PyObject *sl_py_check_cu_seqlens(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_call call = {.state = sl_state_of(module)};
    struct sl_tensor cu_seqlens;
    struct sl_hold hold[1];
    int64_t n_token;
    if (sl_check_count("check_cu_seqlens", n_args, 2) < 0 ||
        sl_read_int64(args[1], "num_tokens", &n_token) < 0 ||
        sl_borrow(&call, args[0], "cu_seqlens", &cu_seqlens, &hold[0]) < 0) {
        return NULL;
    }
    struct sl_error err;
    const enum sl_status status = sl_cu_seqlens_check(&cu_seqlens, n_token, &err);
    if (status != SL_OK) {
        sl_raise(status, &err);
    }
    return sl_finish(hold, 1, status == SL_OK ? 0 : -1);
}
