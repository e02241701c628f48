// Checks of borrowed arrays that every operation makes. Each message names the argument, what was expected
// and what came; each status is the one that core/attention.h documents.
#ifndef SL_CHECK_H
#define SL_CHECK_H

#include "status.h"
#include "tensor.h"

enum { SL_MAX_HEAD_DIM = 256, SL_SHAPE_TEXT = 160 };

// Shapes as people write them: "(2, 8, 16, 64)". Returns text.
const char *sl_shape_text(const struct sl_tensor *t, char text[SL_SHAPE_TEXT]);

enum sl_status sl_check_shape(const char *name, const struct sl_tensor *t, int32_t n_dim,
                              const int64_t *shape, struct sl_error *err) SL_MUST_CHECK;
enum sl_status sl_check_dtype(const char *name, const struct sl_tensor *t, enum sl_dtype dtype,
                              struct sl_error *err) SL_MUST_CHECK;

// A device that this build computes on, with sizes that its kernels count in 32 bits where it is a GPU.
enum sl_status sl_check_device(const char *name, const struct sl_tensor *t,
                               struct sl_error *err) SL_MUST_CHECK;

// The query's device, memory where there are elements, writable where it is written, and for tensors of rows
// (last_contiguous) a contiguous last dimension.
enum sl_status sl_check_memory(const char *name, const struct sl_tensor *t, const struct sl_tensor *query,
                               bool last_contiguous, bool written, struct sl_error *err) SL_MUST_CHECK;

// dtype, shape and memory of rows like another tensor's.
enum sl_status sl_check_like(const char *name, const struct sl_tensor *t, const struct sl_tensor *like,
                             bool written, struct sl_error *err) SL_MUST_CHECK;

// Memory as above, and contiguous in every dimension.
enum sl_status sl_check_dense(const char *name, const struct sl_tensor *t, const struct sl_tensor *query,
                              bool written, struct sl_error *err) SL_MUST_CHECK;

// dtype, shape and contiguous memory of an array that stands beside the queries or keys.
enum sl_status sl_check_array(const char *name, const struct sl_tensor *t, enum sl_dtype dtype, int32_t n_dim,
                              const int64_t *shape, const struct sl_tensor *query, bool written,
                              struct sl_error *err) SL_MUST_CHECK;

// A bool mask [n_batch, n_token], of any strides.
enum sl_status sl_check_mask(const char *name, const struct sl_tensor *t, int64_t n_batch, int64_t n_token,
                             const struct sl_tensor *query, struct sl_error *err) SL_MUST_CHECK;

// What multiplies query . key.
enum sl_status sl_check_scale(double scale, struct sl_error *err) SL_MUST_CHECK;

// What a query [n_batch, n_head, n_query, d_head] and a key [n_batch, n_head_kv, n_key, d_head] must satisfy
// for every operation; how many tokens each has is the operation's own check.
enum sl_status sl_check_query_key(const struct sl_tensor *query, const struct sl_tensor *key,
                                  struct sl_error *err) SL_MUST_CHECK;

#endif
