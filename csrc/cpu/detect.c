#include "detect.h"

#include <string.h>

const char *sl_cpu_level_name(enum sl_cpu_level level) {
    static const char *const names[] = {
#define SL_CPU_LEVEL(id, name) name,
        SL_CPU_LEVELS(SL_CPU_LEVEL)
#undef SL_CPU_LEVEL
    };
    return names[level];
}
bool sl_cpu_level_available(enum sl_cpu_level level) { return level == SL_CPU_PORTABLE; }
enum sl_cpu_level sl_cpu_level_active(void) { return SL_CPU_PORTABLE; }
enum sl_status sl_cpu_level_select(const char *name, struct sl_error *err) {
    if (!name || !*name || !strcmp(name, "portable")) { return SL_OK; }
    return sl_error_set(err, SL_INVALID, "SINKLORA_CPU: expected one of portable, got %s", name);
}
