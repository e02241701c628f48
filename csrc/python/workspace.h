// Scratch memory for a call, from the caller's library, and the call itself.
#ifndef SL_WORKSPACE_H
#define SL_WORKSPACE_H

#include "borrow.h"

// n_byte bytes from allocate(n_byte), which must give writable contiguous uint8 on the CPU. *owner is a new
// reference that keeps them and *hold what sl_release must give back; both are to be released also where this
// returns NULL with an exception set.
void *sl_allocate_workspace(struct sl_state *state, PyObject *allocate, int64_t n_byte, PyObject **owner,
                            struct sl_hold *hold);

// An operation on its own struct of arguments, as core/ declares it.
typedef enum sl_status sl_operation(const void *args, void *workspace, int64_t n_byte, int n_thread,
                                    struct sl_error *err);

// Runs the operation without the GIL on n_byte bytes of scratch memory; 0, or -1 with an exception.
int sl_run(struct sl_state *state, sl_operation *operation, const void *args, int64_t n_byte, int n_thread,
           PyObject *allocate);

#endif
