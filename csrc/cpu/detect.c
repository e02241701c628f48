#include "detect.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#include <cpuid.h>

static uint64_t enabled_state(void) { // XCR0: which registers the operating system saves
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static enum sl_cpu_level best_level(void) {
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29 };
    enum { AVX2 = 1 << 5, AVX512F = 1 << 16, AVX512DQ = 1 << 17, AVX512BW = 1 << 30 };
    enum { AVX512_BF16 = 1 << 5 };
    const uint32_t avx512vl = 1u << 31;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return SL_CPU_PORTABLE;
    }
    const uint32_t base = FMA | OSXSAVE | AVX | F16C;
    if ((c & base) != base || (enabled_state() & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) ||
        !(b & AVX2)) {
        return SL_CPU_PORTABLE;
    }
    const uint32_t wide = AVX512F | AVX512DQ | AVX512BW | avx512vl;
    if ((b & wide) != wide || (enabled_state() & 0xe6) != 0xe6) {
        return SL_CPU_AVX2;
    }
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX512_BF16) ? SL_CPU_AVX512_BF16 : SL_CPU_AVX512;
}
#else
static enum sl_cpu_level best_level(void) {
    return SL_CPU_PORTABLE;
}
#endif

static atomic_int chosen = -1;

const char *sl_cpu_level_name(enum sl_cpu_level level) {
    static const char *const names[] = {
#define SL_CPU_LEVEL(id, name) name,
        SL_CPU_LEVELS(SL_CPU_LEVEL)
#undef SL_CPU_LEVEL
    };
    return names[level];
}

bool sl_cpu_level_available(enum sl_cpu_level level) {
    return level <= best_level();
}

enum sl_cpu_level sl_cpu_level_active(void) {
    int level = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (level < 0) {
        level = (int)best_level();
        atomic_store_explicit(&chosen, level, memory_order_relaxed);
    }
    return (enum sl_cpu_level)level;
}

enum sl_status sl_cpu_level_select(const char *name, struct sl_error *err) {
    if (!name || !*name) {
        atomic_store(&chosen, (int)best_level());
        return SL_OK;
    }
    char names[128] = "";
    for (int level = 0; level < SL_CPU_LEVEL_COUNT && sl_cpu_level_available((enum sl_cpu_level)level);
         level++) {
        const char *known = sl_cpu_level_name((enum sl_cpu_level)level);
        if (strcmp(name, known) == 0) {
            atomic_store(&chosen, level);
            return SL_OK;
        }
        const size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, used ? ", %s" : "%s", known);
    }
    return sl_error_set(err, SL_INVALID,
                        "SINKLORA_CPU: expected one of the levels available here (%s), got \"%s\"", names,
                        name);
}
