// What the kernels of select share.
#pragma once

#include "../host.h"

struct sl_select_params {
    const float *scores;
    const int32_t *positions;
    float *scores_out;
    int32_t *positions_out, *rows;
    uint32_t *keys;  // [b, hk, 4 * n_quad]: what entries are ranked by, the larger the better; 0: never kept
    int32_t *list;   // [b, hk, n_list]: the kept slots, in order
    int32_t *n_kept; // [b, hk]
    struct sl_heads from[2], to[2]; // keys, values; strides count words
    int64_t n_sink;
    int32_t n_batch, n_head_kv, n_key, n_slot, n_quad, n_list;
    int32_t n_word, n_lane;           // words of a row; threads side by side on one, a power of two
    int32_t n_slice, n_split, n_rows; // blocks of a tensor of a head; rows of a split
};

enum sl_status sl_select_choose(const struct sl_cuda_call *call,
                                const struct sl_select_params *p) SL_MUST_CHECK;
enum sl_status sl_select_move(const struct sl_cuda_call *call, const struct sl_select_params *p,
                              int word_bytes) SL_MUST_CHECK;
