// Scratch memory for a call, from the caller's library, and the call itself.
#ifndef SL_WORKSPACE_H
#define SL_WORKSPACE_H

#include "borrow.h"

// n_byte bytes from allocate(n_byte), which must give writable contiguous uint8 on the call's device. *owner
// is a new reference that keeps them and *hold what sl_release must give back; both are to be released also
// where this returns NULL with an exception set.
void *sl_allocate_workspace(struct sl_call *call, PyObject *allocate, int64_t n_byte, PyObject **owner,
                            struct sl_hold *hold);

// An operation of core/ on its own struct of arguments.
struct sl_operation {
    enum sl_status (*check)(const void *args, struct sl_error *err);
    int64_t (*workspace)(const void *args, int n_thread);
    enum sl_status (*compute)(const void *args, void *workspace, int64_t n_byte, int n_thread,
                              struct sl_error *err);
    size_t stream; // where in the struct of arguments the stream stands
};

// Defines `stem` as the operation of sl_<stem>_check, sl_<stem>_workspace and sl_<stem> on struct arguments.
#define SL_OPERATION(stem, arguments)                                                                        \
    static enum sl_status stem##_check(const void *args, struct sl_error *err) {                             \
        return sl_##stem##_check(args, err);                                                                 \
    }                                                                                                        \
    static int64_t stem##_workspace(const void *args, int n_thread) {                                        \
        return sl_##stem##_workspace(args, n_thread);                                                        \
    }                                                                                                        \
    static enum sl_status stem##_compute(const void *args, void *workspace, int64_t n_byte, int n_thread,    \
                                         struct sl_error *err) {                                             \
        return sl_##stem(args, workspace, n_byte, n_thread, err);                                            \
    }                                                                                                        \
    static const struct sl_operation stem = {stem##_check, stem##_workspace, stem##_compute,                 \
                                             offsetof(struct arguments, stream)}

// Checks args, whose arrays were borrowed for the call, then runs the operation without the GIL on scratch
// memory from allocate; 0, or -1 with an exception. On CUDA it returns when the work is on the call's stream.
int sl_run(struct sl_call *call, const struct sl_operation *operation, void *args, int n_thread,
           PyObject *allocate);

// Gives back n borrowed arrays: a method's end. None where rc is 0, NULL where it is -1.
PyObject *sl_finish(struct sl_hold *hold, Py_ssize_t n, int rc);

#endif
