/* What every ISA file includes first. */
#ifndef PEFTC_KERNELS_SIMD_COMMON_H
#define PEFTC_KERNELS_SIMD_COMMON_H

#include <math.h>
#include <string.h>

#include "table.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define ALIGNED _Alignas(64)

#define ROW_OPS_LINKAGE static

#endif
