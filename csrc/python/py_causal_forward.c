// causal_forward: plain causal attention of a prompt, or of its last part over all keys so far.
#include "workspace.h"

#include "../core/attention.h"

#define ARGUMENT(member, optional) {#member, offsetof(struct sl_attention_args, member), optional}

static const struct sl_argument arguments[] = {
    ARGUMENT(query, false), ARGUMENT(key, false), ARGUMENT(value, true),
    ARGUMENT(output, true), ARGUMENT(lse, false), ARGUMENT(padding_mask, true),
};

enum { N_TENSOR = sizeof arguments / sizeof *arguments, N_SETTINGS = 3 };

SL_OPERATION(attention_forward, sl_attention_args);

PyObject *sl_py_causal_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    struct sl_state *state = sl_state_of(module);
    if (sl_check_count("causal_forward", n_args, N_TENSOR + N_SETTINGS) < 0 || sl_cpu_require(state) < 0) {
        return NULL;
    }
    struct sl_attention_args op = {0};
    struct sl_call call = {.state = state};
    struct sl_hold hold[N_TENSOR] = {{0}};
    PyObject *const *settings = args + N_TENSOR;
    int n_thread, rc = -1;
    if (sl_read_double(settings[0], "scale", &op.scale) == 0 &&
        sl_read_threads(settings[1], &n_thread) == 0 &&
        sl_borrow_arguments(&call, arguments, N_TENSOR, args, &op, hold) == 0) {
        // One group, as long as any sequence; the check sees to shapes of other than four dimensions.
        op.pattern = (struct sl_pattern){.group_size = INT64_MAX / 4, .causal = true};
        op.n_past = op.key.shape[2] - op.query.shape[2];
        rc = sl_run(&call, &attention_forward, &op, n_thread, settings[2]);
    }
    return sl_finish(hold, N_TENSOR, rc);
}
