// Placeholder: the definition, one pair at a time. Replaced by the tiled kernels.
#include "../core/attention.h"
#include <math.h>
#include <stdlib.h>
static float get(const struct sl_tensor *t, int64_t i) {
    if (t->dtype == SL_F32) { return ((const float *)t->data)[i]; }
    uint16_t h = ((const uint16_t *)t->data)[i];
    if (t->dtype == SL_BF16) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
    return (float)((const _Float16 *)t->data)[i];
}
static void put(struct sl_tensor *t, int64_t i, float f) {
    if (t->dtype == SL_F32) { ((float *)t->data)[i] = f; }
    else if (t->dtype == SL_BF16) { uint32_t u; memcpy(&u, &f, 4); u += 0x7fff + ((u >> 16) & 1); ((uint16_t *)t->data)[i] = (uint16_t)(u >> 16); }
    else { ((_Float16 *)t->data)[i] = (_Float16)f; }
}
static int64_t at(const struct sl_tensor *t, int64_t b, int64_t h, int64_t n) { return b * t->stride[0] + h * t->stride[1] + n * t->stride[2]; }
// seq[n] = sequence number or -1, pos[n] = position in it
static void sequences(const struct sl_attention_args *a, int64_t b, int64_t *seq, int64_t *pos) {
    int64_t n = a->query.shape[2], c = 0, s = 0, last = -1;
    for (int64_t i = 0; i < n; i++) {
        if (sl_tensor_given(&a->cu_seqlens)) { const int32_t *cu = a->cu_seqlens.data; while (i >= cu[s + 1]) { s++; } seq[i] = s; pos[i] = i - cu[s]; continue; }
        if (sl_tensor_given(&a->padding_mask)) { bool keep = ((const uint8_t *)a->padding_mask.data)[b * a->padding_mask.stride[0] + i * a->padding_mask.stride[1]]; seq[i] = keep ? 0 : -1; pos[i] = keep ? c++ : -1; continue; }
        if (sl_tensor_given(&a->position_ids)) { const struct sl_tensor *p = &a->position_ids; int64_t x = ((const int64_t *)p->data)[(p->shape[0] == 1 ? 0 : b) * p->stride[0] + i * p->stride[1]]; if (i && x <= last) { s++; c = 0; } last = x; }
        seq[i] = s; pos[i] = c++;
    }
}
static float dot(const struct sl_tensor *x, int64_t i, const struct sl_tensor *y, int64_t j, int64_t d) { float s = 0; for (int64_t e = 0; e < d; e++) { s += get(x, i + e) * get(y, j + e); } return s; }
static void zero(struct sl_tensor *t) { for (int64_t b = 0; b < t->shape[0]; b++) for (int64_t h = 0; h < t->shape[1]; h++) for (int64_t n = 0; n < t->shape[2]; n++) for (int64_t d = 0; d < t->shape[3]; d++) put(t, at(t, b, h, n) + d, 0); }
static void run(const struct sl_attention_args *args, bool back) {
    struct sl_attention_args A = *args, *a = &A;
    int64_t B = a->query.shape[0], H = a->query.shape[1], N = a->query.shape[2], D = a->query.shape[3], R = H / a->key.shape[1];
    int64_t *seq = malloc((size_t)(N + 1) * 8), *pos = malloc((size_t)(N + 1) * 8);
    float *p = malloc((size_t)(N + 1) * 4), *acc = malloc((size_t)D * 4), *gk = calloc((size_t)(B * H * N * D + 1), 4), *gv = calloc((size_t)(B * H * N * D + 1), 4);
    if (back) { zero(&a->grad_query); zero(&a->grad_key); zero(&a->grad_value); } else { zero(&a->output); }
    for (int64_t b = 0; b < B; b++) { sequences(a, b, seq, pos); for (int64_t h = 0; h < H; h++) for (int64_t i = 0; i < N; i++) {
        bool sh = h >= sl_pattern_first_shifted_head(&a->pattern, H); float *lse = (float *)a->lse.data + (b * H + h) * N + i, m = -INFINITY, l = 0;
        if (seq[i] < 0) { if (!back) { *lse = -INFINITY; } continue; }
        for (int64_t j = 0; j < N; j++) { p[j] = -INFINITY; if (seq[j] == seq[i] && sl_pattern_allows(&a->pattern, sh, pos[i], pos[j])) { p[j] = (float)a->scale * dot(&a->query, at(&a->query, b, h, i), &a->key, at(&a->key, b, h / R, j), D); m = fmaxf(m, p[j]); } }
        if (!back) {
            for (int64_t j = 0; j < N; j++) { if (p[j] > -INFINITY) { p[j] = expf(p[j] - m); l += p[j]; } else { p[j] = 0; } }
            memset(acc, 0, (size_t)D * 4);
            for (int64_t j = 0; j < N; j++) { if (p[j] > 0) { for (int64_t d = 0; d < D; d++) { acc[d] += p[j] * get(&a->value, at(&a->value, b, h / R, j) + d); } } }
            for (int64_t d = 0; d < D; d++) { put(&a->output, at(&a->output, b, h, i) + d, acc[d] / l); }
            *lse = m + logf(l); continue;
        }
        float delta = dot(&a->output, at(&a->output, b, h, i), &a->grad_output, at(&a->grad_output, b, h, i), D); memset(acc, 0, (size_t)D * 4);
        for (int64_t j = 0; j < N; j++) { if (p[j] == -INFINITY) { continue; } float e = expf(p[j] - *lse), ds = e * (dot(&a->grad_output, at(&a->grad_output, b, h, i), &a->value, at(&a->value, b, h / R, j), D) - delta) * (float)a->scale;
            int64_t kk = ((b * a->key.shape[1] + h / R) * N + j) * D;
            for (int64_t d = 0; d < D; d++) { acc[d] += ds * get(&a->key, at(&a->key, b, h / R, j) + d); gk[kk + d] += ds * get(&a->query, at(&a->query, b, h, i) + d); gv[kk + d] += e * get(&a->grad_output, at(&a->grad_output, b, h, i) + d); } }
        for (int64_t d = 0; d < D; d++) { put(&a->grad_query, at(&a->grad_query, b, h, i) + d, acc[d]); }
    } }
    if (back) for (int64_t b = 0; b < B; b++) for (int64_t h = 0; h < a->key.shape[1]; h++) for (int64_t i = 0; i < N; i++) for (int64_t d = 0; d < D; d++) { int64_t e = ((b * a->key.shape[1] + h) * N + i) * D + d; put(&a->grad_key, at(&a->grad_key, b, h, i) + d, gk[e]); put(&a->grad_value, at(&a->grad_value, b, h, i) + d, gv[e]); }
    free(seq); free(pos); free(p); free(acc); free(gk); free(gv);
}
int64_t sl_cpu_attention_forward_workspace(const struct sl_attention_args *a, int n) { (void)a; (void)n; return 1024; }
int64_t sl_cpu_attention_backward_workspace(const struct sl_attention_args *a, int n) { (void)a; (void)n; return 1024; }
void sl_cpu_attention_forward(const struct sl_attention_args *a, void *w, int n) { (void)w; (void)n; run(a, false); }
void sl_cpu_attention_backward(const struct sl_attention_args *a, void *w, int n) { (void)w; (void)n; run(a, true); }
