// Validation of a pattern's settings; apart from pattern.h, which stays free of everything but arithmetic.
#ifndef SL_PATTERN_CHECK_H
#define SL_PATTERN_CHECK_H

#include "pattern.h"
#include "status.h"

// SL_INVALID names the setting that is out of the ranges written at struct sl_pattern.
enum sl_status sl_pattern_check(const struct sl_pattern *pattern, struct sl_error *err) SL_MUST_CHECK;

#endif
