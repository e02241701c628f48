// Scratch memory for a call, from the caller's library.
#ifndef SL_WORKSPACE_H
#define SL_WORKSPACE_H

#include "borrow.h"

// Small calls are bound by overhead: up to this many bytes an operation uses the stack, which is not worth a
// Python call.
enum { SL_STACK_WORKSPACE = 65536 };

// n_byte bytes from allocate(n_byte), which must give writable contiguous uint8 on the CPU. *owner is a new
// reference that keeps them and *hold what sl_release must give back; both are to be released also where this
// returns NULL with an exception set.
void *sl_allocate_workspace(struct sl_state *state, PyObject *allocate, int64_t n_byte, PyObject **owner,
                            struct sl_hold *hold);

#endif
