// Select, first kernel: which slots are kept. One block a key/value head. Entries get 32-bit keys in the
// order of what is to be kept; the smallest key that is kept is found three bits at a time, by counting, so
// there are no atomics and no sorting. Then the kept slots are listed and their scores and positions moved.
//
// A thread reads in every pass the keys that it wrote itself, so that passes need no barriers of their own.
#include "../block.cuh"
#include "../ordered.cuh"
#include "params.cuh"

enum {
    THREADS = 512,
    SHARED_BYTES = THREADS,  // of the sums
    QUADS_AT_ONCE = 255 / 4, // keys that a byte can count
};
static const uint32_t ALWAYS = UINT32_MAX, NAN_SCORE = UINT32_MAX - 1;

// One head, as a block sees it.
struct entries {
    const float *scores;
    const int32_t *positions;
    uint32_t *keys;
    int n_key, n_quad;
    uint32_t shared;
};

// The key that so many entries reach, and whether they are exactly so many.
struct threshold {
    uint32_t key;
    bool exact;
};

// How many of this thread's keys that agree with prefix above the three bits at shift have which digit there.
SL_DEV void count_digits(const struct entries *e, uint32_t prefix, int shift, int count[8]) {
    SL_UNROLL for (int i = 0; i < 8; i++) {
        count[i] = 0;
    }
    for (int q0 = threadIdx.x; q0 < e->n_quad; q0 += QUADS_AT_ONCE * THREADS) {
        uint64_t packed = 0; // a byte each
        const int end = min(e->n_quad, q0 + QUADS_AT_ONCE * THREADS);
        SL_UNROLL_4 for (int q = q0; q < end; q += THREADS) {
            const uint4 four = ((const uint4 *)e->keys)[q];
            const uint32_t key[4] = {four.x, four.y, four.z, four.w};
            SL_UNROLL for (int j = 0; j < 4; j++) {
                const bool same = (uint64_t)(key[j] ^ prefix) >> (shift + 3) == 0;
                packed += same ? (uint64_t)1 << (8 * (key[j] >> shift & 7)) : 0;
            }
        }
        SL_UNROLL for (int i = 0; i < 8; i++) {
            count[i] += (int)(packed >> (8 * i) & 255);
        }
    }
}

// Of the n largest keys; there are n that are not 0.
SL_DEV struct threshold largest(const struct entries *e, int n) {
    struct threshold t = {0, false};
    for (int shift = 30; shift >= 0 && !t.exact; shift -= 3) {
        int count[8], at = 0;
        count_digits(e, t.key, shift, count);
        sl_block_sum_8<THREADS>(count, e->shared);
        bool found = false;
        SL_UNROLL for (int i = 7; i >= 0; i--) {
            if (!found && n <= count[i]) {
                found = true;
                at = i;
                t.exact = n == count[i];
            }
            n -= found ? 0 : count[i];
        }
        t.key |= (uint32_t)at << shift;
    }
    return t;
}

// Gives every entry its key, of (slot, position) where there is an entry.
template <class KEY_OF> SL_DEV void set_keys(const struct entries *e, KEY_OF key_of) {
    for (int q = threadIdx.x; q < e->n_quad; q += THREADS) {
        uint32_t key[4];
        SL_UNROLL for (int j = 0; j < 4; j++) {
            const int k = q * 4 + j, position = k < e->n_key ? e->positions[k] : -1;
            key[j] = position >= 0 ? key_of(k, position) : 0;
        }
        ((uint4 *)e->keys)[q] = uint4{key[0], key[1], key[2], key[3]};
    }
}

// What a look at the positions finds.
struct survey {
    int used, newest;
};

SL_DEV struct survey survey_of(const struct entries *e) {
    struct survey found = {0, -1};
    SL_UNROLL_4 for (int k = threadIdx.x; k < e->n_key; k += THREADS) {
        const int position = e->positions[k];
        found.used += position >= 0;
        found.newest = max(found.newest, position);
    }
    found.used = sl_block_scan<THREADS>(found.used, e->shared).all;
    found.newest = sl_block_max<THREADS>(found.newest, e->shared);
    return found;
}

// Entries at positions lo and above, and those below n_sink with them.
struct counts {
    int recent, always;
};

SL_DEV struct counts count_from(const struct entries *e, int64_t lo, int64_t n_sink) {
    struct counts found = {0, 0};
    SL_UNROLL_4 for (int k = threadIdx.x; k < e->n_key; k += THREADS) {
        const int position = e->positions[k];
        const bool recent = position >= 0 && position >= lo;
        found.recent += recent;
        found.always += recent || (position >= 0 && position < n_sink);
    }
    found.recent = sl_block_scan<THREADS>(found.recent, e->shared).all;
    found.always = sl_block_scan<THREADS>(found.always, e->shared).all;
    return found;
}

// The position from which on entries are among the n_recent newest.
SL_DEV int64_t first_recent(const struct entries *e, const struct survey *survey, int n_recent,
                            int64_t n_sink, int *n_always) {
    const bool some = n_recent > 0 && n_recent < survey->used;
    // The newest are side by side, unless somebody else made this cache.
    int64_t first = n_recent <= 0 ? INT64_MAX : some ? (int64_t)survey->newest + 1 - n_recent : 0;
    struct counts counts = count_from(e, first, n_sink);
    if (some && counts.recent != n_recent) {
        set_keys(e, [](int, int position) { return (uint32_t)position + 1; });
        first = (int64_t)largest(e, n_recent).key - 1;
        counts = count_from(e, first, n_sink);
    }
    *n_always = counts.always;
    return first;
}

// Sets keys so that those of the kept entries, and no others but duplicates, reach what is returned.
SL_DEV uint32_t rank_entries(const struct entries *e, const struct survey *survey, int n_keep, int n_recent,
                             int64_t n_sink) {
    int n_always;
    const int64_t recent = first_recent(e, survey, n_recent, n_sink, &n_always);
    // Where not even they have room, their scores decide, and the others' are out.
    const bool only_always = n_always >= n_keep;
    set_keys(e, [&](int k, int position) {
        const bool always = position >= recent || position < n_sink;
        const uint32_t score = sl_ordered(e->scores[k]);
        return always && !only_always   ? ALWAYS
               : !always && only_always ? 0u
               : score > NAN_SCORE      ? NAN_SCORE
                                        : score;
    });
    const struct threshold by_score = largest(e, n_keep);
    if (by_score.exact) {
        return by_score.key;
    }
    // More entries than room have just that score: the older the better.
    set_keys(e, [&](int k, int position) {
        const uint32_t key = e->keys[k];
        return key > by_score.key ? ALWAYS : key < by_score.key ? 0u : (uint32_t)(INT32_MAX - position) + 1;
    });
    return largest(e, n_keep).key;
}

// Lists, in order, the first n_keep slots whose keys reach least.
SL_DEV void list_slots(const struct entries *e, uint32_t least, int n_keep, int32_t *list) {
    const int each = (e->n_quad + THREADS - 1) / THREADS * 4, lo = min((int)threadIdx.x * each, e->n_key);
    const int hi = min(lo + each, e->n_key);
    int count = 0;
    __syncthreads(); // the keys are there
    for (int k = lo; k < hi; k++) {
        count += e->keys[k] >= least;
    }
    int at = sl_block_scan<THREADS>(count, e->shared).before;
    for (int k = lo; k < hi; k++) {
        if (e->keys[k] >= least && at < n_keep) {
            list[at++] = k;
        }
    }
    __syncthreads();
}

// Scores and positions of the kept slots go to the first ones. list[i] >= i, so this may happen in place:
// what is read comes no earlier than what is written, and within a batch all is read first.
SL_DEV void move_entries(const struct sl_select_params *p, const struct entries *e, int64_t head,
                         const int32_t *list, int n) {
    float *scores_out = p->scores_out + head * p->n_slot;
    int32_t *positions_out = p->positions_out + head * p->n_slot;
    for (int i0 = 0; i0 < n; i0 += THREADS) {
        const int i = i0 + (int)threadIdx.x, slot = i < n ? list[i] : 0;
        const float score = i < n ? e->scores[slot] : 0;
        const int32_t position = i < n ? e->positions[slot] : 0;
        __syncthreads();
        if (i < n) {
            scores_out[i] = score;
            positions_out[i] = position;
        }
    }
    // Behind the last barrier nobody reads entries.
    for (int i = n + (int)threadIdx.x; i < p->n_slot; i += THREADS) {
        scores_out[i] = 0;
        positions_out[i] = -1;
    }
}

static __global__ void __launch_bounds__(THREADS)
    select_choose(const __grid_constant__ struct sl_select_params p) {
    const int64_t head = blockIdx.x;
    const int32_t *row = p.rows + head / p.n_head_kv * SL_ROW_FIELDS;
    int32_t *list = p.list + head * p.n_list;
    const struct entries e = {p.scores + head * p.n_key,
                              p.positions + head * p.n_key,
                              p.keys + head * p.n_quad * 4,
                              p.n_key,
                              p.n_quad,
                              sl_shared_addr(SL_SHARED_BASE())};
    const struct survey survey = survey_of(&e);
    const int n_keep = min(min(survey.used, p.n_slot), max(0, row[SL_ROW_BUDGET]));
    if (n_keep > 0) {
        uint32_t least = 1;
        if (n_keep == survey.used) {
            set_keys(&e, [](int, int) { return 1u; });
        } else {
            least = rank_entries(&e, &survey, n_keep, row[SL_ROW_RECENT], p.n_sink);
        }
        list_slots(&e, least, n_keep, list);
    }
    move_entries(&p, &e, head, list, n_keep);
    if (threadIdx.x == 0) {
        p.n_kept[head] = n_keep;
    }
}

enum sl_status sl_select_choose(const struct sl_cuda_call *call, const struct sl_select_params *p) {
    return sl_cuda_launch(call, "select_choose", select_choose, (int64_t)p->n_batch * p->n_head_kv, THREADS,
                          SHARED_BYTES, *p);
}
