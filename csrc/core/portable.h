// The only compiler switches of the core: C11, C++17 and CUDA read these headers unchanged.
#ifndef SL_PORTABLE_H
#define SL_PORTABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define SL_HD __host__ __device__
#else
#define SL_HD
#endif

#if defined(__cplusplus)
#define SL_RESTRICT __restrict__
#define SL_STATIC_ASSERT static_assert
#else
#define SL_RESTRICT restrict
#define SL_STATIC_ASSERT _Static_assert
#endif

#if defined(__GNUC__) || defined(__clang__)
#define SL_MUST_CHECK __attribute__((warn_unused_result))
#define SL_PRINTF(text, first) __attribute__((format(printf, text, first)))
#define SL_PREFETCH(p) __builtin_prefetch(p)
#else
#define SL_MUST_CHECK
#define SL_PRINTF(text, first)
#define SL_PREFETCH(p) ((void)0)
#endif

#endif
