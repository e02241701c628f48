#include "parallel.h"
void sl_parallel_for(int64_t n_item, int n_thread, void (*work)(void *, int64_t, int), void *context) {
    (void)n_thread;
    for (int64_t i = 0; i < n_item; i++) { work(context, i, 0); }
}
int sl_parallel_default_threads(void) { return 2; }
