/* Gradients of the kernels in kernels.h, and what optimizers do with them.
 *
 * The conventions are those of kernels.h.  dy is the gradient of the loss with respect to a result, dx that with respect
 * to an input.  Sums over rows are added up in one order whatever the number of threads.
 */
#ifndef PEFTC_KERNELS_GRADIENTS_H
#define PEFTC_KERNELS_GRADIENTS_H

#include "../core/rng.h"
#include "kernels.h"

/* -------------------------------------------------------------- linear layers */

/* dx (m,k) = dy (m,n) · w, or += with `add`; w (n,k) as Linear stores it, or (k,n) as Conv1D does when `turned`. */
pc_status pc_linear_dx(pc_runtime *rt, pc_dtype dt, bool turned, bool add, int64_t m, int64_t n, int64_t k,
                       const void *dy, pc_dtype wdt, const void *w, void *dx, pc_error *err);
/* dw += dyᵀ · x for dy (m,n) and x (m,k), laid out like w; dw is of dtype dt. */
pc_status pc_linear_dw(pc_runtime *rt, pc_dtype dt, bool turned, int64_t m, int64_t n, int64_t k, const void *dy,
                       const void *x, void *dw, pc_error *err);
/* sums (n) += scale · Σ over rows of a (m,n), or of a ⊙ b when b is not NULL. */
void pc_sum_rows(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *a, const void *b, double scale,
                 void *sums);
/* sums (m) += scale · Σ over the columns of a (m,n) ⊙ b (b may be NULL). */
void pc_sum_columns(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *a, const void *b, double scale,
                    void *sums);

/* ---------------------------------------------------------------- elementwise */

/* dx (n) = dy ⊙ act'; saved is the output for relu and tanh, the input otherwise; dx may be dy. */
void pc_activate_back(pc_runtime *rt, pc_dtype dt, pc_activation_fn act, int64_t n, const void *saved, const void *dy,
                      void *dx);
/* Does pc_activate_back want the activation's output (or its input)? */
static inline bool pc_activation_saves_output(pc_activation_fn act)
{
    return act == PC_ACT_RELU || act == PC_ACT_TANH;
}

/* -------------------------------------------------------------- normalisation */

/* Of y = LayerNorm(x) or (centred false) RMSNorm(x), x (m,n) being the input with the residual added: dx = the gradient,
 * NULL when not wanted; dweight (n) and dbias (n), of dtype dt, are added to, NULL when not wanted.  dx may be dy when
 * dweight and dbias are NULL. */
pc_status pc_norm_back(pc_runtime *rt, pc_dtype dt, bool centred, int64_t m, int64_t n, const void *x, pc_dtype wdt,
                       const void *weight, double eps, const void *dy, void *dx, void *dweight, void *dbias,
                       pc_error *err);

/* dx (m,n) of y = softmax of each row; dx may be dy. */
void pc_softmax_back(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *y, const void *dy, void *dx);

/* ------------------------------------------------------------------ attention */

typedef struct pc_attention_shape {
    int64_t batch, heads, tq, tk, dim;
    double scale;
    double dropout; /* of the probabilities: 0 for none */
    pc_rng rng;     /* that it draws from */
} pc_attention_shape;

/* pc_attention with dropout of the probabilities. */
pc_status pc_attention_train(pc_runtime *rt, pc_dtype dt, const pc_attention_shape *shape, const void *q, const void *k,
                             const void *v, const uint8_t *mask, void *out, pc_error *err);
/* Its gradients, each NULL when not wanted; the probabilities are computed again.  A row whose keys are all masked
 * gives nothing to q and k. */
pc_status pc_attention_back(pc_runtime *rt, pc_dtype dt, const pc_attention_shape *shape, const void *q, const void *k,
                            const void *v, const uint8_t *mask, const void *dy, void *dq, void *dk, void *dv,
                            pc_error *err);

/* ---------------------------------------------------------- embedding and conv */

/* dtable (num, dim)[ids] += dy (n, dim), in the order of the ids; those equal to `skip` get nothing (-1: none). */
void pc_scatter_rows(pc_dtype dt, int64_t n, int64_t dim, const int64_t *ids, int64_t skip, const void *dy,
                     void *dtable);

/* Of y = conv2d(x, w): dx is written (added to with `add`), dw of dtype dt and laid out like w is added to; each NULL
 * when not wanted. */
pc_status pc_conv2d_back(pc_runtime *rt, pc_dtype dt, const pc_conv_shape *shape, const void *x, pc_dtype wdt,
                         const void *w, const void *dy, bool add, void *dx, void *dw, pc_error *err);

/* --------------------------------------------------------------------- losses */

typedef struct pc_cross_entropy_options {
    int64_t ignore;     /* rows with this label do not count */
    double smoothing;   /* share of the target that is spread over all classes */
    const void *weight; /* (n) of dtype dt, or NULL */
    bool mean;          /* divide by the weights of the rows that count; else the sum */
} pc_cross_entropy_options;

/* row_loss (m) = cross entropy of logits (m,n) and labels (m), each 0 … n - 1 or `ignore`, loss = their sum or mean,
 * grad (m,n) = its gradient.  loss is NaN when no row counts and the mean is asked for. */
void pc_cross_entropy(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *logits, const int64_t *labels,
                      const pc_cross_entropy_options *options, double *row_loss, double *loss, void *grad);

/* ----------------------------------------------------------------- optimizers */

/* One tensor, or several that lie one after the other. */
typedef struct pc_update {
    int64_t n;
    pc_dtype dtype;       /* of data */
    pc_dtype grad_dtype;
    void *data;
    const void *grad;
    void *state[2];       /* f32, f64 when data is: AdamW's two averages; SGD's momentum or NULL */
    bool first;           /* SGD: the momentum starts with this gradient */
} pc_update;

typedef struct pc_adamw {
    double lr, beta1, beta2, eps, weight_decay;
    double correction1, correction2; /* 1 - βᵗ */
    bool maximize;
} pc_adamw;

typedef struct pc_sgd {
    double lr, momentum, dampening, weight_decay;
    bool nesterov, maximize;
} pc_sgd;

/* torch.optim.AdamW's and SGD's steps. */
void pc_adamw_step(pc_runtime *rt, const pc_adamw *options, const pc_update *updates, size_t count);
void pc_sgd_step(pc_runtime *rt, const pc_sgd *options, const pc_update *updates, size_t count);

/* The first of n elements that is NaN or infinite, or -1. */
int64_t pc_first_not_finite(pc_dtype dtype, const void *values, int64_t n);
/* (Σ |x|^kind)^(1/kind), in double; the largest |x| when kind is infinite. */
double pc_norm(pc_dtype dtype, const void *values, int64_t n, double kind);

#endif
