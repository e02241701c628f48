#include "common.inc"

#include "vector_portable.h"

#include "float_words.inc"

#include "pack.inc"

#include "forward.inc"

#include "backward.inc"

#include "column_sums.inc"

#include "decode.inc"

#include "evict.inc"

#define TABLE sl_kernels_portable
#include "table.inc"
