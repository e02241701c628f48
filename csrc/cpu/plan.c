#include "plan.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    THREAD_WORK = 1 << 21,  // multiplications of queries and keys that a thread should have at least
    RUN_TOKENS = 256,       // small groups are worked off in runs of about this many tokens
    ITEMS_PER_THREAD = 8,   // below this the forward splits heads, then queries
    MAX_BACKWARD_RUNS = 64, // bounds the memory of the sinks' partial sums
};

static int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int64_t ratio(const struct sl_plan *plan) {
    return plan->n_head / plan->n_head_kv;
}

float sl_plan_scale2(const struct sl_plan *plan) {
    return sl_scale2(plan->args->scale);
}

bool sl_plan_has_sink_queries(const struct sl_plan *plan) {
    return !plan->args->pattern.causal && plan->args->pattern.n_sink > 0;
}

int64_t sl_plan_set_count(const struct sl_plan *plan, bool shifted) {
    const int64_t first = plan->first_shifted;
    if (plan->split_heads) {
        return shifted ? plan->n_head - first : first;
    }
    return shifted ? plan->n_head_kv - (first == plan->n_head ? plan->n_head_kv : first / ratio(plan))
                   : div_up(first, ratio(plan));
}

static struct sl_head_set head_set(const struct sl_plan *plan, bool shifted, int64_t i) {
    const int64_t r = ratio(plan), first = plan->first_shifted;
    struct sl_head_set set = {0, 0, 0, shifted};
    if (plan->split_heads) {
        set.h0 = shifted ? first + i : i;
        set.h1 = set.h0 + 1;
        set.hk = set.h0 / r;
        return set;
    }
    set.hk = shifted ? first / r + i : i;
    set.h0 = shifted ? sl_max(set.hk * r, first) : set.hk * r;
    set.h1 = shifted ? (set.hk + 1) * r : sl_min((set.hk + 1) * r, first);
    return set;
}

// Groups of a run. In the backward each run sums its sinks' gradients apart: their rows together stay below
// the sequence's own.
static int64_t run_groups(const struct sl_plan *plan, bool shifted, int64_t length) {
    const struct sl_pattern *p = &plan->args->pattern;
    const int64_t n_group = sl_pattern_group_count(p, shifted, length);
    int64_t groups = sl_max(1, RUN_TOKENS / p->group_size);
    if (plan->backward) {
        const int64_t sink = sl_max(1, sl_min(p->n_sink, length));
        const int64_t runs = sl_max(1, sl_min(MAX_BACKWARD_RUNS, length / (2 * sink)));
        groups = sl_max(groups, div_up(n_group, runs));
    }
    return groups;
}

int64_t sl_plan_run_count(const struct sl_plan *plan, bool shifted, int64_t length) {
    return div_up(sl_pattern_group_count(&plan->args->pattern, shifted, length),
                  run_groups(plan, shifted, length));
}

int64_t sl_plan_max_keys(const struct sl_plan *plan) {
    const struct sl_pattern *p = &plan->args->pattern;
    if (sl_plan_has_sink_queries(plan)) {
        return plan->n_key;
    }
    return sl_min(plan->n_key, sl_min(p->group_size, plan->n_key) + sl_min(p->n_sink, plan->n_key));
}

int64_t sl_plan_max_queries(const struct sl_plan *plan) {
    const struct sl_pattern *p = &plan->args->pattern;
    const int64_t sink = sl_plan_has_sink_queries(plan) ? sl_min(p->n_sink, plan->n_token) : 0;
    return sl_max(sink, sl_min(p->group_size, plan->n_token));
}

int64_t sl_plan_partial_bound(const struct sl_plan *plan) {
    const struct sl_pattern *p = &plan->args->pattern;
    const int64_t n_token = plan->args->query.shape[0] * plan->n_token;
    const int64_t sets = sl_plan_set_count(plan, false) + sl_plan_set_count(plan, true) +
                         (sl_plan_has_sink_queries(plan) ? plan->n_head_kv : 0);
    // Rows of a head set: runs times sinks, summed over the sequences; run_groups keeps them below the
    // tokens.
    const int64_t runs =
        sl_min(n_token / p->group_size + 2 * plan->max_sequence, MAX_BACKWARD_RUNS * plan->max_sequence);
    const int64_t sink = sl_min(p->n_sink, plan->n_token);
    return sets * 2 * plan->d_pad * sl_min(n_token, runs * sink);
}

static int64_t part_count(const struct sl_plan *plan, int64_t n_query) {
    return plan->q_chunk == INT64_MAX
               ? 1
               : div_up(sl_min(plan->args->pattern.group_size, n_query), plan->q_chunk);
}

int64_t sl_plan_item_count(const struct sl_plan *plan, int64_t length, int64_t n_query) {
    if (n_query == 0) {
        return 0;
    }
    const int64_t groups = sl_plan_set_count(plan, false) * sl_plan_run_count(plan, false, length) +
                           sl_plan_set_count(plan, true) * sl_plan_run_count(plan, true, length);
    return groups * part_count(plan, n_query) + (sl_plan_has_sink_queries(plan) ? plan->n_head_kv : 0);
}

// The forward's items get smaller where there are too few for the threads. Splitting packs keys again, which
// costs a few percent.
static void choose_split(struct sl_plan *plan, int n_thread) {
    const int64_t wanted = (int64_t)n_thread * ITEMS_PER_THREAD;
    const int64_t rows = plan->args->query.shape[0], sequences = sl_max(1, plan->n_sequence);
    const int64_t length = div_up(rows * plan->n_key, sequences);
    const int64_t n_query = div_up(rows * plan->n_token, sequences);
    int64_t items = plan->n_sequence * sl_plan_item_count(plan, length, n_query);
    if (plan->backward || n_thread == 1 || items >= wanted || items == 0) {
        return;
    }
    plan->split_heads = true;
    items = plan->n_sequence * sl_plan_item_count(plan, length, n_query);
    if (items >= wanted || plan->args->pattern.group_size <= RUN_TOKENS) {
        return;
    }
    const int64_t longest = sl_min(plan->args->pattern.group_size, plan->n_token);
    const int64_t lanes = plan->kernels->n_lane;
    plan->q_chunk = div_up(div_up(longest, div_up(wanted, items)), lanes) * lanes;
}

void sl_plan_init(struct sl_plan *plan, const struct sl_attention_args *args, int n_thread, bool backward) {
    memset(plan, 0, sizeof *plan);
    plan->args = args;
    plan->kernels = sl_cpu_kernels_for(sl_cpu_level_active(), args->query.dtype);
    plan->n_head = args->query.shape[1];
    plan->n_head_kv = args->key.shape[1];
    plan->n_token = args->query.shape[2];
    plan->n_key = args->key.shape[2];
    plan->d_head = args->query.shape[3];
    plan->d_pad = div_up(plan->d_head, plan->kernels->n_vector) * plan->kernels->n_vector;
    plan->first_shifted = sl_pattern_first_shifted_head(&args->pattern, plan->n_head);
    plan->backward = backward;
    plan->q_chunk = INT64_MAX;
    plan->n_sequence = plan->n_token > 0 ? sl_plan_count_sequences(plan) : 0;
    plan->max_sequence = plan->n_sequence;
    choose_split(plan, n_thread);
}

int sl_plan_threads(const struct sl_attention_args *args, int n_thread) {
    const int64_t *shape = args->query.shape, n_key = args->key.shape[2];
    const double keys =
        (double)sl_min(sl_min(args->pattern.group_size, n_key) + sl_min(args->pattern.n_sink, n_key), n_key);
    const double work = (double)(shape[0] * shape[1] * shape[2] * shape[3]) * keys;
    return (int)sl_max(1, sl_min(n_thread, 1 + (int64_t)(work / THREAD_WORK)));
}

struct sl_item sl_plan_item(const struct sl_plan *plan, int64_t i) {
    int64_t lo = 0, hi = plan->n_sequence; // the last sequence whose first item is not after i
    while (hi - lo > 1) {
        const int64_t middle = lo + (hi - lo) / 2;
        if (plan->sequence[middle].first_item <= i) {
            lo = middle;
        } else {
            hi = middle;
        }
    }
    const struct sl_sequence *sequence = &plan->sequence[lo];
    struct sl_item item = {sequence, {0, 0, 0, false},        {0, 1}, {0, INT64_MAX},
                           false,    i - sequence->first_item};
    const int64_t parts = part_count(plan, sequence->length - sequence->n_past);
    int64_t at = item.slot / parts;
    for (int shifted = 0; shifted < 2; shifted++) {
        const int64_t runs = sl_plan_run_count(plan, shifted, sequence->length);
        const int64_t sets = sl_plan_set_count(plan, shifted);
        if (at < sets * runs) {
            const int64_t groups = run_groups(plan, shifted, sequence->length), run = at % runs;
            item.heads = head_set(plan, shifted, at / runs);
            item.groups.lo = run * groups;
            item.groups.hi = sl_min(item.groups.lo + groups,
                                    sl_pattern_group_count(&plan->args->pattern, shifted, sequence->length));
            if (parts > 1) { // the last queries see the most keys: they come first
                item.part.lo = (parts - 1 - item.slot % parts) * plan->q_chunk;
                item.part.hi = item.part.lo + plan->q_chunk;
            }
            return item;
        }
        at -= sets * runs;
    }
    // What remains is numbered behind all parts: the sink queries, one item a key/value head.
    item.sink_queries = true;
    item.heads.hk =
        item.slot -
        (sl_plan_item_count(plan, sequence->length, sequence->length - sequence->n_past) - plan->n_head_kv);
    item.heads.h0 = item.heads.hk * ratio(plan);
    item.heads.h1 = item.heads.h0 + ratio(plan);
    return item;
}

struct sl_unit sl_item_unit(const struct sl_plan *plan, const struct sl_item *item, int64_t g) {
    const struct sl_pattern *p = &plan->args->pattern;
    const int64_t length = item->sequence->length, n_past = item->sequence->n_past;
    const int64_t sink = sl_min(p->n_sink, length);
    struct sl_unit unit;
    if (item->sink_queries) {
        unit.queries.lo = sl_min(n_past, sink);
        unit.keys.lo = unit.n_sink = 0;
        unit.queries.hi = sink;
        unit.keys.hi = length;
        unit.diagonal = false;
        return unit;
    }
    const struct sl_range group = sl_pattern_group_at(p, item->heads.shifted, g, length);
    unit.queries = unit.keys = group;
    unit.queries.lo = sl_min(group.hi, sl_max(group.lo, n_past));
    if (item->part.hi != INT64_MAX) {
        const int64_t first = unit.queries.lo;
        unit.queries.lo = sl_min(group.hi, first + item->part.lo);
        unit.queries.hi = sl_min(group.hi, first + item->part.hi);
    }
    if (sl_plan_has_sink_queries(plan)) { // those are computed apart
        unit.queries.lo = sl_min(group.hi, sl_max(unit.queries.lo, sink));
    }
    unit.n_sink = sl_min(sink, group.lo);
    // Inside a group a key hides from earlier queries only; pattern.h says whether it does at all.
    unit.diagonal = sl_pattern_first_query(p, item->heads.shifted, group.hi - 1) > group.lo;
    return unit;
}
