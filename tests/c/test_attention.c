// The attention kernels of every level this machine has, forward and backward, against a double loop: random
// patterns, odd sizes, layouts with gaps, sequences and padding, and scratch memory of exactly the bytes
// asked for. Meant for AddressSanitizer and UndefinedBehaviorSanitizer. An argument seeds another selection
// of cases.
#include "../../csrc/core/attention.h"
#include "../../csrc/cpu/detect.h"

#include "check.h"
#include "naive.h"

#define PICK(list) ((list)[random_below((int64_t)(sizeof(list) / sizeof *(list)))])

enum sequences { WHOLE_ROWS, CU_SEQLENS, PADDING_MASK, POSITION_IDS, SEQUENCES_COUNT };

// One call's memory. out .. grad_value are written by the kernels.
struct problem {
    int number;
    enum sequences kind;
    int64_t shape[4], n_head_kv;
    struct array query, key, value, grad_output, output, grad_query, grad_key, grad_value;
    float *lse;
    int32_t *cu_seqlens;
    bool *padding_mask;
    int64_t *position_ids;
    struct tokens tokens;
    struct sl_attention_args args;
};

#define CASE "case %d %s (B %d H %d/%d N %d D %d) G %d shift %d sinks %d causal %d level %s"
#define CASE_OF(p, level)                                                                                    \
    (p)->number, sl_dtype_name((p)->query.tensor.dtype), (int)(p)->shape[0], (int)(p)->shape[1],             \
        (int)(p)->n_head_kv, (int)(p)->shape[2], (int)(p)->shape[3], (int)(p)->args.pattern.group_size,      \
        (int)(p)->args.pattern.shift, (int)(p)->args.pattern.n_sink, (int)(p)->args.pattern.causal,          \
        sl_cpu_level_name(level)

// Which tokens make which sequence, and the argument that says so.
static void choose_sequences(struct problem *p) {
    const int64_t n_batch = p->shape[0], n = p->shape[2];
    struct sl_attention_args *a = &p->args;
    const struct sl_tensor any = {
        .device_type = SL_DEVICE_CPU, .n_dim = 2, .shape = {n_batch, n}, .stride = {n, 1}};
    p->tokens.sequence = calloc((size_t)(n_batch * n) + 1, sizeof(int64_t));
    p->tokens.position = calloc((size_t)(n_batch * n) + 1, sizeof(int64_t));
    p->cu_seqlens = calloc((size_t)n + 3, sizeof(int32_t));
    p->padding_mask = calloc((size_t)(n_batch * n) + 1, sizeof(bool));
    p->position_ids = calloc((size_t)(n_batch * n) + 1, sizeof(int64_t));
    const int64_t empty_first = p->number % 3 == 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n_batch * n; i++) {
        const bool row_start = i % n == 0, restart = row_start || random_below(12) == 0;
        const bool kept = p->kind != PADDING_MASK || random_below(4) != 0;
        const bool previous = !row_start && p->kind != PADDING_MASK;
        const int64_t sequence = previous ? p->tokens.sequence[i - 1] : 0;
        count = row_start || (p->kind != WHOLE_ROWS && p->kind != PADDING_MASK && restart) ? 0 : count;
        p->tokens.sequence[i] = kept ? sequence + (count == 0 && previous) : -1;
        p->tokens.position[i] = kept ? count++ : -1;
        p->padding_mask[i] = kept;
        // A jump forward starts no sequence.
        p->position_ids[i] = restart ? 5 : p->position_ids[i - 1] + 1 + random_below(2);
        p->cu_seqlens[p->tokens.sequence[i] + 1 + empty_first] = (int32_t)(i + 1);
    }
    if (p->kind == CU_SEQLENS) {
        const int64_t n_sequence = n ? p->tokens.sequence[n - 1] + 1 + empty_first : 1;
        a->cu_seqlens = any;
        a->cu_seqlens.n_dim = 1;
        a->cu_seqlens.dtype = SL_I32;
        a->cu_seqlens.data = p->cu_seqlens;
        a->cu_seqlens.shape[0] = n_sequence + 1;
        a->cu_seqlens.stride[0] = 1;
    } else if (p->kind == PADDING_MASK) {
        a->padding_mask = any;
        a->padding_mask.dtype = SL_BOOL;
        a->padding_mask.data = p->padding_mask;
    } else if (p->kind == POSITION_IDS) {
        a->position_ids = any;
        a->position_ids.dtype = SL_I64;
        a->position_ids.data = p->position_ids;
    }
}

// Kept tokens of an input get numbers; padding stays NaN.
static struct array random_input(const struct problem *p, enum sl_dtype dtype, const int64_t shape[4],
                                 bool shared_too) {
    const struct array a = array_make(dtype, shape, (enum layout)random_below(LAYOUT_COUNT - !shared_too));
    for (int64_t i = 0; i < shape[0] * shape[1] * shape[2]; i++) {
        const int64_t b = i / (shape[1] * shape[2]), h = i / shape[2] % shape[1], n = i % shape[2];
        for (int64_t d = 0; p->tokens.sequence[b * shape[2] + n] >= 0 && d < shape[3]; d++) {
            array_set_random(&a, b, h, n, d);
        }
    }
    return a;
}

static struct array some_output(enum sl_dtype dtype, const int64_t shape[4]) {
    return array_make(dtype, shape, (enum layout)random_below(LAYOUT_SHARED));
}

static void problem_make(struct problem *p, int number, enum sl_dtype dtype) {
    static const int64_t tokens[] = {0, 1, 2, 7, 16, 33, 50, 63, 65, 97, 130};
    static const int64_t dims[] = {8, 16, 24, 40, 64, 72, 80, 128};
    static const int64_t groups[] = {1, 3, 8, 16, 20, 48, 64, 100, 100000};
    static const int64_t sinks[] = {0, 0, 1, 4, 9, 65, 200};
    static const double fractions[] = {0, 0.25, 0.5, 1};
    *p = (struct problem){.number = number, .kind = (enum sequences)(number % SEQUENCES_COUNT)};
    p->n_head_kv = 1 + random_below(2);
    const int64_t n_batch = p->kind == CU_SEQLENS ? 1 : random_below(20) ? 1 + random_below(2) : 0;
    const int64_t d_head = number % 25 == 0 ? SL_MAX_HEAD_DIM : PICK(dims);
    const int64_t n_token = number % 20 == 0 && d_head < 64 ? 700 : PICK(tokens);
    const int64_t q[4] = {n_batch, p->n_head_kv * (1 + random_below(3)), n_token, d_head};
    const int64_t k[4] = {n_batch, p->n_head_kv, n_token, d_head};
    memcpy(p->shape, q, sizeof q);
    choose_sequences(p);
    p->query = random_input(p, dtype, q, true);
    p->key = random_input(p, dtype, k, true);
    p->value = random_input(p, dtype, k, true);
    p->grad_output = random_input(p, dtype, q, true);
    p->output = some_output(dtype, q);
    p->grad_query = some_output(dtype, q);
    p->grad_key = some_output(dtype, k);
    p->grad_value = some_output(dtype, k);
    p->lse = malloc((size_t)(q[0] * q[1] * q[2]) * sizeof *p->lse + 1);
    struct sl_attention_args *a = &p->args;
    a->query = p->query.tensor;
    a->key = p->key.tensor;
    a->value = p->value.tensor;
    a->output = p->output.tensor;
    a->lse = (struct sl_tensor){.data = p->lse, .dtype = SL_F32, .device_type = SL_DEVICE_CPU, .n_dim = 3};
    memcpy(a->lse.shape, q, 3 * sizeof *q);
    memcpy(a->lse.stride, (int64_t[]){q[1] * q[2], q[2], 1}, 3 * sizeof *q);
    a->pattern = (struct sl_pattern){PICK(groups), 0, PICK(sinks), PICK(fractions), random_below(4) != 0};
    a->pattern.shift = random_below(a->pattern.group_size + 1);
    a->pattern.shift = random_below(2) ? a->pattern.group_size / 2 : a->pattern.shift;
    a->scale = random_below(5) ? 1 / sqrt((double)d_head) : -0.3;
}

static void problem_free(struct problem *p) {
    struct array *const all[] = {&p->query,  &p->key,        &p->value,    &p->grad_output,
                                 &p->output, &p->grad_query, &p->grad_key, &p->grad_value};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        array_free(all[i]);
    }
    free(p->lse);
    free(p->cu_seqlens);
    free(p->padding_mask);
    free(p->position_ids);
    free(p->tokens.sequence);
    free(p->tokens.position);
}

typedef enum sl_status operation(const struct sl_attention_args *, void *, int64_t, int, struct sl_error *);

// Scratch memory of exactly the bytes asked for, of any alignment, full of NaN.
static void run_with_workspace(struct problem *p, int n_thread, int64_t n_byte, operation *run,
                               enum sl_cpu_level level) {
    const size_t skew = (size_t)p->number % 3;
    unsigned char *block = malloc((size_t)n_byte + skew + (n_byte + (int64_t)skew == 0));
    struct sl_error err = {""};
    memset(block, 0xFF, (size_t)n_byte + skew);
    const enum sl_status status = run(&p->args, block + skew, n_byte, n_thread, &err);
    CHECK(status == SL_OK, CASE ": %s", CASE_OF(p, level), err.text);
    free(block);
}

static void run_both(struct problem *p, int n_thread, enum sl_cpu_level level) {
    struct sl_attention_args *a = &p->args;
    struct sl_error err = {""};
    memset(&a->grad_output, 0, 4 * sizeof a->grad_output);
    CHECK(sl_attention_forward_check(a, &err) == SL_OK, CASE ": %s", CASE_OF(p, level), err.text);
    run_with_workspace(p, n_thread, sl_attention_forward_workspace(a, n_thread), sl_attention_forward, level);
    a->grad_output = p->grad_output.tensor;
    a->grad_query = p->grad_query.tensor;
    a->grad_key = p->grad_key.tensor;
    a->grad_value = p->grad_value.tensor;
    CHECK(sl_attention_backward_check(a, &err) == SL_OK, CASE ": %s", CASE_OF(p, level), err.text);
    run_with_workspace(p, n_thread, sl_attention_backward_workspace(a, n_thread), sl_attention_backward,
                       level);
}

// The largest error, relative to the largest number where that is above 1; NaN counts as infinite.
static double worst_error(const struct array *got, const double *expected) {
    const int64_t *n = got->tensor.shape;
    double worst = 0, size = 1;
    for (int64_t i = 0; i < sl_tensor_count(&got->tensor); i++) {
        const int64_t row = i / n[3];
        const double value = array_get(got, row / (n[1] * n[2]), row / n[2] % n[1], row % n[2], i % n[3]);
        const double error = fabs(value - expected[i]);
        worst = isnan(error) ? INFINITY : fmax(worst, error);
        size = fmax(size, fabs(expected[i]));
    }
    return worst / size;
}

static void check_lse(const struct problem *p, const double *expected, enum sl_cpu_level level) {
    for (int64_t i = 0; i < p->shape[0] * p->shape[1] * p->shape[2]; i++) {
        const double got = (double)p->lse[i];
        CHECK(got == expected[i] || fabs(got - expected[i]) <= 2e-5 * (1 + fabs(expected[i])),
              CASE " lse %d: got %g expected %g", CASE_OF(p, level), (int)i, got, expected[i]);
    }
}

static void check_level(struct problem *p, const struct naive *expected, enum sl_cpu_level level) {
    static const double tolerance[] = {[SL_F32] = 2e-5, [SL_BF16] = 3e-2, [SL_F16] = 4e-3};
    const char *const names[] = {"output", "grad_query", "grad_key", "grad_value"};
    const struct array *const got[] = {&p->output, &p->grad_query, &p->grad_key, &p->grad_value};
    const double *const want[] = {expected->out, expected->grad_query, expected->grad_key,
                                  expected->grad_value};
    const double limit = tolerance[p->query.tensor.dtype];
    unsigned char *first[4];
    run_both(p, 1, level);
    check_lse(p, expected->lse, level);
    for (int i = 0; i < 4; i++) {
        const double worst = worst_error(got[i], want[i]);
        CHECK(worst <= limit, CASE " %s: error %g", CASE_OF(p, level), names[i], worst);
        first[i] = memcpy(malloc(got[i]->bytes + 1), got[i]->block, got[i]->bytes);
    }
    for (int n_thread = 2; n_thread <= 3; n_thread++) {
        run_both(p, n_thread, level);
        for (int i = 0; i < 4; i++) {
            CHECK(!memcmp(first[i], got[i]->block, got[i]->bytes), CASE " %s: other bits with %d threads",
                  CASE_OF(p, level), names[i], n_thread);
        }
    }
    for (int i = 0; i < 4; i++) {
        CHECK(array_gaps_intact(got[i]), CASE " %s: wrote between rows", CASE_OF(p, level), names[i]);
        free(first[i]);
    }
}

// The last queries of each row in arrays of their own, against the same keys: output and lse, then lse alone.
// Padding in what comes before them moves their positions.
static void check_past(const struct problem *p, const struct naive *expected, enum sl_cpu_level level) {
    const int64_t n_batch = p->shape[0], n_head = p->shape[1], n = p->shape[2], d_head = p->shape[3];
    const int64_t n_past = random_below(n + 1), n_query = n - n_past;
    const int64_t shape[4] = {n_batch, n_head, n_query, d_head};
    struct problem last = *p;
    struct sl_attention_args *a = &last.args;
    last.query = array_make(p->query.tensor.dtype, shape, (enum layout)random_below(LAYOUT_SHARED));
    last.output = some_output(p->query.tensor.dtype, shape);
    last.lse = malloc((size_t)(n_batch * n_head * n_query) * sizeof *last.lse + 1);
    for (int64_t i = 0; i < n_batch * n_head * n_query; i++) {
        const int64_t b = i / (n_head * n_query), h = i / n_query % n_head, q = i % n_query;
        memcpy(array_at(&last.query, b, h, q, 0), array_at(&p->query, b, h, n_past + q, 0),
               (size_t)(d_head * sl_dtype_size(p->query.tensor.dtype)));
    }
    memset(&a->grad_output, 0, 4 * sizeof a->grad_output);
    a->n_past = n_past;
    a->query = last.query.tensor;
    a->output = last.output.tensor;
    a->lse.data = last.lse;
    a->lse.shape[2] = a->lse.stride[1] = n_query;
    a->lse.stride[0] = n_head * n_query;
    for (int alone = 0; alone < 2; alone++) {
        struct sl_error err = {""};
        CHECK(sl_attention_forward_check(a, &err) == SL_OK, CASE ": %s", CASE_OF(p, level), err.text);
        for (int64_t i = 0; i < n_batch * n_head * n_query; i++) {
            last.lse[i] = NAN;
        }
        run_with_workspace(&last, 1 + alone, sl_attention_forward_workspace(a, 1 + alone),
                           sl_attention_forward, level);
        for (int64_t i = 0; i < n_batch * n_head * n_query; i++) {
            const int64_t row = i / n_query * n + n_past + i % n_query;
            const double got = (double)last.lse[i], want = expected->lse[row];
            CHECK(got == want || fabs(got - want) <= 2e-5 * (1 + fabs(want)),
                  CASE " past %d lse %d: got %g expected %g", CASE_OF(p, level), (int)n_past, (int)i, got,
                  want);
            for (int64_t d = 0; d < d_head; d++) {
                const double value =
                    array_get(&last.output, i / (n_head * n_query), i / n_query % n_head, i % n_query, d);
                const double error = fabs(value - expected->out[row * d_head + d]);
                CHECK(error <= 3e-2, CASE " past %d output %d: error %g", CASE_OF(p, level), (int)n_past,
                      (int)i, error);
            }
        }
        CHECK(array_gaps_intact(&last.output), CASE " past: wrote between rows", CASE_OF(p, level));
        memset(&a->value, 0, sizeof a->value);
        memset(&a->output, 0, sizeof a->output);
    }
    array_free(&last.query);
    array_free(&last.output);
    free(last.lse);
}

int main(int argc, char **argv) {
    const int n_case = argc > 2 ? atoi(argv[2]) : 72;
    struct sl_error err = {""};
    random_state = argc > 1 ? (uint64_t)atoll(argv[1]) : 1;
    for (int number = 0; number < n_case; number++) {
        struct problem p;
        problem_make(&p, number, (enum sl_dtype)(number / SEQUENCES_COUNT % 3));
        struct naive expected = naive_make(p.shape, p.n_head_kv);
        naive_attention(&expected, &p.query, &p.key, &p.value, &p.grad_output, &p.tokens, &p.args.pattern,
                        p.args.scale);
        for (int level = 0; level < SL_CPU_LEVEL_COUNT; level++) {
            if (sl_cpu_level_available((enum sl_cpu_level)level)) {
                CHECK(sl_cpu_level_select(sl_cpu_level_name((enum sl_cpu_level)level), &err) == SL_OK, "%s",
                      err.text);
                check_level(&p, &expected, (enum sl_cpu_level)level);
                if (p.kind == WHOLE_ROWS || p.kind == PADDING_MASK) {
                    check_past(&p, &expected, (enum sl_cpu_level)level);
                }
            }
        }
        naive_free(&expected);
        problem_free(&p);
    }
    return check_finish("test_attention");
}
