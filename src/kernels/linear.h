/* Between linear.c and linear_many.c. */
#ifndef PEFTC_KERNELS_LINEAR_H
#define PEFTC_KERNELS_LINEAR_H

#include <string.h>

#include "table.h"

/* job->panels is unused, m, n and k are above 0. */
pc_status pc_linear_many(pc_runtime *rt, const pc_linear_job *job, pc_error *err);

#endif
