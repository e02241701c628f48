// SF-Attn's operation: its arguments, the one check of them, and the dispatch by device.
//
// Sizes: n_batch, n_head (query heads), n_head_kv (divides n_head), n_token, n_past, d_head.
#ifndef SL_ATTENTION_H
#define SL_ATTENTION_H

#include "check.h"
#include "pattern.h"
#include "status.h"
#include "tensor.h"

// All tensors of one call lie on one device; query, key, value, output and the gradients share one dtype of
// float32, bfloat16, float16. The last dimension of each is contiguous. Outputs must not overlap inputs or
// each other (not checked). The operation owns nothing here.
struct sl_attention_args {
    struct sl_tensor query;  // [n_batch, n_head, n_token, d_head]
    struct sl_tensor key;    // [n_batch, n_head_kv, n_past + n_token, d_head]
    struct sl_tensor value;  // like key
    struct sl_tensor output; // like query; written by forward, read by backward; forward without value and
                             // output writes lse alone
    struct sl_tensor lse;    // float32 [n_batch, n_head, n_token], contiguous; likewise

    // Backward only; absent (n_dim 0) in forward.
    struct sl_tensor grad_output; // like query, read
    struct sl_tensor grad_query;  // like query, written
    struct sl_tensor grad_key;    // like key, written
    struct sl_tensor grad_value;  // like key, written

    // At most one of these three is given; without any, each batch row is one sequence.
    struct sl_tensor cu_seqlens;   // int32 [n_sequence + 1], n_batch == 1: 0 = first <= ... <= last = n_token
    struct sl_tensor padding_mask; // bool [n_batch, n_past + n_token], true = kept
    struct sl_tensor position_ids; // int64 [n_batch or 1, n_token]: a sequence starts at token 0 and wherever
                                   // a position is not greater than the one before

    // Keys before the first query: the queries are the last n_token of the sequence (with a padding mask: the
    // last n_token columns, of which the kept ones count). 0 in the backward, and with cu_seqlens or
    // position_ids.
    int64_t n_past;

    struct sl_pattern pattern;
    double scale; // finite; multiplies query . key
    void *stream; // CUDA: the stream that the work is put on, NULL for the default one; unused on the CPU
};

// Validates everything before anything is written. The message names the argument, expected and got:
// SL_INVALID shapes, settings, devices; SL_TYPE dtypes; SL_UNSUPPORTED head dims and devices this build
// lacks; SL_EXCHANGE a read-only output or a NULL pointer to a tensor that has elements.
enum sl_status sl_attention_forward_check(const struct sl_attention_args *args,
                                          struct sl_error *err) SL_MUST_CHECK;
enum sl_status sl_attention_backward_check(const struct sl_attention_args *args,
                                           struct sl_error *err) SL_MUST_CHECK;

// The part of both that concerns cu_seqlens alone, for n_token tokens. Its values are read on the CPU only.
enum sl_status sl_cu_seqlens_check(const struct sl_tensor *cu_seqlens, int64_t n_token,
                                   struct sl_error *err) SL_MUST_CHECK;

// Bytes of scratch memory that the operation needs with n_thread threads; any alignment will do. args passed
// the check.
int64_t sl_attention_forward_workspace(const struct sl_attention_args *args, int n_thread);
int64_t sl_attention_backward_workspace(const struct sl_attention_args *args, int n_thread);

// output (where given) and lse from query, key, value. workspace holds n_byte bytes, at least what was asked
// for above with the same args and n_thread. The same inputs give the same bits for every n_thread. args
// passed the check. SL_RUNTIME where the sequence tensors were written to since the workspace was sized; then
// no output was written.
enum sl_status sl_attention_forward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                    int n_thread, struct sl_error *err) SL_MUST_CHECK;

// grad_query, grad_key, grad_value from grad_output and what forward saved. As above.
enum sl_status sl_attention_backward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                     int n_thread, struct sl_error *err) SL_MUST_CHECK;

// What a device folder implements; the functions above choose between them.
int64_t sl_cpu_attention_forward_workspace(const struct sl_attention_args *args, int n_thread);
int64_t sl_cpu_attention_backward_workspace(const struct sl_attention_args *args, int n_thread);
enum sl_status sl_cpu_attention_forward(const struct sl_attention_args *args, void *workspace, int64_t n_byte,
                                        int n_thread, struct sl_error *err) SL_MUST_CHECK;
enum sl_status sl_cpu_attention_backward(const struct sl_attention_args *args, void *workspace,
                                         int64_t n_byte, int n_thread, struct sl_error *err) SL_MUST_CHECK;

// The CUDA functions return when the work is on args->stream; workspace is device memory, in use until the
// stream has passed. They read no values on the host: sequence tensors that say nonsense give unspecified
// results, never an access outside the tensors.
int64_t sl_cuda_attention_forward_workspace(const struct sl_attention_args *args);
int64_t sl_cuda_attention_backward_workspace(const struct sl_attention_args *args);
enum sl_status sl_cuda_attention_forward(const struct sl_attention_args *args, void *workspace,
                                         int64_t n_byte, struct sl_error *err) SL_MUST_CHECK;
enum sl_status sl_cuda_attention_backward(const struct sl_attention_args *args, void *workspace,
                                          int64_t n_byte, struct sl_error *err) SL_MUST_CHECK;

#endif
