// How the C core reports: a status, and a message that names the argument, what was expected and what came.
// Nothing in the core prints, exits or raises.
#ifndef SL_STATUS_H
#define SL_STATUS_H

#include "portable.h"

enum sl_status {
#define SL_STATUS(name, exception) SL_##name,
#include "status.def"
#undef SL_STATUS
};

// Owned by the caller; text is valid only after a status other than SL_OK.
struct sl_error {
    char text[400];
};

// Formats the message into err (which may be NULL) and returns status, so that a check is one line.
enum sl_status sl_error_set(struct sl_error *err, enum sl_status status, const char *format, ...)
    SL_PRINTF(3, 4);

// Returns from the calling function when expr is not SL_OK.
#define SL_TRY(expr)                                                                                         \
    do {                                                                                                     \
        enum sl_status sl_try_status_ = (expr);                                                              \
        if (sl_try_status_ != SL_OK) {                                                                       \
            return sl_try_status_;                                                                           \
        }                                                                                                    \
    } while (0)

#endif
