/* What an instruction set provides: one table per implementation, chosen once in dispatch.c.
 *
 * The implementations share their code (simd_rows.h, simd_math.h, simd_products.h) and differ in the handful of
 * vector operations that each ISA file defines under the same names.
 */
#ifndef PEFTC_KERNELS_TABLE_H
#define PEFTC_KERNELS_TABLE_H

#include "../core/rng.h"
#include "kernels.h"
#include "lowrank.h"

/* Functions of one row (or any contiguous run) of n elements of the compute dtype. */
typedef struct pc_row_ops {
    /* y = act(x); y may be x */
    void (*activate)(pc_activation_fn act, int64_t n, const void *x, void *y);
    /* y = act(y + bias); bias may be NULL */
    void (*finish)(pc_activation_fn act, int64_t n, const void *bias, void *y);
    /* y = x ⊙ s */
    void (*multiply)(int64_t n, const void *x, const void *s, void *y);
    /* y = x · c */
    void (*scale)(int64_t n, const void *x, double c, void *y);
    /* y += c · x */
    void (*axpy)(int64_t n, double c, const void *x, void *y);
    /* Mean and biased variance of x + residual; the sum is written to y (residual may be NULL: x is copied). */
    void (*moments)(int64_t n, const void *x, const void *residual, void *y, double *mean, double *variance);
    /* The same of x alone, nothing written. */
    void (*spread)(int64_t n, const void *x, double *mean, double *variance);
    double (*mean_square)(int64_t n, const void *x);
    /* y = (x - mean) · r ⊙ weight + bias; weight and bias may be NULL, y may be x */
    void (*normalise)(int64_t n, const void *x, double mean, double r, const void *weight, const void *bias, void *y);
    /* y = softmax(c · x + add); add may be NULL, y may be x */
    void (*softmax)(int64_t n, const void *x, double c, const void *add, void *y);
    /* Gradients (simd_gradients.h).  dx = dy ⊙ act'; saved is the activation's output for relu and tanh, its input
     * otherwise; dx may be dy. */
    void (*activate_back)(pc_activation_fn act, int64_t n, const void *saved, const void *dy, void *dx);
    /* Of y = (x - mean) · r ⊙ weight, mean and r being x's own (RMSNorm: not centred, mean is 0); weight may be NULL,
     * dx may be dy. */
    void (*normalise_back)(int64_t n, bool centred, const void *x, double mean, double r, const void *weight,
                           const void *dy, void *dx);
    /* Of y = softmax(x): dx = c · y ⊙ (dy - Σ y ⊙ dy); dx may be dy. */
    void (*softmax_back)(int64_t n, const void *y, const void *dy, double c, void *dx);
    /* Of y = x ⊙ v, 1 to 4 rows that lie ld… elements apart: dx = dy ⊙ v, which may be dy, and dv += Σ dy ⊙ x; dx and dv
     * may be NULL, x only with dv. */
    void (*scale_back)(int64_t n, int64_t rows, const void *dy, int64_t lddy, const void *x, int64_t ldx, const void *v,
                       void *dx, int64_t lddx, void *dv);
} pc_row_ops;

/* A matrix x (rows, k), f32, transposed in panels of whole vectors: panel after panel, each [k][vectors · lanes].
 * Rows that fill up the last vector are zero. */
typedef struct pc_panels {
    int64_t rows, k;
    int64_t count;          /* panels */
    int64_t vectors, extra; /* the first `extra` panels have vectors + 1 vectors, the others `vectors` */
    int lanes;
    float *data;
} pc_panels;

/* y (m,n) = act(x · wᵀ + bias) for f32 activations and any weight dtype. */
typedef struct pc_linear_job {
    int64_t m, n, k;
    const float *x;
    const pc_panels *panels; /* x, for `linear`; unused by `dot` */
    pc_dtype wdt;
    const void *w;
    const float *bias; /* widened; or NULL */
    pc_activation_fn act;
    float *y;
    bool turned, accumulate; /* pc_linear_many alone: w is (k,n); y is added to */
} pc_linear_job;

/* c (m,n) = [c +] a (m,k) · op(b), then act(· + bias), for f32 a and c and any dtype of b. */
typedef struct pc_product_job {
    int64_t m, n, k;
    const float *a;
    int64_t lda;
    pc_dtype bdt;
    const void *b;
    bool b_rows; /* b is (n,k), each row holding a column of op(b); else (k,n) */
    bool accumulate;
    const float *bias;
    pc_activation_fn act;
    float *c;
    int64_t ldc;
} pc_product_job;

/* A slab of y (m, …) = act(x · wᵀ + bias), one pass over a part of the depth, w packed in panels. */
typedef struct pc_block_job {
    int64_t m, depth;
    const float *x;
    int64_t ldx;
    const pc_panels *panels; /* the weight: panels->rows is the number of columns of y */
    bool first, last;        /* pass: y is written, not added to; bias and act are due */
    const float *bias;       /* of the slab, or NULL */
    pc_activation_fn act;
    float *y;
    int64_t ldy;
} pc_block_job;

/* Rows of x through a low-rank product, for activations and weights of one dtype, f32, f16 or bf16. */
typedef struct pc_lowrank_job {
    pc_dtype dt;
    int64_t k, n;
    const void *x;
    int64_t ldx;
    const void *y; /* or NULL: zeros */
    int64_t ldy;
    void *out; /* or NULL: `keep` alone is wanted */
    int64_t ldo;
    int count, ranks; /* terms, and their ranks together, at most PC_LOWRANK_MOST */
    const pc_lowrank_term *terms;
    bool swapped; /* a is (k,r) and b is (r,n) */
    float *keep;  /* x · aᵀ of all terms, transposed: (ranks, rows); or NULL */
    int64_t rows;
    /* For many rows, all weights in panels as `pack_lowrank` lays them out; or NULL. */
    const float *packed_a, *packed_b;
    /* Instead of x and a: x · aᵀ of the one term, before e and scale: (rows, r), or (r, rows) when given_turned. */
    const void *given;
    bool given_turned;
} pc_lowrank_job;

/* c (r,n) = scale · e ⊙ h (r,m) · x (m,n): sums over rows. */
typedef struct pc_outer_job {
    pc_dtype dt; /* of x, e and c */
    int64_t m, n, r;
    const float *h;
    const void *x;
    int64_t ldx;
    const void *e; /* (r), or NULL */
    double scale;
    void *c;
    bool transposed; /* c is (n,r) */
} pc_outer_job;

/* One head of attention, f32. */
typedef struct pc_head_job {
    int64_t tq, tk, dim, stride; /* stride between tokens, in elements */
    const float *q, *k, *v;
    const float *add; /* (tk) added to the scores, or NULL */
    float scale;
    float *out;
    float *scratch; /* head_scratch(tk, dim) floats, 64-byte aligned */
    /* Dropout of the probabilities; row i draws from element first_draw + i · pc_draws_of_row(tk) on. */
    double dropout;
    pc_rng rng;
    uint64_t first_draw;
    /* head_back: the gradient of out, and where those of q, k and v go, each NULL when not wanted */
    const float *dy;
    float *dq, *dk, *dv;
} pc_head_job;

static inline int64_t pc_draws_of_row(int64_t tk) { return (tk + 3) / 4 * 4; }

typedef struct pc_kernel_table {
    const char *name;
    int lanes;       /* f32 in a vector */
    int max_vectors; /* widest panel */
    const pc_row_ops *rows;
    /* f32 ↔ f16, bf16 */
    void (*widen)(pc_dtype src_dtype, const void *src, int64_t n, float *dst);
    void (*narrow)(pc_dtype dst_dtype, const float *src, int64_t n, void *dst);
    /* pc_rng_keep */
    void (*keep)(pc_rng rng, uint64_t first, int64_t n, double p, float *keep);
    /* y (n) = c · x where keep is not 0, else 0; y may be x */
    void (*drop)(int64_t n, const float *x, const float *keep, float c, float *y);
    /* Fill panels [begin, end) of `p` from x. */
    void (*pack)(const pc_panels *p, const float *x, int64_t begin, int64_t end);
    /* Panels [panel_begin, panel_end) × strips of `lanes` weight rows [begin, end). */
    void (*linear)(const pc_linear_job *job, int64_t panel_begin, int64_t panel_end, int64_t begin, int64_t end);
    /* dst (depth, width) ← transposed src: rows of any float dtype from element `at` on, `stride` elements apart;
     * columns past `rows` become zero.  width is whole vectors. */
    void (*pack_rows)(pc_dtype dt, const void *src, int64_t at, int64_t stride, int64_t rows, int64_t depth, float *dst,
                      int64_t width);
    /* Rows [row_begin, row_end) × panels [begin, end) of a slab. */
    void (*block)(const pc_block_job *job, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end);
    /* The same as linear without panels, for few rows or few columns: all of m × weight rows [begin, end). */
    void (*dot)(const pc_linear_job *job, int64_t begin, int64_t end);
    /* Rows [row_begin, row_end) × columns [col_begin, col_end); col_begin is a multiple of lanes. */
    void (*product)(const pc_product_job *job, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);
    /* Rows [begin, end). */
    void (*lowrank)(const pc_lowrank_job *job, int64_t begin, int64_t end);
    /* Panels of `width` columns: [begin, end) of a (panel of all ranks by panel; each k deep) to `to`, or of b, each as
     * deep as all ranks together and one more, for the biases. */
    void (*pack_lowrank)(const pc_lowrank_job *job, bool b, int64_t begin, int64_t end, float *to);
    /* Columns [begin, end). */
    void (*outer)(const pc_outer_job *job, int64_t begin, int64_t end);
    /* The same in two steps: part (r, ldp), ldp ≥ n in whole panels, (+)= h · x of some rows, before e and scale; then
     * columns [begin, end) of c from `count` parts that lie `stride` floats apart. */
    void (*outer_rows)(const pc_outer_job *job, int64_t row, int64_t rows, float *part, int64_t ldp, bool accumulate);
    void (*outer_join)(const pc_outer_job *job, const float *parts, int64_t count, int64_t stride, int64_t ldp,
                       int64_t begin, int64_t end);
    /* mersenne.h: the generator's next words; n of them as they are given out; out (n), elements of 2, 4 or 8 bytes, ←
     * bits where the number that two of those make is less than `below`, else 0. */
    void (*twist)(uint32_t *words);
    void (*temper)(const uint32_t *words, int64_t n, uint32_t *out);
    void (*choose)(const uint32_t *words, int64_t n, uint64_t below, uint64_t bits, int bytes, void *out);
    int64_t (*head_scratch)(int64_t tk, int64_t dim);
    void (*head)(const pc_head_job *job);
    int64_t (*head_back_scratch)(int64_t tk, int64_t dim);
    void (*head_back)(const pc_head_job *job);
} pc_kernel_table;

extern const pc_kernel_table pc_table_generic;
extern const pc_row_ops pc_rows_f64;
#if defined(__x86_64__)
extern const pc_kernel_table pc_table_avx2;
extern const pc_kernel_table pc_table_avx512;
#endif

/* The table in use; the generic one before pc_kernels_init. */
const pc_kernel_table *pc_kernels(void);

static inline const pc_row_ops *pc_rows(pc_dtype dt) { return dt == PC_F64 ? &pc_rows_f64 : pc_kernels()->rows; }

/* Layout of panels for `rows` rows: as equal as whole vectors allow, so that no narrow panel is left over. */
void pc_panels_plan(pc_panels *p, const pc_kernel_table *table, int64_t rows, int64_t k);
static inline int64_t pc_panel_start(const pc_panels *p, int64_t panel) /* in vectors */
{
    return panel * p->vectors + (panel < p->extra ? panel : p->extra);
}

/* dst (n) f32 or f64 ← src of any float dtype, on this thread. */
void pc_widen_to(pc_dtype dt, void *dst, pc_dtype src_dtype, const void *src, int64_t n);

static inline int64_t pc_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t pc_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* Address of element i. */
static inline const void *pc_at(pc_dtype dt, const void *base, int64_t i)
{
    return (const char *)base + (size_t)i * pc_dtype_size(dt);
}
static inline void *pc_at_mut(pc_dtype dt, void *base, int64_t i)
{
    return (char *)base + (size_t)i * pc_dtype_size(dt);
}

#ifdef PC_TEST_HOOKS
/* Use the named implementation from now on ("avx512", "avx2", "generic"); false when this CPU lacks it. */
bool pc_kernels_force_isa(const char *name);
#endif

#endif
