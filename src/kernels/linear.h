/* Between linear.c and linear_many.c. */
#ifndef PEFTC_KERNELS_LINEAR_H
#define PEFTC_KERNELS_LINEAR_H

#include <string.h>

#include "table.h"

/* From so many rows on the weight is packed instead of x: about where the two cross, see linear.c. */
#define PC_MANY_ROWS 256

/* job->panels is unused, m, n and k are above 0. */
pc_status pc_linear_many(pc_runtime *rt, const pc_linear_job *job, pc_error *err);

#endif
