// Two ways to get threads. Where the process has an OpenMP runtime loaded (torch brings one), its workers are
// joined: they spin for a while after each torch operation, and a second pool would fight them for the cores.
// Without one, in a forked child (whose inherited OpenMP pool is dead), or with SINKLORA_THREADS=own, an own
// pool serves.
#define _GNU_SOURCE
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct job {
    void (*work)(void *context, int64_t item, int worker);
    void *context;
    int64_t n_item;
    atomic_llong next;
    atomic_int n_worker;
};

// What every participating thread does.
static void take_items(struct job *job) {
    const int worker = atomic_fetch_add(&job->n_worker, 1);
    for (;;) {
        const int64_t item = atomic_fetch_add(&job->next, 1);
        if (item >= job->n_item) {
            return;
        }
        job->work(job->context, item, worker);
    }
}

// ---- the process's OpenMP ----

typedef void (*parallel_region)(void (*body)(void *), void *data, unsigned n_thread, unsigned flags);

static atomic_bool forked;
static atomic_bool own_wanted; // SINKLORA_THREADS=own

static void in_omp_thread(void *data) {
    take_items(data);
}

static parallel_region find_openmp(void) {
    static atomic_uintptr_t found; // looked up again until there: torch may be imported later
    uintptr_t address = atomic_load_explicit(&found, memory_order_acquire);
    if (!address) {
        address = (uintptr_t)dlsym(RTLD_DEFAULT, "GOMP_parallel");
        atomic_store_explicit(&found, address, memory_order_release);
    }
    parallel_region region;
    memcpy(&region, &address, sizeof region);
    return region;
}

// ---- the own pool ----

enum { MAX_THREADS = 256 };

static struct {
    pthread_mutex_t busy; // held by the caller whose job runs
    pthread_mutex_t lock; // guards the rest
    pthread_cond_t changed;
    struct job *job;
    int wanted;     // workers that the job still takes
    int running;    // workers inside it
    int n_thread;   // started so far
    uint64_t count; // jobs so far: a worker joins each once
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .changed = PTHREAD_COND_INITIALIZER};

static void *pool_thread(void *unused) {
    (void)unused;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.job || pool.count == seen || pool.wanted == 0) {
            pthread_cond_wait(&pool.changed, &pool.lock);
        }
        seen = pool.count;
        pool.wanted--;
        pool.running++;
        struct job *job = pool.job;
        pthread_mutex_unlock(&pool.lock);
        take_items(job);
        pthread_mutex_lock(&pool.lock);
        pool.running--;
        pthread_cond_broadcast(&pool.changed);
    }
    return NULL;
}

// Starts threads until n are there; fewer where the system refuses.
static void grow_pool(int n) {
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (pool.n_thread < n && pool.n_thread < MAX_THREADS) {
        pthread_t thread;
        if (pthread_create(&thread, &detached, pool_thread, NULL) != 0) {
            break;
        }
        pool.n_thread++;
    }
    pthread_attr_destroy(&detached);
}

static void run_in_pool(struct job *job, int n_thread) {
    if (pthread_mutex_trylock(&pool.busy) != 0) { // another caller has all threads at work already
        take_items(job);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    grow_pool(n_thread - 1);
    pool.job = job;
    pool.wanted = n_thread - 1;
    pool.count++;
    pthread_cond_broadcast(&pool.changed);
    pthread_mutex_unlock(&pool.lock);
    take_items(job);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0; // late wakers find nothing
    pool.job = NULL;
    while (pool.running > 0) {
        pthread_cond_wait(&pool.changed, &pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.busy);
}

// The child of a fork has one thread: the pool starts afresh, whatever the parent was doing.
static void after_fork_in_child(void) {
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.changed, NULL);
    pool.job = NULL;
    pool.wanted = pool.running = pool.n_thread = 0;
    atomic_store(&forked, true);
}

static void watch_forks(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

enum sl_status sl_parallel_init(struct sl_error *err) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    const char *choice = getenv("SINKLORA_THREADS");
    const bool own = choice && strcmp(choice, "own") == 0;
    if (choice && *choice && !own && strcmp(choice, "openmp") != 0) {
        return sl_error_set(err, SL_INVALID, "SINKLORA_THREADS: expected openmp or own, got \"%s\"", choice);
    }
    atomic_store(&own_wanted, own);
    return SL_OK;
}

void sl_parallel_for(int64_t n_item, int n_thread, void (*work)(void *, int64_t, int), void *context) {
    struct job job = {.work = work, .context = context, .n_item = n_item};
    if (n_thread > n_item) {
        n_thread = (int)n_item;
    }
    if (n_thread <= 1) {
        take_items(&job);
        return;
    }
    const bool own = atomic_load(&own_wanted) || atomic_load(&forked);
    const parallel_region region = own ? NULL : find_openmp();
    if (region) {
        region(in_omp_thread, &job, (unsigned)n_thread, 0);
    } else {
        run_in_pool(&job, n_thread);
    }
}

int sl_parallel_default_threads(void) {
    const char *text = getenv("OMP_NUM_THREADS");
    const long wanted = text ? strtol(text, NULL, 10) : 0;
    if (wanted > 0) {
        return wanted < MAX_THREADS ? (int)wanted : MAX_THREADS;
    }
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return CPU_COUNT(&set) < MAX_THREADS ? CPU_COUNT(&set) : MAX_THREADS;
    }
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : online < MAX_THREADS ? (int)online : MAX_THREADS;
}
