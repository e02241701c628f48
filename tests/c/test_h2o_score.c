// Scores of a prompt on every level this machine has, against a triple loop in double: odd sizes, layouts
// with gaps, padding, windows, more keys than queries, and scratch memory of exactly the bytes asked for.
// Meant for AddressSanitizer and UndefinedBehaviorSanitizer. An argument seeds another selection of cases.
#include "../../csrc/core/h2o.h"
#include "../../csrc/cpu/detect.h"

#include "check.h"
#include "naive.h"

#define PICK(list) ((list)[random_below((int64_t)(sizeof(list) / sizeof *(list)))])

// One call's memory, each array exactly as large as it must be.
struct problem {
    int number;
    int64_t n_batch, n_head, n_head_kv, n_query, n_key, d_head;
    struct array query, key;
    float *lse, *scores;
    bool *mask;
    double *expected;
    struct sl_h2o_score_args args;
};

#define CASE "case %d %s (B %d H %d/%d N %d of %d D %d) window %d level %s"
#define CASE_OF(p, level)                                                                                    \
    (p)->number, sl_dtype_name((p)->query.tensor.dtype), (int)(p)->n_batch, (int)(p)->n_head,                \
        (int)(p)->n_head_kv, (int)(p)->n_query, (int)(p)->n_key, (int)(p)->d_head, (int)(p)->args.window,    \
        sl_cpu_level_name(level)

static struct sl_tensor floats(float *data, int64_t b, int64_t h, int64_t n) {
    return (struct sl_tensor){.data = data,
                              .dtype = SL_F32,
                              .device_type = SL_DEVICE_CPU,
                              .n_dim = 3,
                              .shape = {b, h, n},
                              .stride = {h * n, n, 1}};
}

// Kept tokens get numbers; padding stays NaN.
static struct array random_input(const struct problem *p, enum sl_dtype dtype, int64_t n_head, int64_t n) {
    const int64_t shape[4] = {p->n_batch, n_head, n, p->d_head};
    const struct array a = array_make(dtype, shape, (enum layout)random_below(LAYOUT_COUNT));
    for (int64_t i = 0; i < p->n_batch * n_head * n; i++) {
        const int64_t b = i / (n_head * n), h = i / n % n_head, x = i % n;
        for (int64_t d = 0; p->mask[b * p->n_key + p->n_key - n + x] && d < p->d_head; d++) {
            array_set_random(&a, b, h, x, d);
        }
    }
    return a;
}

// One query's row: its lse, and its probabilities added to the scores where it counts.
static void naive_query(struct problem *p, int64_t b, int64_t h, int64_t q, bool counts) {
    const int64_t n_past = p->n_key - p->n_query, hk = h / (p->n_head / p->n_head_kv), d = p->d_head;
    double *row = zeros(d), *key = zeros(d), *s = zeros(p->n_key), sum = 0, top = -INFINITY;
    read_row(&p->query, b, h, q, row);
    for (int64_t k = 0; k <= n_past + q; k++) {
        read_row(&p->key, b, hk, k, key);
        s[k] = p->mask[b * p->n_key + k] ? p->args.scale * dot(row, key, d) : -INFINITY;
        top = fmax(top, s[k]);
    }
    for (int64_t k = 0; k <= n_past + q; k++) {
        sum += exp(s[k] - top);
    }
    const double lse = top + log(sum);
    p->lse[(b * p->n_head + h) * p->n_query + q] = (float)lse;
    for (int64_t k = 0; counts && k <= n_past + q; k++) {
        p->expected[(b * p->n_head_kv + hk) * p->n_key + k] += exp(s[k] - lse);
    }
    free(row);
    free(key);
    free(s);
}

static void naive_scores(struct problem *p) {
    for (int64_t b = 0; b < p->n_batch; b++) {
        int64_t later = 0; // kept queries from q on
        for (int64_t q = p->n_query - 1; q >= 0; q--) {
            if (p->mask[b * p->n_key + p->n_key - p->n_query + q]) {
                later++;
                for (int64_t h = 0; h < p->n_head; h++) {
                    naive_query(p, b, h, q, p->args.window == 0 || later <= p->args.window);
                }
            }
        }
    }
    for (int64_t i = 0; p->args.mean && i < p->n_batch * p->n_head_kv * p->n_key; i++) {
        p->expected[i] /= (double)(p->n_head / p->n_head_kv);
    }
}

static void problem_make(struct problem *p, int number, enum sl_dtype dtype) {
    static const int64_t queries[] = {0, 1, 2, 7, 16, 33, 50, 63, 65, 97, 130};
    static const int64_t pasts[] = {0, 0, 1, 5, 48, 100};
    static const int64_t dims[] = {8, 16, 24, 40, 64, 72, 80, 128, SL_MAX_HEAD_DIM};
    static const int64_t windows[] = {0, 0, 1, 16, 1000};
    *p = (struct problem){.number = number, .n_head_kv = 1 + random_below(2)};
    p->n_batch = random_below(20) ? 1 + random_below(2) : 0;
    p->n_head = p->n_head_kv * (1 + random_below(4));
    p->d_head = PICK(dims);
    p->n_query = number % 20 == 0 && p->d_head < 64 ? 500 : PICK(queries);
    p->n_key = p->n_query + PICK(pasts);
    const int64_t n_lse = p->n_batch * p->n_head * p->n_query, n_score = p->n_batch * p->n_head_kv * p->n_key;
    const bool masked = number % 2 == 1;
    p->mask = malloc((size_t)(p->n_batch * p->n_key) + 1);
    for (int64_t i = 0; i < p->n_batch * p->n_key; i++) {
        p->mask[i] = !masked || random_below(4) != 0;
    }
    p->query = random_input(p, dtype, p->n_head, p->n_query);
    p->key = random_input(p, dtype, p->n_head_kv, p->n_key);
    p->lse = malloc((size_t)n_lse * sizeof *p->lse + (n_lse == 0));
    p->scores = malloc((size_t)n_score * sizeof *p->scores + (n_score == 0));
    p->expected = zeros(n_score);
    for (int64_t i = 0; i < n_lse; i++) {
        p->lse[i] = -INFINITY; // what padded queries have
    }
    struct sl_h2o_score_args *a = &p->args;
    a->query = p->query.tensor;
    a->key = p->key.tensor;
    a->lse = floats(p->lse, p->n_batch, p->n_head, p->n_query);
    a->scores = floats(p->scores, p->n_batch, p->n_head_kv, p->n_key);
    if (masked) {
        a->padding_mask = (struct sl_tensor){.data = p->mask,
                                             .dtype = SL_BOOL,
                                             .device_type = SL_DEVICE_CPU,
                                             .n_dim = 2,
                                             .shape = {p->n_batch, p->n_key},
                                             .stride = {p->n_key, 1}};
    }
    a->window = PICK(windows);
    a->mean = random_below(2);
    a->scale = random_below(5) ? 1 / sqrt((double)p->d_head) : -0.3;
    naive_scores(p);
}

static void problem_free(struct problem *p) {
    array_free(&p->query);
    array_free(&p->key);
    free(p->lse);
    free(p->scores);
    free(p->mask);
    free(p->expected);
}

// Scratch memory of exactly the bytes asked for, of any alignment, full of NaN.
static void run(struct problem *p, int n_thread, enum sl_cpu_level level) {
    const size_t n_byte = (size_t)sl_h2o_score_workspace(&p->args, n_thread), skew = (size_t)p->number % 3;
    unsigned char *block = malloc(n_byte + skew + (n_byte + skew == 0));
    struct sl_error err = {""};
    memset(block, 0xFF, n_byte + skew);
    memset(p->scores, 0xFF, (size_t)sl_tensor_count(&p->args.scores) * sizeof *p->scores);
    CHECK(sl_h2o_score_check(&p->args, &err) == SL_OK, CASE ": %s", CASE_OF(p, level), err.text);
    const enum sl_status status = sl_h2o_score(&p->args, block + skew, (int64_t)n_byte, n_thread, &err);
    CHECK(status == SL_OK, CASE ": %s", CASE_OF(p, level), err.text);
    free(block);
}

static void check_level(struct problem *p, enum sl_cpu_level level) {
    const int64_t n = sl_tensor_count(&p->args.scores);
    float *first = malloc((size_t)n * sizeof *first + 1);
    run(p, 1, level);
    for (int64_t i = 0; i < n; i++) {
        const double got = (double)p->scores[i], want = p->expected[i];
        const bool padded = !p->mask[i / (p->n_head_kv * p->n_key) * p->n_key + i % p->n_key];
        CHECK(padded ? p->scores[i] == 0 : fabs(got - want) <= 2e-5 * (1 + want),
              CASE " score %d: got %g expected %g", CASE_OF(p, level), (int)i, got, want);
    }
    memcpy(first, p->scores, (size_t)n * sizeof *first);
    for (int n_thread = 2; n_thread <= 3; n_thread++) {
        run(p, n_thread, level);
        CHECK(!memcmp(first, p->scores, (size_t)n * sizeof *first), CASE ": other bits with %d threads",
              CASE_OF(p, level), n_thread);
    }
    free(first);
}

int main(int argc, char **argv) {
    const int n_case = argc > 2 ? atoi(argv[2]) : 72;
    struct sl_error err = {""};
    random_state = argc > 1 ? (uint64_t)atoll(argv[1]) : 1;
    for (int number = 0; number < n_case; number++) {
        struct problem p;
        problem_make(&p, number, (enum sl_dtype)(number / 2 % 3));
        for (int level = 0; level < SL_CPU_LEVEL_COUNT; level++) {
            if (sl_cpu_level_available((enum sl_cpu_level)level)) {
                CHECK(sl_cpu_level_select(sl_cpu_level_name((enum sl_cpu_level)level), &err) == SL_OK, "%s",
                      err.text);
                check_level(&p, (enum sl_cpu_level)level);
            }
        }
        problem_free(&p);
    }
    return check_finish("test_h2o_score");
}
