// sinklora._C: multi-phase initialisation, all state in the module.
#include "borrow.h"
#include "module.h"

struct sl_state *sl_state_of(PyObject *module) {
    return PyModule_GetState(module);
}

static int module_exec(PyObject *module) {
    if (sl_numpy_import() < 0) {
        return -1;
    }
    sl_cpu_init(sl_state_of(module));
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    struct sl_state *state = sl_state_of(module);
    for (int i = 0; state && i < SL_EXCHANGE_CACHE; i++) {
        Py_VISIT(state->exchange_type[i]);
    }
    return 0;
}

static int module_clear(PyObject *module) {
    struct sl_state *state = sl_state_of(module);
    for (int i = 0; state && i < SL_EXCHANGE_CACHE; i++) {
        Py_CLEAR(state->exchange_type[i]);
    }
    return 0;
}

static void module_free(void *module) {
    module_clear(module);
}

// METH_FASTCALL functions take three arguments; the detour over a pointer without any keeps -Wextra quiet.
#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef methods[] = {
    {"attention_forward", FAST(sl_py_attention_forward), METH_FASTCALL,
     "Writes output and lse from query, key, value; see _C.pyi."},
    {"attention_backward", FAST(sl_py_attention_backward), METH_FASTCALL,
     "Writes grad_query, grad_key, grad_value from grad_output and what the forward saved; see _C.pyi."},
    {"check_cu_seqlens", FAST(sl_py_check_cu_seqlens), METH_FASTCALL,
     "ValueError unless cu_seqlens can be the starts of packed sequences of so many tokens."},
    {"causal_forward", FAST(sl_py_causal_forward), METH_FASTCALL,
     "Writes output and lse of plain causal attention, also for fewer queries than keys; see _C.pyi."},
    {"h2o_score", FAST(sl_py_h2o_score), METH_FASTCALL,
     "Writes the column sums of causal attention, per key/value head; see _C.pyi."},
    {"h2o_decode", FAST(sl_py_h2o_decode), METH_FASTCALL,
     "Attention of a few new tokens over a cache, scores and one step of eviction; see _C.pyi."},
    {"h2o_select", FAST(sl_py_h2o_select), METH_FASTCALL,
     "Keeps the recent, the first and the heaviest entries of a cache; see _C.pyi."},
    {"pattern_mask", FAST(sl_py_pattern_mask), METH_FASTCALL,
     "Fills a bool (num_heads, num_tokens, num_tokens) with who may see whom."},
    {"pattern_pairs", FAST(sl_py_pattern_pairs), METH_FASTCALL,
     "Number of allowed (query, key) pairs, summed over heads."},
    {"cpu_levels", sl_py_cpu_levels, METH_NOARGS,
     "Instruction sets that this CPU and build can run, worst first."},
    {"cpu_level", sl_py_cpu_level, METH_NOARGS, "Instruction set in use."},
    {"select_cpu_level", sl_py_select_cpu_level, METH_O,
     "Chooses the instruction set by name; None is the best."},
    {"default_threads", sl_py_default_threads, METH_NOARGS,
     "OMP_NUM_THREADS, else the processors of this process."},
    {"build_info", sl_py_build_info, METH_NOARGS, "What this binary was built with."},
    {"cuda_state", sl_py_cuda_state, METH_NOARGS,
     "The driver and the GPUs; starts the driver where there is one."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_C",
    .m_doc = "The C kernels: functions that fill buffers given to them. Use the functions of sinklora.",
    .m_size = sizeof(struct sl_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__C(void) {
    return PyModuleDef_Init(&definition);
}
