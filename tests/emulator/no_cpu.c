// The emulated library computes on "CUDA" tensors only: these stand in for the CPU's operations, which core/
// names.
#include "../../csrc/core/attention.h"
#include "../../csrc/core/h2o.h"

#define NO_CPU(op, args)                                                                                     \
    int64_t sl_cpu_##op##_workspace(const struct args *a, int n_thread) {                                    \
        (void)a;                                                                                             \
        (void)n_thread;                                                                                      \
        return 0;                                                                                            \
    }                                                                                                        \
    enum sl_status sl_cpu_##op(const struct args *a, void *workspace, int64_t n_byte, int n_thread,          \
                               struct sl_error *err) {                                                       \
        (void)a;                                                                                             \
        (void)workspace;                                                                                     \
        (void)n_byte;                                                                                        \
        (void)n_thread;                                                                                      \
        return sl_error_set(err, SL_UNSUPPORTED, "query: expected CUDA memory, got the CPU's");              \
    }

NO_CPU(attention_forward, sl_attention_args)
NO_CPU(attention_backward, sl_attention_args)
NO_CPU(h2o_score, sl_h2o_score_args)
NO_CPU(h2o_decode, sl_h2o_decode_args)
NO_CPU(h2o_select, sl_h2o_select_args)
