// Zero-copy views of the caller's arrays. Three ways in, one struct sl_tensor out; nothing after the
// borrowing knows which way an array came.
#ifndef SL_BORROW_H
#define SL_BORROW_H

#include "module.h" // first: Python.h sets the feature macros of the system headers

#include "../core/tensor.h"

// What must be given back after use: a managed tensor that was taken out of a capsule. All zero means
// nothing.
struct sl_hold {
    struct dl_managed_tensor *legacy;
    struct dl_managed_tensor_versioned *versioned;
};

// What the arrays of one call have in common: the device of the first one, and there the stream to compute
// on. Begins as {.state = ...}.
struct sl_call {
    struct sl_state *state;
    bool begun;          // was an array borrowed yet?
    int32_t device_type; // the first one's, as in sl_tensor
    int32_t device_id;
    void *stream; // CUDA: its library's current stream, the legacy default stream where it tells of none
};

// Fills *out with object's memory and *hold with what sl_release must give back; returns 0, or -1 with an
// exception that names the argument: TypeError for another kind of object or an element type that cannot be
// borrowed, ValueError for a dimension count outside 1..SL_MAX_DIMS, NotImplementedError for a device this
// build lacks, BufferError for memory that cannot be exchanged (byte-swapped, misaligned, refused by its
// owner). None gives an absent tensor. The memory stays the caller's: the object must outlive the use of
// *out, on CUDA until the call's stream has passed it.
//   numpy.ndarray        through the NumPy C API
//   torch.Tensor, ...    through the type's DLPack C exchange table: no capsule, no Python call; the memory
//                        is good on the current stream that the table names
//   anything else        through __dlpack_device__ and __dlpack__, versioned or legacy capsule; on CUDA the
//                        producer makes the call's stream wait for the memory
int sl_borrow(struct sl_call *call, PyObject *object, const char *name, struct sl_tensor *out,
              struct sl_hold *hold);

// One array argument of a method: its name, where in the operation's struct its sl_tensor stands, and whether
// None will do.
struct sl_argument {
    const char *name;
    size_t member;
    bool optional;
};

// Borrows args[i] into the member of each of n arguments, hold[i] likewise; -1 with an exception.
int sl_borrow_arguments(struct sl_call *call, const struct sl_argument *arguments, Py_ssize_t n,
                        PyObject *const *args, void *out, struct sl_hold *hold);

// Calls the owner's deleter once and forgets it. A pending exception is kept.
void sl_release(struct sl_hold *hold);

// Notes the device of the call's first array, and its stream by the exchange table, which may be NULL. Later
// arrays change nothing. -1 with an exception.
int sl_call_begin(struct sl_call *call, int32_t device_type, int32_t device_id,
                  const struct dl_exchange_api *api, const char *name);

// ---- the three ways; sl_borrow chooses. 1 where the object is not of this kind ----

int sl_numpy_import(void);
int sl_borrow_numpy(PyObject *object, const char *name, struct sl_tensor *out);
int sl_borrow_exchange(struct sl_call *call, PyObject *object, const char *name, struct sl_tensor *out);
int sl_borrow_capsule(struct sl_call *call, PyObject *object, const char *name, struct sl_tensor *out,
                      struct sl_hold *hold);

#endif
