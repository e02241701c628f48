// How one call of SF-Attn is cut into work items: which sequences there are, which heads share which groups,
// and which queries an item computes. The bits of the result never depend on the cut of the forward; the cut
// of the backward never depends on the number of threads.
#ifndef SL_CPU_PLAN_H
#define SL_CPU_PLAN_H

#include "../core/attention.h"
#include "kernels.h"

#include <float.h>
#include <math.h>

// Position x of the sequence is token first + (index ? index[x] : x) of its batch row's keys; the positions
// n_past .. length-1 have queries.
struct sl_sequence {
    int64_t batch;
    int64_t first;
    int64_t n_past;
    int64_t length;
    const int32_t *index;
    int64_t first_item;    // items before this sequence's
    int64_t first_partial; // floats before this sequence's sink sums (backward)
};

// Query heads h0 .. h1-1 of one key/value head, all shifted or none.
struct sl_head_set {
    int64_t hk;
    int64_t h0;
    int64_t h1;
    bool shifted;
};

// One item: the groups group.lo .. group.hi-1 (by index) of one sequence for one head set; of a group's
// queries only those whose offset from its first one is in `part`. An item of sink queries (not causal only)
// has one pseudo-group: the whole sequence as keys, and the sinks as queries.
struct sl_item {
    const struct sl_sequence *sequence;
    struct sl_head_set heads;
    struct sl_range groups;
    struct sl_range part;
    bool sink_queries;
    int64_t slot; // index among the items of its sequence
};

// The queries and keys that are computed together. Key rows in order: positions 0 .. n_sink-1, then `keys`.
struct sl_unit {
    struct sl_range queries; // positions
    struct sl_range keys;    // positions
    int64_t n_sink;
    bool diagonal; // query q sees the keys <= q of `keys` only
};

struct sl_plan {
    const struct sl_attention_args *args;
    const struct sl_cpu_kernels *kernels;
    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_token; // queries
    int64_t n_key;   // n_past + n_token
    int64_t d_head;
    int64_t d_pad;
    int64_t first_shifted;
    bool backward;
    bool split_heads; // one query head a set
    int64_t q_chunk;  // queries of a part; INT64_MAX: whole groups
    int64_t max_sequence;
    int64_t n_sequence;
    int64_t n_item;
    int64_t n_partial;
    struct sl_sequence *sequence;
    int32_t *index; // gathered tokens of padding masks with holes, [n_batch, n_key]
};

// Sizes and cut, from the arguments alone; reads the values of cu_seqlens and position_ids to count
// sequences.
void sl_plan_init(struct sl_plan *plan, const struct sl_attention_args *args, int n_thread, bool backward);

// Threads that the call is worth: waking one costs about as much as some millions of multiplications.
int sl_plan_threads(const struct sl_attention_args *args, int n_thread);

// Bytes of the plan's own arrays.
int64_t sl_plan_bytes(const struct sl_plan *plan);

// Lists the sequences and numbers the items, in memory of at least sl_plan_bytes. False where the sequence
// tensors no longer agree with what sl_plan_init read (someone wrote to them meanwhile).
bool sl_plan_fill(struct sl_plan *plan, void *memory);

// Sequences of the call, empty ones included.
int64_t sl_plan_count_sequences(const struct sl_plan *plan);

// Items of a sequence of so many positions, the last n_query of which have queries.
int64_t sl_plan_item_count(const struct sl_plan *plan, int64_t length, int64_t n_query);

// Item i of 0 .. n_item-1.
struct sl_item sl_plan_item(const struct sl_plan *plan, int64_t i);

// Group number g of an item.
struct sl_unit sl_item_unit(const struct sl_plan *plan, const struct sl_item *item, int64_t g);

// Rows of head h of a tensor of keys as the sequence orders them: sinks first, then from position start on,
// count in all.
struct sl_rows sl_plan_rows(const struct sl_tensor *tensor, const struct sl_sequence *sequence, int64_t h,
                            int64_t n_sink, int64_t start, int64_t count);

// The same without sinks for a tensor of queries, whose first token is key number n_past.
struct sl_rows sl_plan_query_rows(const struct sl_plan *plan, const struct sl_tensor *tensor,
                                  const struct sl_sequence *sequence, int64_t h, int64_t start,
                                  int64_t count);

// Head sets and runs of groups of a sequence, for numbering sink sums: sets 0 .. n-1 of sl_plan_set.
int64_t sl_plan_set_count(const struct sl_plan *plan, bool shifted);
int64_t sl_plan_run_count(const struct sl_plan *plan, bool shifted, int64_t length);
bool sl_plan_has_sink_queries(const struct sl_plan *plan);

// At least as many floats as the partial sums of the backward's items take, for the number of sequences
// counted.
int64_t sl_plan_partial_bound(const struct sl_plan *plan);

// Largest number of key rows and of queries of a unit.
int64_t sl_plan_max_keys(const struct sl_plan *plan);
int64_t sl_plan_max_queries(const struct sl_plan *plan);

// What scores are multiplied by for exp2: |scale| * log2(e), positive and finite, because 0 times it must be
// 0, and it times the lowest float no NaN. The sign of scale is in the packed queries.
static inline float sl_scale2(double scale) {
    const float log2_e = 1.44269504088896341f;
    return fminf(fmaxf(fabsf((float)scale) * log2_e, FLT_MIN), FLT_MAX);
}

float sl_plan_scale2(const struct sl_plan *plan);

// Zeroes the rows of padded tokens in a tensor of heads, of queries or keys; does nothing without a padding
// mask.
void sl_plan_zero_padding(const struct sl_plan *plan, const struct sl_tensor *tensor);

// Is key n of batch row b kept by the padding mask (true without one)?
bool sl_plan_kept(const struct sl_plan *plan, int64_t b, int64_t n);

// Asks for n rows from row i on. Rows of a (tokens, heads, d) tensor lie too far apart for hardware prefetch;
// the work of the tile before covers the latency.
static inline void sl_rows_prefetch(const struct sl_rows *rows, int64_t i, int64_t n, int64_t d) {
    const int64_t bytes = d * sl_dtype_size(rows->dtype);
    for (int64_t r = i; r < i + n && r < rows->count; r++) {
        const char *row = sl_rows_at(rows, r);
        for (int64_t b = 0; b < bytes; b += 64) {
            SL_PREFETCH(row + b);
        }
    }
}

// The first 64-byte boundary in memory of any alignment.
static inline char *sl_align(void *memory) {
    return (char *)memory + (64 - (uintptr_t)memory % 64) % 64;
}

// A region of the workspace, cut front to back in 64-byte steps. With base NULL nothing is handed out and
// used only measures.
struct sl_scratch {
    char *base;
    int64_t used;
};

static inline void *sl_scratch_take(struct sl_scratch *scratch, int64_t bytes) {
    void *memory = scratch->base ? scratch->base + scratch->used : NULL;
    scratch->used += (bytes + 63) / 64 * 64;
    return memory;
}

#endif
