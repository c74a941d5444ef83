/* AdaLora's training beside the gradient step (Zhang et al. 2023, sections 3.2 and 3.3): how important each singular
 * value is, how many may stay at a step, and which; and the term that keeps the factors orthogonal.
 *
 * Everything here works on plain arrays of one dtype, PC_F32 or PC_F64, without gaps, so that any host can use it.  A
 * triplet is singular value i with row i of A (r, in) and column i of B (out, r).
 */
#ifndef PEFTC_METHODS_ADALORA_BUDGET_H
#define PEFTC_METHODS_ADALORA_BUDGET_H

#include <stdbool.h>
#include <stdint.h>

#include "../core/dtype.h"
#include "../core/parallel.h"
#include "../core/status.h"

/* Are all products of n parameters and their gradients finite?  grad == NULL is a gradient of zeros. */
bool pc_importance_is_finite(pc_runtime *rt, pc_dtype dtype, int64_t n, const void *parameter, const void *grad);

/* Let the averages of n parameters take in a step: with i = |parameter · grad|,
 *     sensitivity ← beta1 · sensitivity + (1 − beta1) · i
 *     uncertainty ← beta2 · uncertainty + (1 − beta2) · |i − sensitivity|
 * each operation rounded to dtype, as torch does it. */
void pc_importance_update(pc_runtime *rt, pc_dtype dtype, int64_t n, const void *parameter, const void *grad,
                          double beta1, double beta2, void *sensitivity, void *uncertainty);

/* The averages of one module's tensors. */
typedef struct pc_importance {
    const void *sensitivity, *uncertainty;
} pc_importance;

/* Score of each of r triplets: that of E plus the means over the row of A and the column of B, where the score of an
 * element is sensitivity · uncertainty. */
void pc_triplet_scores(pc_dtype dtype, int64_t r, int64_t in, int64_t out, pc_importance a, pc_importance b,
                       pc_importance e, double *scores);

/* The score that a triplet must exceed to be among the best `keep` of n: the (n − keep)-th smallest one, NaN counting
 * as the largest; −infinity when all may stay, the largest when none may.  As all that do not exceed it go, ties may
 * leave fewer than `keep`. */
pc_status pc_rank_threshold(int64_t n, const double *scores, int64_t keep, double *threshold, pc_error *err);

typedef struct pc_rank_schedule {
    int64_t tinit, tfinal, total_step, interval; /* interval: deltaT */
    int64_t initial, target; /* triplets of all modules at the start and at the end */
} pc_rank_schedule;

/* How many triplets may stay at this step, and whether it is one at which the others go.  Until tinit all stay, from
 * total_step − tfinal on `target` do, and in between their number falls with the third power. */
int64_t pc_rank_budget(const pc_rank_schedule *schedule, int64_t step, bool *allocate);

/* ‖G − I‖ (Frobenius), where G is the Gram matrix of r vectors of n numbers: the rows of matrix (r, n), or with
 * `columns` the columns of (n, r).  If grad is not NULL, `scale` times the derivative is added to it (shaped like
 * matrix); where the norm is 0 that is 0. */
pc_status pc_orthogonality(pc_runtime *rt, pc_dtype dtype, int64_t r, int64_t n, bool columns, const void *matrix,
                           double scale, void *grad, double *norm, pc_error *err);

#endif
