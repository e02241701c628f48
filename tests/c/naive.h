// SF-Attn and its gradient in double precision, one pair at a time, straight from SPEC's formulas: what the C
// tests compare the kernels to.
#ifndef NAIVE_H
#define NAIVE_H

#include "../../csrc/core/pattern.h"
#include "arrays.h"

// Dense double results: out and grad_query [B, H, N, D], lse [B, H, N], grad_key and grad_value [B, Hkv, N,
// D].
struct naive {
    double *out, *lse, *grad_query, *grad_key, *grad_value;
};

// Which sequence and position each token has: [B, N] each; sequence -1 is padding.
struct tokens {
    int64_t *sequence, *position;
};

static inline double *zeros(int64_t n) {
    return calloc((size_t)n + 1, sizeof(double));
}

static inline struct naive naive_make(const int64_t q[4], int64_t n_head_kv) {
    const int64_t n_query = q[0] * q[1] * q[2] * q[3], n_key = q[0] * n_head_kv * q[2] * q[3];
    return (struct naive){zeros(n_query), zeros(q[0] * q[1] * q[2]), zeros(n_query), zeros(n_key),
                          zeros(n_key)};
}

static inline void naive_free(struct naive *r) {
    free(r->out);
    free(r->lse);
    free(r->grad_query);
    free(r->grad_key);
    free(r->grad_value);
}

// One row of an array as doubles.
static inline void read_row(const struct array *a, int64_t b, int64_t h, int64_t n, double *row) {
    for (int64_t d = 0; d < a->tensor.shape[3]; d++) {
        row[d] = array_get(a, b, h, n, d);
    }
}

static inline double dot(const double *x, const double *y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

// All of one query row: its output and lse, and what it adds to the gradients. keys, values: the rows of its
// key/value head, [N, D]; p, dp: scratch [N].
static inline void naive_row(struct naive *r, const int64_t q[4], int64_t row, int64_t kv_row,
                             const double *query, const double *grad, const double *keys,
                             const double *values, const bool *visible, double scale, double *p, double *dp) {
    const int64_t n = q[2], d_head = q[3];
    double *out = r->out + row * d_head, top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) {
        p[j] = visible[j] ? scale * dot(query, keys + j * d_head, d_head) : -INFINITY;
        top = fmax(top, p[j]);
    }
    for (int64_t j = 0; j < n; j++) {
        sum += visible[j] ? exp(p[j] - top) : 0;
    }
    r->lse[row] = top + log(sum);
    for (int64_t j = 0; j < n; j++) {
        p[j] = visible[j] ? exp(p[j] - r->lse[row]) : 0;
        for (int64_t d = 0; visible[j] && d < d_head; d++) {
            out[d] += p[j] * values[j * d_head + d];
        }
    }
    const double delta = dot(out, grad, d_head);
    for (int64_t j = 0; j < n; j++) {
        if (!visible[j]) {
            continue;
        }
        dp[j] = p[j] * (dot(grad, values + j * d_head, d_head) - delta) * scale;
        for (int64_t d = 0; d < d_head; d++) {
            r->grad_query[row * d_head + d] += dp[j] * keys[j * d_head + d];
            r->grad_key[(kv_row + j) * d_head + d] += dp[j] * query[d];
            r->grad_value[(kv_row + j) * d_head + d] += p[j] * grad[d];
        }
    }
}

static inline void naive_attention(struct naive *r, const struct array *query, const struct array *key,
                                   const struct array *value, const struct array *grad_output,
                                   const struct tokens *tokens, const struct sl_pattern *pattern,
                                   double scale) {
    const int64_t *q = query->tensor.shape, n = q[2], d = q[3], n_kv = key->tensor.shape[1];
    double *keys = zeros(n * d), *values = zeros(n * d), *row = zeros(d), *grad = zeros(d), *p = zeros(2 * n);
    bool *visible = malloc((size_t)n + 1);
    for (int64_t bh = 0; bh < q[0] * q[1]; bh++) {
        const int64_t b = bh / q[1], h = bh % q[1], hk = h / (q[1] / n_kv);
        const int64_t *sequence = tokens->sequence + b * n, *position = tokens->position + b * n;
        const bool shifted = h >= sl_pattern_first_shifted_head(pattern, q[1]);
        for (int64_t j = 0; j < n; j++) {
            read_row(key, b, hk, j, keys + j * d);
            read_row(value, b, hk, j, values + j * d);
        }
        for (int64_t i = 0; i < n; i++) {
            r->lse[bh * n + i] = -INFINITY;
            if (sequence[i] < 0) {
                continue;
            }
            for (int64_t j = 0; j < n; j++) {
                visible[j] = sequence[i] == sequence[j] &&
                             sl_pattern_allows(pattern, shifted, position[i], position[j]);
            }
            read_row(query, b, h, i, row);
            read_row(grad_output, b, h, i, grad);
            naive_row(r, q, bh * n + i, (b * n_kv + hk) * n, row, grad, keys, values, visible, scale, p,
                      p + n);
        }
    }
    free(keys);
    free(values);
    free(row);
    free(grad);
    free(p);
    free(visible);
}

#endif
