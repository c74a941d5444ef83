/* Numeric kernels: matrix products, the pieces of a transformer, conversions.
 *
 * Conventions.  Every matrix is row-major.  `dt` is the compute dtype, PC_F32
 * or PC_F64, of all activations; a weight may be stored as f32, f64, f16 or
 * bf16 (`wdt`) and is widened on the fly.  Buffers do not overlap unless a
 * function says "in place".  Any extent may be 0.  rt may be NULL (one
 * thread).  Results do not depend on the thread count except for the order of
 * additions inside OpenBLAS.
 */
#ifndef PEFTC_KERNELS_KERNELS_H
#define PEFTC_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "../core/dtype.h"
#include "../core/parallel.h"
#include "../core/status.h"

/* ---------------------------------------------------------------- conversion */

/* dst (n,) ← src (n,), between any two of f32, f64, f16, bf16 (same dtype: a copy). */
void pc_convert(pc_runtime *rt, pc_dtype dst_dtype, void *dst, pc_dtype src_dtype, const void *src, int64_t n);

/* ----------------------------------------------------------- matrix products */

typedef enum pc_activation_fn {
    PC_ACT_NONE = 0,
    PC_ACT_GELU,      /* exact: 0.5 x (1 + erf(x / √2)); 0 for -∞, where torch's product -∞ · 0 is NaN */
    PC_ACT_GELU_TANH, /* its tanh approximation */
    PC_ACT_RELU,
    PC_ACT_SILU,
    PC_ACT_TANH
} pc_activation_fn;

/* y (m,n) = act(x (m,k) · wᵀ + bias), w (n,k) as torch.nn.Linear stores it; bias (n) or NULL,
 * same dtype as w.  f32 runs on kernels of our own, f64 on OpenBLAS. */
pc_status pc_linear(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, pc_dtype wdt,
                    const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err);

/* The same with w (k,n), as GPT-2's Conv1D stores it. */
pc_status pc_linear_t(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, pc_dtype wdt,
                      const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err);

/* c (m,n) = alpha · op(a) · op(b) + beta · c; op is transposition when the flag is set; all of dtype dt;
 * lda/ldb/ldc are row strides in elements.  Never reads c when beta is 0. */
pc_status pc_gemm(pc_runtime *rt, pc_dtype dt, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k,
                  double alpha, const void *a, int64_t lda, const void *b, int64_t ldb, double beta, void *c,
                  int64_t ldc, pc_error *err);

/* LoRA's product, fused: y (m,n) += scale · (x (m,k) · aᵀ) · bᵀ, a (r,k) of dtype adt, b (n,r) of
 * dtype bdt; e (r) of dtype adt or NULL scales the rank axis (AdaLora's singular values). */
pc_status pc_lowrank_add(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, int64_t r, const void *x,
                         pc_dtype adt, const void *a, const void *e, pc_dtype bdt, const void *b, double scale,
                         void *y, pc_error *err);

/* ---------------------------------------------------------------- elementwise */

/* y (m,n) = x (m,n) ⊙ s (n); y may be x. */
void pc_scale_columns(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                      void *y);
/* y (m,n) = x (m,n) ⊙ s (m); y may be x. */
void pc_scale_rows(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                   void *y);
/* y (m,n) += scale · v (n), for every row. */
void pc_add_row(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, pc_dtype vdt, const void *v, double scale, void *y);
/* y (n) += scale · x (n). */
void pc_add(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, double scale, void *y);
/* y (n) = a (n) + b (n). */
void pc_sum_two(pc_runtime *rt, pc_dtype dt, int64_t n, const void *a, const void *b, void *y);
/* y (n) = act(x (n)); y may be x. */
void pc_activate(pc_runtime *rt, pc_dtype dt, pc_activation_fn act, int64_t n, const void *x, void *y);
/* y (n) = x (n) · keep/(1-p), keep drawn from rng per element; y may be x. */
void pc_dropout(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, double p, uint64_t seed, uint64_t stream,
                void *y);

/* The same for x and, with the same draws, x2 → y2 (NULL: x alone). */
void pc_dropout_two(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, void *y, const void *x2, void *y2, double p,
                    uint64_t seed, uint64_t stream);

/* -------------------------------------------------------------- normalisation */

/* y (m,n) = LayerNorm(x + residual) · weight + bias over the last axis; residual, weight, bias may be NULL;
 * y may be x. */
void pc_layer_norm(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, const void *residual, pc_dtype wdt,
                   const void *weight, const void *bias, double eps, void *y);
/* y (m,n) = x / sqrt(mean(x²) + eps) · weight; weight may be NULL; y may be x. */
void pc_rms_norm(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype wdt, const void *weight,
                 double eps, void *y);
/* y (m,n) = softmax of each row; y may be x. */
void pc_softmax(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, void *y);

/* ----------------------------------------------------------------- attention */

/* Multi-head scaled dot-product attention, bidirectional, fused per (batch, head).
 * q (batch, tq, heads·dim), k and v (batch, tk, heads·dim), out like q; mask (batch, tk) bytes, 0 = ignore that
 * key, or NULL.  A row whose keys are all masked attends to all of them equally, as Transformers' additive
 * mask of the dtype's minimum makes it. */
pc_status pc_attention(pc_runtime *rt, pc_dtype dt, int64_t batch, int64_t heads, int64_t tq, int64_t tk, int64_t dim,
                       const void *q, const void *k, const void *v, const uint8_t *mask, double scale, void *out,
                       pc_error *err);

/* ---------------------------------------------------------- embedding and conv */

/* y (n, dim) = table[ids]; ids are valid. */
void pc_gather_rows(pc_runtime *rt, pc_dtype dt, int64_t n, int64_t dim, const int64_t *ids, pc_dtype tdt,
                    const void *table, void *y);

typedef struct pc_conv_shape {
    int64_t batch, in_channels, height, width, out_channels;
    int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
    int64_t out_height, out_width;
} pc_conv_shape;

/* Fill out_height and out_width; PC_ERR_VALUE when the kernel does not fit. */
pc_status pc_conv_output(pc_conv_shape *shape, pc_error *err);

/* y (batch, out_channels, oh, ow) = conv2d(x (batch, in_channels, h, w), w (out, in/groups, kh, kw)) + bias. */
pc_status pc_conv2d(pc_runtime *rt, pc_dtype dt, const pc_conv_shape *shape, const void *x, pc_dtype wdt, const void *w,
                    const void *bias, void *y, pc_error *err);

/* ------------------------------------------------------------- factorisation */

/* Thin SVD in f64 or f32: a (m,n) = u (m,q) · diag(s (q)) · vt (q,n), q = min(m,n); a is overwritten. */
pc_status pc_svd(pc_dtype dt, int64_t m, int64_t n, void *a, void *u, void *s, void *vt, pc_error *err);
/* Thin QR: a (m,n) = q (m,p) · r (p,n), p = min(m,n); a is overwritten. Signs as LAPACK's geqrf gives them. */
pc_status pc_qr(pc_dtype dt, int64_t m, int64_t n, void *a, void *q, void *r, pc_error *err);

/* -------------------------------------------------------------------- set-up */

/* Must be called once before any other kernel (idempotent, thread-safe): looks at the CPU, picks the
 * implementations, and puts OpenBLAS on one thread per call (the parallel for is ours). */
void pc_kernels_init(void);
/* "avx512", "avx2" or "generic" (whose vectors of four the compiler maps to NEON on ARM); and OpenBLAS's own description. */
const char *pc_kernels_isa(void);
const char *pc_kernels_blas(void);

#endif
