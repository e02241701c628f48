// h2o_score: column sums of causal attention from queries, keys and the lse of causal_forward.
#include "workspace.h"

#include "../core/h2o.h"

#define ARGUMENT(member, optional) {#member, offsetof(struct sl_h2o_score_args, member), optional}

static const struct sl_argument arguments[] = {
    ARGUMENT(query, false),  ARGUMENT(key, false),         ARGUMENT(lse, false),
    ARGUMENT(scores, false), ARGUMENT(padding_mask, true),
};

enum { N_TENSOR = sizeof arguments / sizeof *arguments, N_SETTINGS = 5 };

SL_OPERATION(h2o_score, sl_h2o_score_args);

PyObject *sl_py_h2o_score(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_state *state = sl_state_of(module);
    if (sl_check_count("h2o_score", n_args, N_TENSOR + N_SETTINGS) < 0 || sl_cpu_require(state) < 0) {
        return NULL;
    }
    struct sl_h2o_score_args op = {0};
    struct sl_call call = {.state = state};
    struct sl_hold hold[N_TENSOR] = {{0}};
    PyObject *const *settings = args + N_TENSOR;
    int n_thread, rc = -1;
    if (sl_read_int64(settings[0], "window", &op.window) == 0 &&
        sl_read_bool(settings[1], "mean", &op.mean) == 0 &&
        sl_read_double(settings[2], "scale", &op.scale) == 0 &&
        sl_read_threads(settings[3], &n_thread) == 0 &&
        sl_borrow_arguments(&call, arguments, N_TENSOR, args, &op, hold) == 0) {
        rc = sl_run(&call, &h2o_score, &op, n_thread, settings[4]);
    }
    return sl_finish(hold, N_TENSOR, rc);
}
