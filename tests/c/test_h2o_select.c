// Selection against a sort by definition: ties, NaN, unused slots with NaN keys, layouts with gaps, in place
// and to other buffers, and scratch memory of exactly the bytes asked for. Meant for AddressSanitizer and
// UndefinedBehaviorSanitizer. An argument seeds another selection of cases.
#include "../../csrc/core/h2o.h"

#include "../../csrc/core/pattern.h"
#include "arrays.h"
#include "check.h"

#define PICK(list) ((list)[random_below((int64_t)(sizeof(list) / sizeof *(list)))])

struct entry {
    int64_t slot;
    bool kept_anyway;
    float score;
    int32_t position;
};

static int newer_first(const void *x, const void *y) {
    const struct entry *a = x, *b = y;
    return (a->position < b->position) - (a->position > b->position);
}

// Protected, then NaN, then large scores, then older.
static int better_first(const void *x, const void *y) {
    const struct entry *a = x, *b = y;
    if (a->kept_anyway != b->kept_anyway) {
        return a->kept_anyway ? -1 : 1;
    }
    if (isnan(a->score) != isnan(b->score)) {
        return isnan(a->score) ? -1 : 1;
    }
    if (!isnan(a->score) && a->score != b->score) {
        return a->score > b->score ? -1 : 1;
    }
    return a->position < b->position ? -1 : 1;
}

static int by_slot(const void *x, const void *y) {
    const struct entry *a = x, *b = y;
    return a->slot < b->slot ? -1 : 1;
}

// The slots to keep of one head, in order, into entries; returns how many.
static int64_t naive_select(struct entry *entries, const float *scores, const int32_t *positions, int64_t n,
                            const int32_t *row, int64_t n_sink) {
    int64_t used = 0;
    for (int64_t k = 0; k < n; k++) {
        if (positions[k] >= 0) {
            entries[used++] = (struct entry){k, positions[k] < n_sink, scores[k], positions[k]};
        }
    }
    qsort(entries, (size_t)used, sizeof *entries, newer_first);
    for (int64_t i = 0; i < used && i < row[SL_ROW_RECENT]; i++) {
        entries[i].kept_anyway = true;
    }
    qsort(entries, (size_t)used, sizeof *entries, better_first);
    const int64_t kept = sl_min(used, row[SL_ROW_BUDGET]);
    qsort(entries, (size_t)kept, sizeof *entries, by_slot);
    return kept;
}

static struct sl_tensor dense(void *data, enum sl_dtype dtype, int64_t b, int64_t h, int64_t n) {
    return (struct sl_tensor){.data = data,
                              .dtype = dtype,
                              .device_type = SL_DEVICE_CPU,
                              .n_dim = 3,
                              .shape = {b, h, n},
                              .stride = {h * n, n, 1}};
}

static void *copy_of(const void *data, size_t bytes) {
    return memcpy(malloc(bytes + (bytes == 0)), data, bytes);
}

struct problem {
    int number;
    bool in_place;
    int64_t n_batch, n_head_kv, n_key, n_slot, d_head;
    struct array key, value, key_out, value_out;
    float *scores, *scores_out;
    int32_t *positions, *positions_out, *rows;
    struct sl_h2o_select_args args;
};

#define CASE "case %d (B %d Hkv %d slots %d to %d D %d in place %d)"
#define CASE_OF(p)                                                                                           \
    (p)->number, (int)(p)->n_batch, (int)(p)->n_head_kv, (int)(p)->n_key, (int)(p)->n_slot,                  \
        (int)(p)->d_head, (p)->in_place

// Used slots get numbers, their position in any order; the others stay NaN.
static void fill(struct problem *p) {
    static const float scores[] = {0, -0.0f, 1, 1, 2, 3, 1e30f, -5, INFINITY, -INFINITY, NAN};
    for (int64_t i = 0; i < p->n_batch * p->n_head_kv * p->n_key; i++) {
        const int64_t head = i / p->n_key, k = i % p->n_key;
        const bool used = (p->number % 2 == 0) || (head / p->n_head_kv * 7 + k * 5) % 4 != 0;
        p->positions[i] = used ? (int32_t)((k * 101 + head) % 307) : -1; // 307 is prime: all different
        p->scores[i] = used && random_below(2) ? PICK(scores) : (float)random_below(50);
        for (int64_t d = 0; used && d < p->d_head; d++) {
            array_set_random(&p->key, head / p->n_head_kv, head % p->n_head_kv, k, d);
            array_set_random(&p->value, head / p->n_head_kv, head % p->n_head_kv, k, d);
        }
    }
}

static void problem_make(struct problem *p, int number, enum sl_dtype dtype) {
    static const int64_t sizes[] = {0, 1, 2, 7, 16, 33, 64, 130, 300};
    static const int64_t dims[] = {8, 24, 64, 128};
    *p = (struct problem){.number = number, .in_place = random_below(2), .d_head = PICK(dims)};
    p->n_batch = random_below(20) ? 1 + random_below(2) : 0;
    p->n_head_kv = 1 + random_below(3);
    p->n_key = PICK(sizes);
    const int64_t budget = random_below(p->n_key + 3), n_head = p->n_batch * p->n_head_kv;
    p->n_slot = p->in_place ? p->n_key : sl_min(budget, p->n_key) + random_below(3);
    const int64_t in[4] = {p->n_batch, p->n_head_kv, p->n_key, p->d_head};
    const int64_t out[4] = {p->n_batch, p->n_head_kv, p->n_slot, p->d_head};
    p->key = array_make(dtype, in, (enum layout)random_below(LAYOUT_SHARED));
    p->value = array_make(dtype, in, (enum layout)random_below(LAYOUT_SHARED));
    p->key_out = array_make(dtype, out, (enum layout)random_below(LAYOUT_SHARED));
    p->value_out = array_make(dtype, out, (enum layout)random_below(LAYOUT_SHARED));
    p->scores = calloc((size_t)(n_head * p->n_key) + 1, sizeof *p->scores);
    p->positions = calloc((size_t)(n_head * p->n_key) + 1, sizeof *p->positions);
    p->scores_out = malloc((size_t)(n_head * p->n_slot) * sizeof *p->scores + (n_head * p->n_slot == 0));
    p->positions_out = malloc((size_t)(n_head * p->n_slot) * sizeof *p->scores + (n_head * p->n_slot == 0));
    p->rows = calloc((size_t)(p->n_batch * SL_ROW_FIELDS) + (n_head == 0), sizeof *p->rows);
    for (int64_t b = 0; b < p->n_batch; b++) {
        p->rows[b * SL_ROW_FIELDS + SL_ROW_BUDGET] = (int32_t)budget;
        p->rows[b * SL_ROW_FIELDS + SL_ROW_RECENT] = (int32_t)(1 + random_below(budget + 1));
    }
    fill(p);
    struct sl_h2o_select_args *a = &p->args;
    a->key = p->key.tensor;
    a->value = p->value.tensor;
    a->scores = dense(p->scores, SL_F32, p->n_batch, p->n_head_kv, p->n_key);
    a->positions = dense(p->positions, SL_I32, p->n_batch, p->n_head_kv, p->n_key);
    a->rows = dense(p->rows, SL_I32, p->n_batch, SL_ROW_FIELDS, 1);
    a->rows.n_dim = 2;
    a->rows.stride[0] = SL_ROW_FIELDS;
    a->rows.stride[1] = 1;
    a->key_out = p->in_place ? a->key : p->key_out.tensor;
    a->value_out = p->in_place ? a->value : p->value_out.tensor;
    a->scores_out =
        p->in_place ? a->scores : dense(p->scores_out, SL_F32, p->n_batch, p->n_head_kv, p->n_slot);
    a->positions_out =
        p->in_place ? a->positions : dense(p->positions_out, SL_I32, p->n_batch, p->n_head_kv, p->n_slot);
    a->n_sink = random_below(20);
}

static void problem_free(struct problem *p) {
    array_free(&p->key);
    array_free(&p->value);
    array_free(&p->key_out);
    array_free(&p->value_out);
    free(p->scores);
    free(p->scores_out);
    free(p->positions);
    free(p->positions_out);
    free(p->rows);
}

// Scratch memory of exactly the bytes asked for, of any alignment, full of ones.
static void run(struct problem *p, int n_thread) {
    struct sl_error err = {""};
    CHECK(sl_h2o_select_check(&p->args, &err) == SL_OK, CASE ": %s", CASE_OF(p), err.text);
    const size_t n_byte = (size_t)sl_h2o_select_workspace(&p->args, n_thread), skew = (size_t)p->number % 3;
    unsigned char *memory = malloc(n_byte + skew + (n_byte + skew == 0));
    memset(memory, 0xFF, n_byte + skew);
    const enum sl_status status = sl_h2o_select(&p->args, memory + skew, (int64_t)n_byte, n_thread, &err);
    CHECK(status == SL_OK, CASE ": %s", CASE_OF(p), err.text);
    free(memory);
}

static void check_rows(const struct problem *p, const struct array *got, const struct array *was,
                       int64_t head, const struct entry *kept, int64_t n) {
    const int64_t b = head / p->n_head_kv, hk = head % p->n_head_kv;
    bool same = true;
    for (int64_t i = 0; i < n * p->d_head; i++) {
        const int64_t d = i % p->d_head;
        same &= array_get(got, b, hk, i / p->d_head, d) == array_get(was, b, hk, kept[i / p->d_head].slot, d);
    }
    CHECK(same, CASE ": rows of head %d", CASE_OF(p), (int)head);
    CHECK(array_gaps_intact(got), CASE ": wrote between rows", CASE_OF(p));
}

static struct array array_copy(const struct array *a) {
    struct array copy = *a;
    copy.block = copy_of(a->block, a->bytes);
    copy.tensor.data = copy.block + ((unsigned char *)a->tensor.data - a->block);
    return copy;
}

static void test_case(int number, enum sl_dtype dtype) {
    struct problem p;
    problem_make(&p, number, dtype);
    const int64_t n_head = p.n_batch * p.n_head_kv;
    const size_t n = (size_t)(n_head * p.n_key);
    struct array key = p.key.bytes ? array_copy(&p.key) : p.key,
                 value = p.value.bytes ? array_copy(&p.value) : p.value;
    float *scores = copy_of(p.scores, n * sizeof *scores);
    int32_t *positions = copy_of(p.positions, n * sizeof *positions);
    struct entry *kept = malloc((size_t)(p.n_key + 1) * sizeof *kept);
    run(&p, 1 + number % 3);
    const float *scores_out = p.args.scores_out.data;
    const int32_t *positions_out = p.args.positions_out.data;
    for (int64_t head = 0; head < n_head; head++) {
        const int32_t *row = p.rows + head / p.n_head_kv * SL_ROW_FIELDS;
        const int64_t used = naive_select(kept, scores + head * p.n_key, positions + head * p.n_key, p.n_key,
                                          row, p.args.n_sink);
        check_rows(&p, p.in_place ? &p.key : &p.key_out, &key, head, kept, used);
        check_rows(&p, p.in_place ? &p.value : &p.value_out, &value, head, kept, used);
        for (int64_t i = 0; i < p.n_slot; i++) {
            const int32_t position = i < used ? kept[i].position : -1;
            const float score = i < used ? kept[i].score : 0.0f;
            CHECK(positions_out[head * p.n_slot + i] == position, CASE ": position %d", CASE_OF(&p), (int)i);
            CHECK(!memcmp(&scores_out[head * p.n_slot + i], &score, sizeof score), CASE ": score %d",
                  CASE_OF(&p), (int)i);
        }
        CHECK(row[SL_ROW_USED] == used, CASE ": used %d, not %d", CASE_OF(&p), row[SL_ROW_USED], (int)used);
    }
    if (p.key.bytes) {
        array_free(&key);
        array_free(&value);
    }
    free(scores);
    free(positions);
    free(kept);
    problem_free(&p);
}

int main(int argc, char **argv) {
    const int n_case = argc > 2 ? atoi(argv[2]) : 300;
    random_state = argc > 1 ? (uint64_t)atoll(argv[1]) : 1;
    for (int number = 0; number < n_case; number++) {
        test_case(number, (enum sl_dtype)(number % 3));
    }
    return check_finish("test_h2o_select");
}
