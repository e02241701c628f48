// Failures: the first one of a launch is kept as text; its block is abandoned and the launch returns an
// error.
#include "engine.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static char report[4096];
uint64_t emu_seed_value = 1;

const char *emu_report(void) {
    return report;
}

bool emu_has_failed() {
    return report[0] != 0;
}

void emu_clear_report() {
    report[0] = 0;
}

void emu_seed(uint64_t seed) {
    emu_seed_value = seed;
}

__attribute__((constructor)) static void seed_from_environment() {
    const char *text = getenv("SINKLORA_EMULATOR_SEED");
    emu_seed_value = text && *text ? strtoull(text, NULL, 0) : 1;
}

// A plain access knows only its instruction: addr2line, of the tools that built this library, finds the line.
static void resolve(char *text, size_t size, int offset) {
    Dl_info info;
    if (!dladdr((void *)&emu_self, &info) || !info.dli_fname) {
        snprintf(text, size, "plain access");
        return;
    }
    char command[1200], line[600] = "";
    snprintf(command, sizeof command, "addr2line -e '%s' 0x%x 2>/dev/null", info.dli_fname,
             (unsigned)offset - 1);
    FILE *pipe = popen(command, "r");
    if (pipe) {
        if (!fgets(line, sizeof line, pipe)) {
            line[0] = 0;
        }
        pclose(pipe);
    }
    line[strcspn(line, "\n")] = 0;
    const char *in_tree = strstr(line, "/csrc/");
    snprintf(text, size, "%s (plain access)", in_tree ? in_tree + 1 : line[0] ? line : "no line");
}

const char *emu_site_text(emu_site site) {
    static char texts[4][700];
    static int next;
    char *text = texts[next++ & 3];
    if (site.file) {
        snprintf(text, sizeof texts[0], "%s:%d", site.file, site.line);
    } else {
        resolve(text, sizeof texts[0], site.line);
    }
    return text;
}

static void record(emu_site site, const char *format, va_list values) {
    if (emu_has_failed()) {
        return;
    }
    char text[3000];
    vsnprintf(text, sizeof text, format, values);
    int n = snprintf(report, sizeof report, "%s: %s", emu_site_text(site), text);
    if (emu_self && n < (int)sizeof report) {
        snprintf(report + n, sizeof report - (size_t)n, " [block %u,%u,%u thread %d seed %llu]", blockIdx.x,
                 blockIdx.y, blockIdx.z, emu_me()->warp * 32 + emu_me()->lane,
                 (unsigned long long)emu_seed_value);
    }
}

void emu_record(emu_site site, const char *format, ...) {
    va_list values;
    va_start(values, format);
    record(site, format, values);
    va_end(values);
}

void emu_fail(emu_site site, const char *format, ...) {
    va_list values;
    va_start(values, format);
    record(site, format, values);
    va_end(values);
    emu_b.failed = true;
    emu_fiber_switch(NULL, NULL); // this block's fibers are never resumed
    abort();
}
