// h2o_score: column sums of causal attention from queries, keys and the lse of causal_forward.
#include "workspace.h"

#include "../core/h2o.h"

#define ARGUMENT(member, optional) {#member, offsetof(struct sl_h2o_score_args, member), optional}

static const struct sl_argument arguments[] = {
    ARGUMENT(query, false),  ARGUMENT(key, false),         ARGUMENT(lse, false),
    ARGUMENT(scores, false), ARGUMENT(padding_mask, true),
};

enum { N_TENSOR = sizeof arguments / sizeof *arguments, N_SETTINGS = 5 };

static enum sl_status compute(const void *args, void *workspace, int64_t n_byte, int n_thread,
                              struct sl_error *err) {
    return sl_h2o_score(args, workspace, n_byte, n_thread, err);
}

PyObject *sl_py_h2o_score(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_state *state = sl_state_of(module);
    if (sl_check_count("h2o_score", n_args, N_TENSOR + N_SETTINGS) < 0 || sl_cpu_require(state) < 0) {
        return NULL;
    }
    struct sl_h2o_score_args op = {0};
    struct sl_hold hold[N_TENSOR] = {{0}};
    PyObject *const *settings = args + N_TENSOR;
    int n_thread;
    struct sl_error err;
    int rc = -1;
    if (sl_read_int64(settings[0], "window", &op.window) < 0 ||
        sl_read_bool(settings[1], "mean", &op.mean) < 0 ||
        sl_read_double(settings[2], "scale", &op.scale) < 0 || sl_read_threads(settings[3], &n_thread) < 0 ||
        sl_borrow_arguments(state, arguments, N_TENSOR, args, &op, hold) < 0) {
        goto done;
    }
    const enum sl_status status = sl_h2o_score_check(&op, &err);
    if (status != SL_OK) {
        sl_raise(status, &err);
        goto done;
    }
    rc = sl_run(state, compute, &op, sl_h2o_score_workspace(&op, n_thread), n_thread, settings[4]);
done:
    for (Py_ssize_t i = 0; i < N_TENSOR; i++) {
        sl_release(&hold[i]);
    }
    return rc < 0 ? NULL : Py_NewRef(Py_None);
}
