#include "status.h"

#include <stdarg.h>
#include <stdio.h>

enum sl_status sl_error_set(struct sl_error *err, enum sl_status status, const char *format, ...) {
    if (err) {
        va_list list;
        va_start(list, format);
        vsnprintf(err->text, sizeof err->text, format, list);
        va_end(list);
    }
    return status;
}
