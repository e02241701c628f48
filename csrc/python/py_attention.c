// attention_forward and attention_backward: borrow, check, find scratch memory, compute without the GIL.
#include "workspace.h"

#include "../core/attention.h"

enum { MAX_TENSORS = 12, N_OPTIONAL = 3, N_SETTINGS = 8 };

// Positional tensor arguments in order, each with the member it fills.
struct argument {
    const char *name;
    size_t member;
};

#define ARGUMENT(member) {#member, offsetof(struct sl_attention_args, member)}

static const struct argument forward_arguments[] = {
    ARGUMENT(query), ARGUMENT(key),        ARGUMENT(value),        ARGUMENT(output),
    ARGUMENT(lse),   ARGUMENT(cu_seqlens), ARGUMENT(padding_mask), ARGUMENT(position_ids),
};

static const struct argument backward_arguments[] = {
    ARGUMENT(grad_output), ARGUMENT(query),      ARGUMENT(key),          ARGUMENT(value),
    ARGUMENT(output),      ARGUMENT(lse),        ARGUMENT(grad_query),   ARGUMENT(grad_key),
    ARGUMENT(grad_value),  ARGUMENT(cu_seqlens), ARGUMENT(padding_mask), ARGUMENT(position_ids),
};

// What tells the two directions apart.
struct direction {
    const char *name;
    const struct argument *arguments;
    Py_ssize_t n_tensor; // the last N_OPTIONAL of them may be None
    enum sl_status (*check)(const struct sl_attention_args *args, struct sl_error *err);
    int64_t (*workspace)(const struct sl_attention_args *args, int n_thread);
    enum sl_status (*compute)(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                              int n_thread, struct sl_error *err);
};

static const struct direction forward = {"attention_forward",
                                         forward_arguments,
                                         sizeof forward_arguments / sizeof *forward_arguments,
                                         sl_attention_forward_check,
                                         sl_attention_forward_workspace,
                                         sl_attention_forward};
static const struct direction backward = {"attention_backward",
                                          backward_arguments,
                                          sizeof backward_arguments / sizeof *backward_arguments,
                                          sl_attention_backward_check,
                                          sl_attention_backward_workspace,
                                          sl_attention_backward};

static int borrow_all(struct sl_state *state, const struct direction *direction, PyObject *const *args,
                      struct sl_attention_args *out, struct sl_hold *hold) {
    for (Py_ssize_t i = 0; i < direction->n_tensor; i++) {
        const struct argument *argument = &direction->arguments[i];
        struct sl_tensor *tensor = (struct sl_tensor *)((char *)out + argument->member);
        if (args[i] == Py_None && i < direction->n_tensor - N_OPTIONAL) {
            PyErr_Format(PyExc_TypeError, "%s: expected an array, got None", argument->name);
            return -1;
        }
        if (sl_borrow(state, args[i], argument->name, tensor, &hold[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

static int compute(struct sl_state *state, const struct direction *direction,
                   const struct sl_attention_args *args, int n_thread, PyObject *allocate) {
    _Alignas(64) char small[SL_STACK_WORKSPACE];
    void *workspace = small;
    PyObject *owner = NULL;
    struct sl_hold hold = {0};
    const int64_t n_byte = direction->workspace(args, n_thread);
    if (n_byte > SL_STACK_WORKSPACE) {
        workspace = sl_allocate_workspace(state, allocate, n_byte, &owner, &hold);
    }
    int rc = -1;
    if (workspace) {
        enum sl_status status;
        struct sl_error err;
        Py_BEGIN_ALLOW_THREADS;
        status = direction->compute(args, workspace, n_byte, n_thread, &err);
        Py_END_ALLOW_THREADS;
        if (status == SL_OK) {
            rc = 0;
        } else {
            sl_raise(status, &err);
        }
    }
    sl_release(&hold);
    Py_XDECREF(owner);
    return rc;
}

static PyObject *run(PyObject *module, const struct direction *direction, PyObject *const *args,
                     Py_ssize_t n_args) {
    struct sl_state *state = sl_state_of(module);
    if (sl_check_count(direction->name, n_args, direction->n_tensor + N_SETTINGS) < 0 ||
        sl_cpu_require(state) < 0) {
        return NULL;
    }
    struct sl_attention_args op = {0};
    struct sl_hold hold[MAX_TENSORS] = {{0}};
    PyObject *const *settings = args + direction->n_tensor;
    int n_thread;
    struct sl_error err;
    int rc = -1;
    if (sl_read_pattern(settings, &op.pattern) < 0 || sl_read_double(settings[5], "scale", &op.scale) < 0 ||
        sl_read_threads(settings[6], &n_thread) < 0 || borrow_all(state, direction, args, &op, hold) < 0) {
        goto done;
    }
    const enum sl_status status = direction->check(&op, &err);
    if (status != SL_OK) {
        sl_raise(status, &err);
        goto done;
    }
    rc = compute(state, direction, &op, n_thread, settings[7]);
done:
    for (Py_ssize_t i = 0; i < direction->n_tensor; i++) {
        sl_release(&hold[i]);
    }
    return rc < 0 ? NULL : Py_NewRef(Py_None);
}

PyObject *sl_py_attention_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    return run(module, &forward, args, n_args);
}

PyObject *sl_py_attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    return run(module, &backward, args, n_args);
}
