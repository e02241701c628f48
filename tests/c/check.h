// What the C tests share: a check that says where and why it failed, and goes on.
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

enum { CHECK_MAX_REPORTS = 20 };

static long check_count, check_failed;

// CHECK(condition, "printf format of the case", ...): counts, and reports the first few failures to stderr.
#define CHECK(condition, ...)                                                                                \
    do {                                                                                                     \
        check_count++;                                                                                       \
        if (!(condition) && check_failed++ < CHECK_MAX_REPORTS) {                                            \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                  \
            fprintf(stderr, __VA_ARGS__);                                                                    \
            fputc('\n', stderr);                                                                             \
        }                                                                                                    \
    } while (0)

// The exit status of a test program, after one closing line.
static inline int check_finish(const char *name) {
    printf("%s: %ld checks, %ld failed\n", name, check_count, check_failed);
    return check_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

#endif
