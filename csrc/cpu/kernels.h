// The micro-kernels that attention_forward.c and attention_backward.c are written on: one table for each
// instruction set and kind of packed operand. Everything that depends on the processor is behind this header.
//
// Vocabulary. A lane tile is n_lane consecutive queries of one group, one query a vector lane, so that
// softmax runs vertically: no reduction across lanes. Scores are kept transposed, S^T[key row][lane].
// Operands are packed into 32-bit words that hold `pair` elements along the summed dimension: one float32, or
// two bfloat16 for instructions that multiply bfloat16 pairs. Every product is one micro-kernel:
//     C[rows][vectors] += broadcast word of A  x  vector of words of B.
//
// live (1 to 3) is the number of lane vectors that hold queries; those behind it are neither read nor
// written.
//
// Masking. Key row r of a tile is visible to the lanes >= r - diagonal, and to none where r >= limit.
#ifndef SL_CPU_KERNELS_H
#define SL_CPU_KERNELS_H

#include "../core/dtype.h"
#include "detect.h"

enum {
    SL_ROW_BLOCK = 8,       // key rows of a score block; d rows of a panel
    SL_KEY_TILE = 384,      // key rows of one online-softmax step; a multiple of SL_ROW_BLOCK
    SL_GRAD_KEY_TILE = 96,  // key rows of one backward tile
    SL_GRAD_ROW_BLOCK = 24, // backward tiles end on multiples of this (of 8 and of 6)
    SL_MAX_LANES = 48,
    SL_MAX_VECTOR = 16,  // floats of the widest vector
    SL_DECODE_ROWS = 4,  // query rows that walk a cache together
    SL_SUM_COLUMNS = 32, // decode's sums are padded to a multiple of this
    SL_NO_DIAGONAL = 1 << 28,
};

typedef uint32_t sl_word;

// Rows of one head in memory, read by position in a sequence: row i is position i for the first n_sink rows,
// start + i - n_sink after that, and zeros from count on. Position x is token first + index[x], or first + x
// without index.
struct sl_rows {
    char *data;     // of token 0; inputs are not written through it
    int64_t stride; // bytes from token to token
    const int32_t *index;
    int64_t first;
    int64_t n_sink;
    int64_t start;
    int64_t count;
    enum sl_dtype dtype;
};

// The token of row i.
static inline int64_t sl_rows_token(const struct sl_rows *rows, int64_t i) {
    const int64_t x = i < rows->n_sink ? i : rows->start + i - rows->n_sink;
    return rows->first + (rows->index ? rows->index[x] : x);
}

static inline char *sl_rows_at(const struct sl_rows *rows, int64_t i) {
    return rows->data + sl_rows_token(rows, i) * rows->stride;
}

// Some slots of a cache's head: slot j lies at data + (index ? index[j] : j) * stride.
struct sl_slots {
    const char *data;
    int64_t stride; // bytes from slot to slot
    const int32_t *index;
    int64_t n; // slots there are, which may be more than a call is about: how far it may prefetch
    enum sl_dtype dtype;
};

// Running softmax of a lane tile, in base 2: max and sum of exp2(scale2 * score - max); rescale is what the
// last step's change of max multiplies older sums by.
struct sl_softmax {
    float max[SL_MAX_LANES];
    float sum[SL_MAX_LANES];
    float rescale[SL_MAX_LANES];
};

struct sl_cpu_kernels {
    int n_lane;   // queries of a lane tile, <= SL_MAX_LANES
    int pair;     // elements of a word
    int n_vector; // floats of a vector, <= SL_MAX_VECTOR

    // ---- packing (d = d_head, d_pad = d rounded up to n_vector, n_kword = d / pair) ----
    // out[n][n_kword]: rows i .. i+n-1 as they are.
    void (*pack_rows)(const struct sl_rows *rows, int64_t d, int64_t i, int64_t n, sl_word *out);
    // out[n / pair][d_pad]: words along the rows; i and n are multiples of pair; columns d.. are zero.
    void (*pack_words)(const struct sl_rows *rows, int64_t d, int64_t i, int64_t n, sl_word *out);
    // out[d / 8][n / pair][8]: the same words in panels of 8 columns.
    void (*pack_panels)(const struct sl_rows *rows, int64_t d, int64_t n, sl_word *out);
    // out[n_kword][n_lane]: rows i .. i+n_lane-1 transposed, up to the vector of the last row;
    // negate flips every sign.
    void (*pack_lanes)(const struct sl_rows *rows, int64_t d, int64_t i, bool negate, sl_word *out);
    // Rows i .. i+n-1 of the destination from in[d][n_lane], lane l multiplied by scale[l]; n <= n_lane.
    void (*unpack_lanes)(const float *in, const float *scale, int64_t d, const struct sl_rows *rows,
                         int64_t i, int64_t n);
    // One destination row from in[d], multiplied by scale.
    void (*unpack_row)(const float *in, float scale, int64_t d, enum sl_dtype dtype, char *row);
    // out[l] = sum over d of a's row i+l times b's, for n rows.
    void (*dot_rows)(const struct sl_rows *a, const struct sl_rows *b, int64_t d, int64_t i, int64_t n,
                     float *out);

    // ---- forward ----
    // scores[n_row][n_lane] = k_rows x q_lanes, masked; top[n_lane] = the visible maximum of each lane (or
    // the lowest finite float). n_row is a multiple of SL_ROW_BLOCK.
    void (*scores)(int live, const sl_word *k_rows, int64_t n_kword, const sl_word *q_lanes, int64_t n_row,
                   int64_t diagonal, int64_t limit, float *scores, float *top);
    // One online-softmax step over scores: updates state and writes the probabilities as words, weights[n_row
    // / pair][n_lane]. weights may be the same memory as scores.
    void (*softmax)(int live, float *scores, const float *top, int64_t n_row, int64_t diagonal, int64_t limit,
                    float scale2, struct sl_softmax *state, sl_word *weights);
    // sums[d][n_lane] = sums * rescale + panels x weights over n_row rows. panel_stride is in words. rescale
    // NULL keeps the old sums as they are; fresh starts from zero. Rows from the diagonal's block on skip the
    // vectors that it masks.
    void (*lanes_add)(int live, const sl_word *panels, int64_t panel_stride, const sl_word *weights,
                      int64_t n_row, int64_t diagonal, const float *rescale, bool fresh, int64_t d,
                      float *sums);

    // ---- backward ----
    // For n_row (a multiple of SL_GRAD_ROW_BLOCK) key rows and one lane tile: P = exp2(scale2 * S - lse2) and
    // dS = P * (V x dO - delta), masked, in the layouts the three remaining products read:
    // p and ds [n_row][n_lane / pair] words along the lanes; ds_lanes [n_row / pair][n_lane] words along the
    // keys (the same memory as ds where pair is 1).
    void (*score_grads)(int live, const sl_word *k_rows, const sl_word *v_rows, int64_t n_kword,
                        const sl_word *q_lanes, const sl_word *grad_lanes, int64_t n_row, int64_t diagonal,
                        int64_t limit, float scale2, const float *lse2, const float *delta, sl_word *p,
                        sl_word *ds, sl_word *ds_lanes);
    // sums[n_row][d_pad] += weights[n_row][n_lane / pair] x words[n_lane / pair][d_pad]. Each tile is summed
    // from zero and added once, which keeps float32 sums short. Lanes that the diagonal masks are skipped.
    void (*rows_add)(int live, const sl_word *weights, const sl_word *words, int64_t n_row, int64_t diagonal,
                     int64_t d, float *sums);

    // ---- scores of a prompt ----
    // sums[n_row][n_vector] += P = exp2(scale2 * S - lse2), masked, the lane vectors of a row on top of each
    // other; n_row is a multiple of SL_ROW_BLOCK. Lanes without a query have FLT_MAX in lse2.
    void (*column_sums)(int live, const sl_word *k_rows, int64_t n_kword, const sl_word *q_lanes,
                        int64_t n_row, int64_t diagonal, float scale2, const float *lse2, float *sums);
    // ---- decode: a few query rows against n slots, which are read once, in the order of memory ----
    // Each row's results have the same bits whatever other rows come along. Rows of logits and weights are
    // padded: what is written beyond n, up to a multiple of SL_MAX_VECTOR, is 0 once softmax has run.
    //
    // out[n_word]: a query row as words, with zeros from d on; n_word is d / pair rounded up to n_vector.
    void (*decode_query)(enum sl_dtype dtype, const char *row, int64_t d, bool negate, sl_word *out);
    // logits[n_row][stride]: queries [n_row][n_word] x slots.
    void (*decode_logits)(int n_row, const sl_word *queries, const struct sl_slots *key, int64_t d, int64_t n,
                          float *logits, int64_t stride);
    // One row: max and sum of p = exp2(scale2 * logit - max) over the first n_visible of n logits, which
    // p replaces (0 from n_visible on); weights are p as words, the logits' own memory where pair is 1. With
    // n_visible 0, max means nothing.
    void (*decode_softmax)(float *logits, int64_t n_visible, int64_t n, float scale2, float *max, float *sum,
                           sl_word *weights);
    // sums[n_row][sum_stride] = weights[n_row][weight_stride words] x slots; the columns are padded to a
    // multiple of SL_SUM_COLUMNS.
    void (*decode_values)(int n_row, const sl_word *weights, int64_t weight_stride,
                          const struct sl_slots *value, int64_t d, int64_t n, float *sums,
                          int64_t sum_stride);
    // One output row: the sum over n parts of parts[i][stride] * factor[i].
    void (*decode_output)(const float *parts, int64_t stride, const float *factor, int64_t n, int64_t d,
                          enum sl_dtype dtype, char *row);
    // out[n]: the sum over n_row rows of p[r][p_stride] * factor[r * factor_stride], times share. Rows with
    // factor 0 are not read. out is padded as p is.
    void (*decode_column_sums)(int64_t n_row, const float *p, int64_t p_stride, const float *factor,
                               int64_t factor_stride, float share, int64_t n, float *out);
    // The slot with the smallest score among those with lowest <= position <= highest, the newest of equals;
    // NaN counts as the largest. -1 where there is none.
    int64_t (*decode_evict)(const float *scores, const int32_t *positions, int64_t n, int32_t lowest,
                            int32_t highest);
};

// The table for a level and an element type; never NULL for an available level and a compute type.
const struct sl_cpu_kernels *sl_cpu_kernels_for(enum sl_cpu_level level, enum sl_dtype dtype);

// One a translation unit under isa/.
extern const struct sl_cpu_kernels sl_kernels_portable;
extern const struct sl_cpu_kernels sl_kernels_avx2;
extern const struct sl_cpu_kernels sl_kernels_avx512;
extern const struct sl_cpu_kernels sl_kernels_avx512_bf16;

#endif
