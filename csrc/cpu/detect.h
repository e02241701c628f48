// Which instruction set the CPU kernels run on.
#ifndef SL_CPU_DETECT_H
#define SL_CPU_DETECT_H

#include "../core/status.h"

// SL_CPU_LEVEL(enum, name), worst first: one micro-kernel table each.
#define SL_CPU_LEVELS(X)                                                                                     \
    X(PORTABLE, "portable")                                                                                  \
    X(AVX2, "avx2")                                                                                          \
    X(AVX512, "avx512")                                                                                      \
    X(AVX512_BF16, "avx512_bf16")

enum sl_cpu_level {
#define SL_CPU_LEVEL(id, name) SL_CPU_##id,
    SL_CPU_LEVELS(SL_CPU_LEVEL)
#undef SL_CPU_LEVEL
        SL_CPU_LEVEL_COUNT
};

const char *sl_cpu_level_name(enum sl_cpu_level level);

// True where this build has the level and the processor and its operating system can run it (CPUID, XGETBV).
bool sl_cpu_level_available(enum sl_cpu_level level);

// The level in use: the best available, or what sl_cpu_level_select chose.
enum sl_cpu_level sl_cpu_level_active(void);

// Chooses by name (SINKLORA_CPU, tests); NULL or "" chooses the best. An unknown or unavailable name is
// SL_INVALID with the names that would do, and changes nothing. Not to be called while an operation runs.
enum sl_status sl_cpu_level_select(const char *name, struct sl_error *err) SL_MUST_CHECK;

#endif
