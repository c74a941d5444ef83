/* Low-rank products on a model's own memory: activations in their own dtype with rows any distance apart, sums in
 * f32 (f64 for f64), one rounding at the end.
 *
 * dt is f32, f64, f16 or bf16, of everything in a call.  Rows of x, y, out, grad, dx lie `ld…` elements apart; all
 * other matrices have their rows next to each other.  Outputs overlap nothing, except that out may be y.
 */
#ifndef PEFTC_KERNELS_LOWRANK_H
#define PEFTC_KERNELS_LOWRANK_H

#include "kernels.h"

typedef struct pc_lowrank_term {
    int64_t r;
    double scale;
    const void *a;    /* (r, k) */
    const void *b;    /* (n, r) */
    const void *e;    /* (r), or NULL */
    const void *bias; /* (n), or NULL */
} pc_lowrank_term;

/* The ranks of all terms of a call together. */
#define PC_LOWRANK_MOST 4096

/* out (m,n) = y (m,n) + Σ scale · (((x (m,k) · aᵀ) ⊙ e) · bᵀ + bias).
 * hidden, if not NULL, gets every term's (x · aᵀ)ᵀ, (r,m) in f32, one after the other: the backward pass of one term
 * takes it. NULL for f64.
 * PC_ERR_UNSUPPORTED, nothing written, when the ranks add up to more than PC_LOWRANK_MOST. */
pc_status pc_lowrank_forward(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, int64_t ldx,
                             const void *y, int64_t ldy, void *out, int64_t ldo, const pc_lowrank_term *terms,
                             int count, float *hidden, pc_error *err);

/* Gradients of one term (its bias excepted), each NULL when not wanted: with u = grad (m,n) · b and h = x · aᵀ,
 * dx (m,k) = base (m,k; none: 0; may be dx) + scale · (u ⊙ e) · a, da (r,k) = scale · (u ⊙ e)ᵀ · x, db (n,r) = scale · gradᵀ · (h ⊙ e),
 * de (r) = scale · Σ_rows u ⊙ h.  hidden: what the forward pass wrote, or NULL: h is computed.  The same whatever the
 * number of threads. */
pc_status pc_lowrank_backward(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *grad,
                              int64_t ldg, const void *x, int64_t ldx, const pc_lowrank_term *term,
                              const float *hidden, const void *base, int64_t ldbase, void *dx, int64_t lddx, void *da,
                              void *db, void *de, pc_error *err);

/* Merging: out (n,k) = w + scale · (b ⊙ e) · a, in one pass over the weight; its transpose when `turned`: w and out are
 * (k,n).  The term's bias is not looked at.  out may be w. */
pc_status pc_lowrank_to_weight(pc_runtime *rt, pc_dtype dt, int64_t n, int64_t k, const void *w, int64_t ldw, void *out,
                               int64_t ldo, const pc_lowrank_term *term, bool turned, pc_error *err);

#endif
