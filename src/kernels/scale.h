/* Rows of a model's own memory times a vector, forwards and backwards: activations in their own dtype with rows any distance
 * apart, products in f32 (f64 for f64), one rounding at the end.
 *
 * dt is f32, f64, f16 or bf16, and so is the vector's: the same, or f32 where dt has 16 bits.
 */
#ifndef PEFTC_KERNELS_SCALE_H
#define PEFTC_KERNELS_SCALE_H

#include "kernels.h"

/* y (m,n) = x (m,n) ⊙ v (n); y may be x. */
void pc_rows_scale(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, int64_t ldx, pc_dtype vdt,
                   const void *v, void *y, int64_t ldy);

/* Its gradients, each NULL when not wanted, in one pass over grad and x: dx = grad ⊙ v, which may be grad, and
 * dv = Σ_rows grad ⊙ x.  The same whatever the number of threads. */
pc_status pc_rows_scale_back(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *grad, int64_t ldg,
                             const void *x, int64_t ldx, pc_dtype vdt, const void *v, void *dx, int64_t lddx, void *dv,
                             pc_error *err);

#endif
