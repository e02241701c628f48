// Decoding on every level this machine has: attention of a few tokens against a double loop, then steps of a
// cache that starts empty. Odd sizes, layouts with gaps, padding, and scratch memory of exactly the bytes
// asked for. Meant for AddressSanitizer and UndefinedBehaviorSanitizer. An argument seeds another selection.
#include "../../csrc/core/h2o.h"
#include "../../csrc/cpu/detect.h"

#include "check.h"
#include "naive.h"

#define PICK(list) ((list)[random_below((int64_t)(sizeof(list) / sizeof *(list)))])

enum { N_STEP = 30, MAX_CAPACITY = 24 };

// One call's memory, each array exactly as large as it must be.
struct problem {
    int number;
    int64_t n_batch, n_head, n_head_kv, n_query, n_key, d_head;
    struct array query, key, value, output, new_key, new_value;
    float *lse, *scores;
    uint8_t *mask, *new_mask; // any byte but 0 is true
    int32_t *positions, *free_slot, *rows;
    struct sl_h2o_decode_args args;
};

#define CASE "case %d %s (B %d H %d/%d N %d of %d D %d) window %d level %s"
#define CASE_OF(p)                                                                                           \
    (p)->number, sl_dtype_name((p)->query.tensor.dtype), (int)(p)->n_batch, (int)(p)->n_head,                \
        (int)(p)->n_head_kv, (int)(p)->n_query, (int)(p)->n_key, (int)(p)->d_head, (int)(p)->args.window,    \
        sl_cpu_level_name(sl_cpu_level_active())

static const double tolerance[] = {[SL_F32] = 2e-5, [SL_BF16] = 3e-2, [SL_F16] = 4e-3};

static struct sl_tensor dense(void *data, enum sl_dtype dtype, int32_t n_dim, int64_t a, int64_t b,
                              int64_t c) {
    struct sl_tensor t = {.data = data, .dtype = dtype, .device_type = SL_DEVICE_CPU, .n_dim = n_dim};
    memcpy(t.shape, (int64_t[]){a, b, c}, 3 * sizeof a);
    memcpy(t.stride, n_dim == 3 ? (int64_t[]){b * c, c, 1} : (int64_t[]){b, 1, 0}, 3 * sizeof a);
    return t;
}

static void *block(int64_t n, size_t size) {
    return calloc((size_t)n + (n == 0), size);
}

// Kept columns get numbers; padding stays NaN.
static struct array random_input(const struct problem *p, enum sl_dtype dtype, int64_t n_head, int64_t n,
                                 bool shared_too) {
    const int64_t shape[4] = {p->n_batch, n_head, n, p->d_head};
    const struct array a = array_make(dtype, shape, (enum layout)random_below(LAYOUT_COUNT - !shared_too));
    for (int64_t i = 0; i < p->n_batch * n_head * n; i++) {
        const int64_t b = i / (n_head * n), h = i / n % n_head, x = i % n;
        for (int64_t d = 0; p->mask[b * p->n_key + p->n_key - n + x] && d < p->d_head; d++) {
            array_set_random(&a, b, h, x, d);
        }
    }
    return a;
}

static void problem_make(struct problem *p, int number, enum sl_dtype dtype) {
    static const int64_t dims[] = {8, 16, 24, 40, 64, 72, 80, 128, SL_MAX_HEAD_DIM};
    static const int64_t pasts[] = {0, 0, 1, 5, 31, 48, 100, 1050};
    *p = (struct problem){.number = number, .n_head_kv = 1 + random_below(3)};
    p->n_batch = random_below(20) ? 1 + random_below(2) : 0;
    p->n_head = p->n_head_kv * (1 + random_below(5));
    p->d_head = PICK(dims);
    p->n_query = random_below(2) ? 1 : 1 + random_below(SL_MAX_DECODE_QUERIES);
    p->n_key = p->n_query + PICK(pasts);
    const int64_t shape[4] = {p->n_batch, p->n_head, p->n_query, p->d_head}, n = p->n_batch * p->n_key;
    p->mask = block(n, sizeof *p->mask);
    for (int64_t i = 0; i < n; i++) {
        const bool kept =
            number % 2 == 0 || (number % 4 == 1 ? i % p->n_key > p->n_key / 3 : random_below(4) != 0);
        p->mask[i] = (uint8_t)(kept ? 1 + random_below(255) : 0);
    }
    p->query = random_input(p, dtype, p->n_head, p->n_query, true);
    p->key = random_input(p, dtype, p->n_head_kv, p->n_key, true);
    p->value = random_input(p, dtype, p->n_head_kv, p->n_key, true);
    p->output = array_make(dtype, shape, (enum layout)random_below(LAYOUT_SHARED));
    p->lse = block(p->n_batch * p->n_head * p->n_query, sizeof *p->lse);
    p->scores = block(n * p->n_head_kv, sizeof *p->scores);
    struct sl_h2o_decode_args *a = &p->args;
    a->query = p->query.tensor;
    a->key = p->key.tensor;
    a->value = p->value.tensor;
    a->output = p->output.tensor;
    a->lse = dense(p->lse, SL_F32, 3, p->n_batch, p->n_head, p->n_query);
    if (number % 3) {
        a->scores = dense(p->scores, SL_F32, 3, p->n_batch, p->n_head_kv, p->n_key);
    }
    if (number % 2) {
        a->padding_mask = dense(p->mask, SL_BOOL, 2, p->n_batch, p->n_key, 0);
    }
    a->window = random_below(3);
    a->mean = random_below(2);
    a->scale = random_below(5) ? 1 / sqrt((double)p->d_head) : -0.3;
}

static void problem_free(struct problem *p) {
    struct array *const arrays[] = {&p->query, &p->key, &p->value, &p->output, &p->new_key, &p->new_value};
    void *const blocks[] = {p->lse, p->scores, p->mask, p->new_mask, p->positions, p->free_slot, p->rows};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        array_free(arrays[i]);
    }
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        free(blocks[i]);
    }
}

// Scratch memory of exactly the bytes asked for, of any alignment, full of NaN.
static void run(struct problem *p, int n_thread) {
    struct sl_error err = {""};
    CHECK(sl_h2o_decode_check(&p->args, &err) == SL_OK, CASE ": %s", CASE_OF(p), err.text);
    const size_t n_byte = (size_t)sl_h2o_decode_workspace(&p->args, n_thread), skew = (size_t)p->number % 3;
    unsigned char *memory = malloc(n_byte + skew + (n_byte + skew == 0));
    memset(memory, 0xFF, n_byte + skew);
    const enum sl_status status = sl_h2o_decode(&p->args, memory + skew, (int64_t)n_byte, n_thread, &err);
    CHECK(status == SL_OK, CASE ": %s", CASE_OF(p), err.text);
    free(memory);
}

// Query i of head h over the slots that `seen` names: its output, and its probabilities added to expected.
// Returns its lse.
static double naive_query(const struct problem *p, int64_t b, int64_t h, int64_t i, const bool *seen,
                          double *output, double *expected) {
    const int64_t hk = h / (p->n_head / p->n_head_kv), d = p->d_head;
    double *q = zeros(d), *row = zeros(d), *s = zeros(p->n_key), sum = 0, top = -INFINITY;
    read_row(&p->query, b, h, i, q);
    for (int64_t k = 0; k < p->n_key; k++) {
        s[k] = -INFINITY;
        if (seen[k]) {
            read_row(&p->key, b, hk, k, row);
            s[k] = p->args.scale * dot(q, row, d);
        }
        top = fmax(top, s[k]);
    }
    for (int64_t k = 0; k < p->n_key; k++) {
        sum += seen[k] ? exp(s[k] - top) : 0;
    }
    memset(output, 0, (size_t)d * sizeof *output);
    for (int64_t k = 0; k < p->n_key; k++) {
        const double weight = seen[k] ? exp(s[k] - top) / sum : 0;
        read_row(&p->value, b, hk, k, row);
        for (int64_t x = 0; seen[k] && x < d; x++) {
            output[x] += weight * row[x];
        }
        expected[k] += weight / (p->args.mean ? (double)(p->n_head / p->n_head_kv) : 1);
    }
    free(q);
    free(row);
    free(s);
    return sum > 0 ? top + log(sum) : -INFINITY;
}

static void check_output(const struct problem *p, int64_t b, int64_t h, int64_t i, const double *expected) {
    for (int64_t x = 0; x < p->d_head; x++) {
        const double got = array_get(&p->output, b, h, i, x);
        CHECK(fabs(got - expected[x]) <= tolerance[p->query.tensor.dtype] * fmax(1, fabs(expected[x])),
              CASE " output %d %d %d: got %g expected %g", CASE_OF(p), (int)b, (int)h, (int)i, got,
              expected[x]);
    }
}

static void check_scores(const struct problem *p, int64_t head, const double *expected) {
    for (int64_t k = 0; sl_tensor_given(&p->args.scores) && k < p->n_key; k++) {
        const double got = (double)p->scores[head * p->n_key + k];
        CHECK(fabs(got - expected[k]) <= 2e-5 * (1 + fabs(expected[k])), CASE " score %d: got %g expected %g",
              CASE_OF(p), (int)k, got, expected[k]);
    }
}

static void check_attention(const struct problem *p, int64_t b, int64_t hk) {
    const int64_t ratio = p->n_head / p->n_head_kv, n_past = p->n_key - p->n_query;
    double *output = zeros(p->d_head), *scores = zeros(p->n_key), *none = zeros(p->n_key);
    bool *seen = block(p->n_key, sizeof *seen);
    for (int64_t h = hk * ratio; h < (hk + 1) * ratio; h++) {
        int64_t later = 0; // kept queries from i on
        for (int64_t i = p->n_query - 1; i >= 0; i--) {
            const bool kept = p->mask[b * p->n_key + n_past + i];
            later += kept;
            for (int64_t k = 0; k < p->n_key; k++) {
                seen[k] = kept && k <= n_past + i && p->mask[b * p->n_key + k];
            }
            const bool counts = p->args.window == 0 || p->n_query == 1 || later <= p->args.window;
            const double lse = naive_query(p, b, h, i, seen, output, counts ? scores : none);
            const double got = (double)p->lse[(b * p->n_head + h) * p->n_query + i];
            CHECK(got == lse || fabs(got - lse) <= 2e-5 * (1 + fabs(lse)), CASE " lse: got %g expected %g",
                  CASE_OF(p), got, lse);
            check_output(p, b, h, i, output);
        }
    }
    check_scores(p, b * p->n_head_kv + hk, scores);
    free(output);
    free(scores);
    free(none);
    free(seen);
}

static void test_attention(int number, enum sl_dtype dtype) {
    struct problem p;
    problem_make(&p, number, dtype);
    const size_t n_score = (size_t)(p.n_batch * p.n_head_kv * p.n_key) * sizeof *p.scores;
    unsigned char *first = block((int64_t)(p.output.bytes + n_score), 1);
    for (int n_thread = 1; n_thread <= 4; n_thread++) {
        memset(p.scores, 0, n_score);
        run(&p, n_thread);
        for (int64_t i = 0; n_thread == 1 && i < p.n_batch * p.n_head_kv; i++) {
            check_attention(&p, i / p.n_head_kv, i % p.n_head_kv);
        }
        if (n_thread == 1) {
            memcpy(first, p.output.block, p.output.bytes);
            memcpy(first + p.output.bytes, p.scores, n_score);
        }
        CHECK(!memcmp(first, p.output.block, p.output.bytes) &&
                  !memcmp(first + p.output.bytes, p.scores, n_score),
              CASE ": other bits with %d threads", CASE_OF(&p), n_thread);
    }
    CHECK(array_gaps_intact(&p.output), CASE ": wrote between rows", CASE_OF(&p));
    free(first);
    problem_free(&p);
}

// ---- steps ----

// A cache without entries, its keys and values NaN.
static void steps_make(struct problem *p, int number, enum sl_dtype dtype) {
    static const int64_t dims[] = {8, 24, 40, 64, 72, 128};
    *p = (struct problem){.number = number, .n_head_kv = 1 + random_below(2), .n_query = 1};
    p->n_batch = 1 + random_below(2);
    p->n_head = p->n_head_kv * (1 + random_below(5));
    p->d_head = PICK(dims);
    p->n_key = 4 + random_below(MAX_CAPACITY - 3);
    const int64_t q[4] = {p->n_batch, p->n_head, 1, p->d_head}, one[4] = {q[0], p->n_head_kv, 1, q[3]};
    const int64_t cache[4] = {q[0], p->n_head_kv, p->n_key, q[3]}, n_head = q[0] * p->n_head_kv;
    p->query = array_make(dtype, q, (enum layout)random_below(LAYOUT_SHARED));
    p->output = array_make(dtype, q, (enum layout)random_below(LAYOUT_SHARED));
    p->new_key = array_make(dtype, one, (enum layout)random_below(LAYOUT_SHARED));
    p->new_value = array_make(dtype, one, (enum layout)random_below(LAYOUT_SHARED));
    p->key = array_make(dtype, cache, (enum layout)random_below(LAYOUT_SHARED));
    p->value = array_make(dtype, cache, (enum layout)random_below(LAYOUT_SHARED));
    p->scores = block(n_head * p->n_key, sizeof *p->scores);
    p->positions = block(n_head * p->n_key, sizeof *p->positions);
    p->free_slot = block(n_head, sizeof *p->free_slot);
    p->rows = block(p->n_batch * SL_ROW_FIELDS, sizeof *p->rows);
    p->new_mask = block(p->n_batch, sizeof *p->new_mask);
    memset(p->positions, 0xFF, (size_t)(n_head * p->n_key) * sizeof *p->positions);
    struct sl_h2o_decode_args *a = &p->args;
    a->n_sink = random_below(3);
    for (int64_t b = 0; b < p->n_batch; b++) {
        int32_t *row = p->rows + b * SL_ROW_FIELDS;
        row[SL_ROW_BUDGET] = (int32_t)(a->n_sink + 1 + random_below(p->n_key - 1 - a->n_sink));
        row[SL_ROW_RECENT] = (int32_t)(1 + random_below(row[SL_ROW_BUDGET] - a->n_sink));
    }
    a->query = p->query.tensor;
    a->key = p->key.tensor;
    a->value = p->value.tensor;
    a->output = p->output.tensor;
    a->new_key = p->new_key.tensor;
    a->new_value = p->new_value.tensor;
    a->scores = dense(p->scores, SL_F32, 3, p->n_batch, p->n_head_kv, p->n_key);
    a->positions = dense(p->positions, SL_I32, 3, p->n_batch, p->n_head_kv, p->n_key);
    a->free_slot = dense(p->free_slot, SL_I32, 2, p->n_batch, p->n_head_kv, 0);
    a->rows = dense(p->rows, SL_I32, 2, p->n_batch, SL_ROW_FIELDS, 0);
    a->new_mask = dense(p->new_mask, SL_BOOL, 2, p->n_batch, 1, 0);
    a->scale = 1 / sqrt((double)p->d_head);
}

static void randomize(const struct array *a) {
    const int64_t *n = a->tensor.shape;
    for (int64_t i = 0; i < sl_tensor_count(&a->tensor); i++) {
        const int64_t row = i / n[3];
        array_set_random(a, row / (n[1] * n[2]), row / n[2] % n[1], row % n[2], i % n[3]);
    }
}

// What a head was before a step.
struct before {
    float scores[MAX_CAPACITY + 1];
    int32_t positions[MAX_CAPACITY + 1], free_slot, rows[SL_ROW_FIELDS];
};

static struct before remember(const struct problem *p, int64_t b, int64_t hk) {
    const int64_t head = b * p->n_head_kv + hk;
    struct before was = {.free_slot = p->free_slot[head]};
    memcpy(was.scores, p->scores + head * p->n_key, (size_t)p->n_key * sizeof *was.scores);
    memcpy(was.positions, p->positions + head * p->n_key, (size_t)p->n_key * sizeof *was.positions);
    memcpy(was.rows, p->rows + b * SL_ROW_FIELDS, sizeof was.rows);
    return was;
}

// The freed slot may be evicted, and no other that may has a smaller score.
static void check_victim(const struct problem *p, int64_t slot, const struct before *was,
                         const double *scores) {
    const int32_t *row = was->rows;
    const int64_t last = row[SL_ROW_SEEN] - row[SL_ROW_RECENT];
    CHECK(was->positions[slot] >= p->args.n_sink && was->positions[slot] <= last,
          CASE ": evicted position %d", CASE_OF(p), was->positions[slot]);
    for (int64_t k = 0; k <= row[SL_ROW_USED]; k++) {
        const bool evictable = was->positions[k] >= p->args.n_sink && was->positions[k] <= last;
        CHECK(!evictable || scores[k] > scores[slot] - 1e-5 * (1 + scores[slot]),
              CASE ": evicted score %g, not %g", CASE_OF(p), scores[slot], scores[k]);
    }
}

static void check_head(const struct problem *p, int64_t b, int64_t hk, struct before *was) {
    const int64_t head = b * p->n_head_kv + hk, ratio = p->n_head / p->n_head_kv,
                  used = was->rows[SL_ROW_USED];
    const int32_t *positions = p->positions + head * p->n_key, *row = p->rows + b * SL_ROW_FIELDS;
    double *output = zeros(p->d_head), *scores = zeros(p->n_key);
    bool seen[MAX_CAPACITY + 1] = {false};
    if (!p->new_mask[b]) {
        const struct before now = remember(p, b, hk);
        CHECK(!memcmp(was, &now, sizeof now), CASE ": padding changed a row", CASE_OF(p));
        for (int64_t h = hk * ratio; h < (hk + 1) * ratio; h++) {
            check_output(p, b, h, 0, output);
        }
        free(output);
        free(scores);
        return;
    }
    was->positions[was->free_slot] = was->rows[SL_ROW_SEEN];
    was->scores[was->free_slot] = 0;
    for (int64_t k = 0; k < p->n_key; k++) {
        seen[k] = k <= used;
        scores[k] = (double)was->scores[k];
    }
    for (int64_t h = hk * ratio; h < (hk + 1) * ratio; h++) {
        naive_query(p, b, h, 0, seen, output, scores);
        check_output(p, b, h, 0, output);
    }
    const bool full = used + 1 > was->rows[SL_ROW_BUDGET];
    const int64_t slot = p->free_slot[head];
    if (full) {
        check_victim(p, slot, was, scores);
        was->positions[slot] = -1;
        scores[slot] = 0;
    }
    CHECK(full || slot == used + 1, CASE ": free slot %d", CASE_OF(p), (int)slot);
    CHECK(!memcmp(positions, was->positions, (size_t)p->n_key * sizeof *positions), CASE ": positions",
          CASE_OF(p));
    CHECK(row[SL_ROW_SEEN] == was->rows[SL_ROW_SEEN] + 1 && row[SL_ROW_USED] == used + !full,
          CASE ": rows %d %d", CASE_OF(p), row[SL_ROW_SEEN], row[SL_ROW_USED]);
    check_scores(p, head, scores);
    free(output);
    free(scores);
}

static void test_steps(int number, enum sl_dtype dtype) {
    struct problem p;
    steps_make(&p, number, dtype);
    for (int step = 0; step < N_STEP; step++) {
        struct before was[4];
        randomize(&p.query);
        randomize(&p.new_key);
        randomize(&p.new_value);
        for (int64_t b = 0; b < p.n_batch; b++) {
            p.new_mask[b] = (uint8_t)(random_below(6) ? 1 + random_below(255) : 0);
        }
        for (int64_t i = 0; i < p.n_batch * p.n_head_kv; i++) {
            was[i] = remember(&p, i / p.n_head_kv, i % p.n_head_kv);
        }
        run(&p, 1 + step % 3);
        for (int64_t i = 0; i < p.n_batch * p.n_head_kv; i++) {
            check_head(&p, i / p.n_head_kv, i % p.n_head_kv, &was[i]);
        }
    }
    CHECK(array_gaps_intact(&p.key) && array_gaps_intact(&p.value) && array_gaps_intact(&p.output),
          CASE ": wrote between rows", CASE_OF(&p));
    problem_free(&p);
}

int main(int argc, char **argv) {
    const int n_case = argc > 2 ? atoi(argv[2]) : 48;
    struct sl_error err = {""};
    for (int level = 0; level < SL_CPU_LEVEL_COUNT; level++) {
        if (!sl_cpu_level_available((enum sl_cpu_level)level)) {
            continue;
        }
        CHECK(sl_cpu_level_select(sl_cpu_level_name((enum sl_cpu_level)level), &err) == SL_OK, "%s",
              err.text);
        random_state = argc > 1 ? (uint64_t)atoll(argv[1]) : 1;
        for (int number = 0; number < n_case; number++) {
            test_attention(number, (enum sl_dtype)(number / 2 % 3));
            test_steps(number, (enum sl_dtype)(number % 3));
        }
    }
    return check_finish("test_h2o_decode");
}
