// h2o_decode and h2o_select: borrow, check, compute.
#include "workspace.h"

#include "../core/h2o.h"

#define COUNT(list) ((Py_ssize_t)(sizeof(list) / sizeof *(list)))
#define DECODE(member, optional) {#member, offsetof(struct sl_h2o_decode_args, member), optional}
#define SELECT(member) {#member, offsetof(struct sl_h2o_select_args, member), false}

// Two settings, window and mean, stand between these and those of a step.
static const struct sl_argument attended[] = {
    DECODE(query, false), DECODE(key, false),         DECODE(value, false), DECODE(output, false),
    DECODE(lse, true),    DECODE(padding_mask, true), DECODE(scores, true),
};
static const struct sl_argument stepped[] = {
    DECODE(new_key, true),   DECODE(new_value, true), DECODE(new_mask, true),
    DECODE(positions, true), DECODE(free_slot, true), DECODE(rows, true),
};
static const struct sl_argument selected[] = {
    SELECT(key),     SELECT(value),     SELECT(scores),     SELECT(positions),     SELECT(rows),
    SELECT(key_out), SELECT(value_out), SELECT(scores_out), SELECT(positions_out),
};

enum { N_ATTENDED = COUNT(attended), N_STEPPED = COUNT(stepped), N_SELECTED = COUNT(selected) };

SL_OPERATION(h2o_decode, sl_h2o_decode_args);
SL_OPERATION(h2o_select, sl_h2o_select_args);

PyObject *sl_py_h2o_decode(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_state *state = sl_state_of(module);
    if (sl_check_count("h2o_decode", n_args, N_ATTENDED + 2 + N_STEPPED + 4) < 0 ||
        sl_cpu_require(state) < 0) {
        return NULL;
    }
    struct sl_h2o_decode_args op = {0};
    struct sl_call call = {.state = state};
    struct sl_hold hold[N_ATTENDED + N_STEPPED] = {{0}};
    PyObject *const *counted = args + N_ATTENDED, *const *step = counted + 2,
                    *const *settings = step + N_STEPPED;
    int n_thread, rc = -1;
    if (sl_read_int64(counted[0], "window", &op.window) == 0 &&
        sl_read_bool(counted[1], "mean", &op.mean) == 0 &&
        sl_read_int64(settings[0], "num_sinks", &op.n_sink) == 0 &&
        sl_read_double(settings[1], "scale", &op.scale) == 0 &&
        sl_read_threads(settings[2], &n_thread) == 0 &&
        sl_borrow_arguments(&call, attended, N_ATTENDED, args, &op, hold) == 0 &&
        sl_borrow_arguments(&call, stepped, N_STEPPED, step, &op, hold + N_ATTENDED) == 0) {
        rc = sl_run(&call, &h2o_decode, &op, n_thread, settings[3]);
    }
    return sl_finish(hold, N_ATTENDED + N_STEPPED, rc);
}

PyObject *sl_py_h2o_select(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_state *state = sl_state_of(module);
    if (sl_check_count("h2o_select", n_args, N_SELECTED + 3) < 0 || sl_cpu_require(state) < 0) {
        return NULL;
    }
    struct sl_h2o_select_args op = {0};
    struct sl_call call = {.state = state};
    struct sl_hold hold[N_SELECTED] = {{0}};
    PyObject *const *settings = args + N_SELECTED;
    int n_thread, rc = -1;
    if (sl_read_int64(settings[0], "num_sinks", &op.n_sink) == 0 &&
        sl_read_threads(settings[1], &n_thread) == 0 &&
        sl_borrow_arguments(&call, selected, N_SELECTED, args, &op, hold) == 0) {
        rc = sl_run(&call, &h2o_select, &op, n_thread, settings[2]);
    }
    return sl_finish(hold, N_SELECTED, rc);
}
