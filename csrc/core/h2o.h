// The heavy-hitter cache's operations (SPEC section 2): scores of a prompt, one step of decoding, selection.
//
// Sizes: n_batch, n_head (query heads), n_head_kv (divides n_head), n_query, n_key, d_head. Where there are
// fewer queries than keys, the queries are the last n_query of the n_key (bottom-right); with a padding mask
// the same holds for the columns, and only kept ones count.
//
// All tensors of one call lie on one device; query, key, value and output share one dtype of float32,
// bfloat16, float16, and the last dimension of each is contiguous. Checks, statuses, workspaces, threads and
// determinism are as in attention.h: the check comes before anything is written, the same inputs give the
// same bits for every n_thread.
#ifndef SL_H2O_H
#define SL_H2O_H

#include "check.h"

enum {
    SL_MAX_DECODE_QUERIES = 8, // more new tokens than this are a prompt: attention_forward and h2o_score
};

// A cache's counts for one batch row, int32 each; a tensor "rows" is int32 [n_batch, SL_ROW_FIELDS].
enum sl_row_field {
    SL_ROW_SEEN,   // tokens of the row so far: the position of its next one
    SL_ROW_USED,   // entries that each key/value head holds
    SL_ROW_BUDGET, // entries that each may hold after a step: heavy + recent + sinks
    SL_ROW_RECENT, // newest entries that are never evicted, at least 1
    SL_ROW_FIELDS,
};

// scores[b, hk, k] = the sum over hk's query heads and over the queries q of P[q, k], where
// P = exp(scale * query . key - lse) under the plain causal mask.
struct sl_h2o_score_args {
    struct sl_tensor query;        // [n_batch, n_head, n_query, d_head]
    struct sl_tensor key;          // [n_batch, n_head_kv, n_key, d_head], n_key >= n_query
    struct sl_tensor lse;          // float32 [n_batch, n_head, n_query], contiguous, of the same attention
    struct sl_tensor scores;       // float32 [n_batch, n_head_kv, n_key], contiguous; written, padding gets 0
    struct sl_tensor padding_mask; // optional, bool [n_batch, n_key], true = kept
    int64_t window;                // only the last `window` kept queries of a row count; 0: all
    bool mean;                     // divide by n_head / n_head_kv
    double scale;
    void *stream; // as in attention.h
};

// Attention of 1 to SL_MAX_DECODE_QUERIES new tokens over the slots of a cache, all query heads of a
// key/value head together, so that keys and values are read once. Three uses:
//
// 1. Attention alone: everything optional absent but perhaps padding_mask and lse.
// 2. And scores: scores [.., n_key] are added to, in the same pass.
// 3. One step of an H2O cache (n_query == 1; scores, positions, free_slot, rows, new_key and new_value given,
//    padding_mask absent). The slots of a row are 0 .. USED (USED + 1 of them) once the new token stands in
//    free_slot, which is one of them. For every row whose new token is kept (new_mask):
//    a. new_key and new_value are copied into free_slot; its position becomes SEEN, its score 0;
//    b. the query attends to the USED + 1 slots, each slot's score grows by its probability;
//    c. if USED + 1 > BUDGET, the evictable slot (position >= n_sink and position <= SEEN - RECENT) with the
//       smallest score, the newest of equals, becomes free_slot; its position becomes -1, its score 0.
//       Otherwise USED grows by 1 and free_slot becomes the new USED;
//    d. SEEN grows by 1.
//    A row whose new token is padding gets output 0 and nothing of it changes.
//    Values of rows and free_slot are clamped to the buffers, so wrong ones give wrong results, never an
//    overrun.
struct sl_h2o_decode_args {
    struct sl_tensor query;  // [n_batch, n_head, n_query, d_head]
    struct sl_tensor key;    // [n_batch, n_head_kv, n_key, d_head], any strides; written in use 3
    struct sl_tensor value;  // like key
    struct sl_tensor output; // like query, written; padded rows are 0
    struct sl_tensor lse;    // optional, float32 [n_batch, n_head, n_query], contiguous, written

    struct sl_tensor padding_mask; // optional, bool [n_batch, n_key]
    struct sl_tensor scores;       // optional, float32 [n_batch, n_head_kv, n_key], contiguous, added to
    int64_t window;                // as in h2o_score, with n_query > 1
    bool mean;

    struct sl_tensor new_key;   // [n_batch, n_head_kv, 1, d_head]
    struct sl_tensor new_value; // like new_key
    struct sl_tensor new_mask;  // optional, bool [n_batch, 1], true = kept
    struct sl_tensor positions; // int32 [n_batch, n_head_kv, n_key], contiguous; -1 in unused slots
    struct sl_tensor free_slot; // int32 [n_batch, n_head_kv], contiguous
    struct sl_tensor rows;      // int32 [n_batch, SL_ROW_FIELDS], contiguous
    int64_t n_sink;
    double scale;
    void *stream;
};

// Keeps, per batch row and key/value head, the RECENT newest of the used entries, the sinks (position <
// n_sink) and of the rest those with the largest scores, BUDGET in all (fewer where there are fewer), ties to
// the older. Used entries are those with position >= 0; NaN scores count as the largest. The kept ones move,
// in the order of their slots, to the first slots of the outputs; the outputs' other slots get position -1
// and score 0, their keys and values are not written. rows: USED is written (the number kept), the rest read.
// An output may be the input itself (same data, strides and dtype): compaction in place.
struct sl_h2o_select_args {
    struct sl_tensor key;       // [n_batch, n_head_kv, n_key, d_head]
    struct sl_tensor value;     // like key
    struct sl_tensor scores;    // float32 [n_batch, n_head_kv, n_key], contiguous
    struct sl_tensor positions; // int32 [n_batch, n_head_kv, n_key], contiguous
    struct sl_tensor rows;      // int32 [n_batch, SL_ROW_FIELDS], contiguous
    struct sl_tensor
        key_out; // [n_batch, n_head_kv, n_slot, d_head]; n_slot at least what is kept, else SL_INVALID
    struct sl_tensor value_out;
    struct sl_tensor scores_out;    // float32 [n_batch, n_head_kv, n_slot], contiguous
    struct sl_tensor positions_out; // int32 [n_batch, n_head_kv, n_slot], contiguous
    int64_t n_sink;
    void *stream;
};

enum sl_status sl_h2o_score_check(const struct sl_h2o_score_args *args, struct sl_error *err) SL_MUST_CHECK;
int64_t sl_h2o_score_workspace(const struct sl_h2o_score_args *args, int n_thread);
enum sl_status sl_h2o_score(const struct sl_h2o_score_args *args, void *workspace, int64_t n_byte,
                            int n_thread, struct sl_error *err) SL_MUST_CHECK;

enum sl_status sl_h2o_decode_check(const struct sl_h2o_decode_args *args, struct sl_error *err) SL_MUST_CHECK;
int64_t sl_h2o_decode_workspace(const struct sl_h2o_decode_args *args, int n_thread);
enum sl_status sl_h2o_decode(const struct sl_h2o_decode_args *args, void *workspace, int64_t n_byte,
                             int n_thread, struct sl_error *err) SL_MUST_CHECK;

enum sl_status sl_h2o_select_check(const struct sl_h2o_select_args *args, struct sl_error *err) SL_MUST_CHECK;
int64_t sl_h2o_select_workspace(const struct sl_h2o_select_args *args, int n_thread);
enum sl_status sl_h2o_select(const struct sl_h2o_select_args *args, void *workspace, int64_t n_byte,
                             int n_thread, struct sl_error *err) SL_MUST_CHECK;

// What a device folder implements.
int64_t sl_cpu_h2o_score_workspace(const struct sl_h2o_score_args *args, int n_thread);
enum sl_status sl_cpu_h2o_score(const struct sl_h2o_score_args *args, void *workspace, int64_t n_byte,
                                int n_thread, struct sl_error *err) SL_MUST_CHECK;
int64_t sl_cpu_h2o_decode_workspace(const struct sl_h2o_decode_args *args, int n_thread);
enum sl_status sl_cpu_h2o_decode(const struct sl_h2o_decode_args *args, void *workspace, int64_t n_byte,
                                 int n_thread, struct sl_error *err) SL_MUST_CHECK;
int64_t sl_cpu_h2o_select_workspace(const struct sl_h2o_select_args *args, int n_thread);
enum sl_status sl_cpu_h2o_select(const struct sl_h2o_select_args *args, void *workspace, int64_t n_byte,
                                 int n_thread, struct sl_error *err) SL_MUST_CHECK;

// As in attention.h. h2o_select trusts that what is kept fits n_slot, and keeps no more than n_slot.
int64_t sl_cuda_h2o_score_workspace(const struct sl_h2o_score_args *args);
enum sl_status sl_cuda_h2o_score(const struct sl_h2o_score_args *args, void *workspace, int64_t n_byte,
                                 struct sl_error *err) SL_MUST_CHECK;
int64_t sl_cuda_h2o_decode_workspace(const struct sl_h2o_decode_args *args);
enum sl_status sl_cuda_h2o_decode(const struct sl_h2o_decode_args *args, void *workspace, int64_t n_byte,
                                  struct sl_error *err) SL_MUST_CHECK;
int64_t sl_cuda_h2o_select_workspace(const struct sl_h2o_select_args *args);
enum sl_status sl_cuda_h2o_select(const struct sl_h2o_select_args *args, void *workspace, int64_t n_byte,
                                  struct sl_error *err) SL_MUST_CHECK;

#endif
