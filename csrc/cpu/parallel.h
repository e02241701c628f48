// Threads for the CPU kernels.
#ifndef SL_CPU_PARALLEL_H
#define SL_CPU_PARALLEL_H

#include "../core/status.h"

// To be called when the library is loaded, before anything can fork: a child whose parent used only another
// library's OpenMP would otherwise join a pool that has no threads there. Reads SINKLORA_THREADS; SL_INVALID
// where it is neither unset nor "openmp" nor "own".
enum sl_status sl_parallel_init(struct sl_error *err) SL_MUST_CHECK;

// Runs work(context, item, worker) once for each item in [0, n_item), items handed out in order, on at most
// n_thread threads of which the caller is one; worker is in [0, n_thread) and no two running calls share it,
// so it indexes scratch memory. Returns when all are done. Any number of threads may call this at once; safe
// in a forked child.
void sl_parallel_for(int64_t n_item, int n_thread, void (*work)(void *context, int64_t item, int worker),
                     void *context);

// The default number of threads: OMP_NUM_THREADS where it is a positive number, else the processors this
// process may run on.
int sl_parallel_default_threads(void);

#endif
