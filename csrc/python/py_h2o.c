// h2o_decode and h2o_select: borrow, check, find scratch memory, compute without the GIL.
#include "workspace.h"

#include "../core/h2o.h"

enum { MAX_TENSORS = 13 };

// One tensor argument: where it stands in the call, and the member it fills.
struct argument {
    const char *name;
    size_t member;
    int place;
    bool optional;
};

#define DECODE(member, place, optional)                                                                      \
    {#member, offsetof(struct sl_h2o_decode_args, member), place, optional}
#define SELECT(member, place) {#member, offsetof(struct sl_h2o_select_args, member), place, false}

static const struct argument decode_arguments[] = {
    DECODE(query, 0, false),    DECODE(key, 1, false),       DECODE(value, 2, false),
    DECODE(output, 3, false),   DECODE(lse, 4, true),        DECODE(padding_mask, 5, true),
    DECODE(scores, 6, true),    DECODE(new_key, 9, true),    DECODE(new_value, 10, true),
    DECODE(new_mask, 11, true), DECODE(positions, 12, true), DECODE(free_slot, 13, true),
    DECODE(rows, 14, true),
};

static const struct argument select_arguments[] = {
    SELECT(key, 0),       SELECT(value, 1),      SELECT(scores, 2),
    SELECT(positions, 3), SELECT(rows, 4),       SELECT(key_out, 5),
    SELECT(value_out, 6), SELECT(scores_out, 7), SELECT(positions_out, 8),
};

// What tells the two apart; op is the operation's own struct of arguments.
struct operation {
    const char *name;
    const struct argument *arguments;
    int n_tensor;
    int n_argument;
    enum sl_status (*check)(const void *op, struct sl_error *err);
    int64_t (*workspace)(const void *op, int n_thread);
    sl_operation *compute;
};

static enum sl_status decode_check(const void *op, struct sl_error *err) {
    return sl_h2o_decode_check(op, err);
}

static int64_t decode_workspace(const void *op, int n_thread) {
    return sl_h2o_decode_workspace(op, n_thread);
}

static enum sl_status decode_compute(const void *op, void *workspace, int64_t n_byte, int n_thread,
                                     struct sl_error *err) {
    return sl_h2o_decode(op, workspace, n_byte, n_thread, err);
}

static enum sl_status select_check(const void *op, struct sl_error *err) {
    return sl_h2o_select_check(op, err);
}

static int64_t select_workspace(const void *op, int n_thread) {
    return sl_h2o_select_workspace(op, n_thread);
}

static enum sl_status select_compute(const void *op, void *workspace, int64_t n_byte, int n_thread,
                                     struct sl_error *err) {
    return sl_h2o_select(op, workspace, n_byte, n_thread, err);
}

#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))

static const struct operation decode = {"h2o_decode", decode_arguments, COUNT(decode_arguments), 19,
                                        decode_check, decode_workspace, decode_compute};
static const struct operation select_slots = {"h2o_select", select_arguments, COUNT(select_arguments), 12,
                                              select_check, select_workspace, select_compute};

static int borrow_all(struct sl_state *state, const struct operation *operation, PyObject *const *args,
                      void *op, struct sl_hold *hold) {
    for (int i = 0; i < operation->n_tensor; i++) {
        const struct argument *argument = &operation->arguments[i];
        PyObject *object = args[argument->place];
        if (object == Py_None) {
            if (!argument->optional) {
                PyErr_Format(PyExc_TypeError, "%s: expected an array, got None", argument->name);
                return -1;
            }
            continue; // op is zeroed, which means absent
        }
        struct sl_tensor *tensor = (struct sl_tensor *)((char *)op + argument->member);
        if (sl_borrow(state, object, argument->name, tensor, &hold[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

// The last two arguments of both are num_threads and allocate.
static PyObject *run(PyObject *module, const struct operation *operation, PyObject *const *args, void *op) {
    struct sl_state *state = sl_state_of(module);
    struct sl_hold hold[MAX_TENSORS] = {{0}};
    struct sl_error err;
    int n_thread, rc = -1;
    if (sl_cpu_require(state) < 0 || sl_read_threads(args[operation->n_argument - 2], &n_thread) < 0 ||
        borrow_all(state, operation, args, op, hold) < 0) {
        goto done;
    }
    const enum sl_status status = operation->check(op, &err);
    if (status != SL_OK) {
        sl_raise(status, &err);
        goto done;
    }
    rc = sl_run(state, operation->compute, op, operation->workspace(op, n_thread), n_thread,
                args[operation->n_argument - 1]);
done:
    for (int i = 0; i < operation->n_tensor; i++) {
        sl_release(&hold[i]);
    }
    return rc < 0 ? NULL : Py_NewRef(Py_None);
}

PyObject *sl_py_h2o_decode(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_h2o_decode_args op = {0};
    if (sl_check_count(decode.name, n_args, decode.n_argument) < 0 ||
        sl_read_int64(args[7], "window", &op.window) < 0 || sl_read_bool(args[8], "mean", &op.mean) < 0 ||
        sl_read_int64(args[15], "num_sinks", &op.n_sink) < 0 ||
        sl_read_double(args[16], "scale", &op.scale) < 0) {
        return NULL;
    }
    return run(module, &decode, args, &op);
}

PyObject *sl_py_h2o_select(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_h2o_select_args op = {0};
    if (sl_check_count(select_slots.name, n_args, select_slots.n_argument) < 0 ||
        sl_read_int64(args[9], "num_sinks", &op.n_sink) < 0) {
        return NULL;
    }
    return run(module, &select_slots, args, &op);
}
