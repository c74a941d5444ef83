#include "adalora_budget.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../core/memory.h"
#include "../kernels/kernels.h"

/* Elements that are worth a thread. */
#define GRAIN 32768

typedef struct step_of {
    pc_dtype dtype;
    const void *parameter, *grad;
    double beta1, beta2;
    void *sensitivity, *uncertainty;
    atomic_bool finite;
} step_of;

/* --------------------------------------------------------------- importance */

static void check_range(void *ctx, int64_t begin, int64_t end)
{
    step_of *s = ctx;
    bool finite = true;
    if (s->dtype == PC_F64) {
        const double *p = s->parameter, *g = s->grad;
        for (int64_t i = begin; i < end; i++)
            finite &= isfinite(p[i] * (g != NULL ? g[i] : 0.0)) != 0;
    } else {
        const float *p = s->parameter, *g = s->grad;
        for (int64_t i = begin; i < end; i++)
            finite &= isfinite(p[i] * (g != NULL ? g[i] : 0.0f)) != 0;
    }
    if (!finite)
        atomic_store(&s->finite, false);
}

bool pc_importance_is_finite(pc_runtime *rt, pc_dtype dtype, int64_t n, const void *parameter, const void *grad)
{
    step_of s = {.dtype = dtype, .parameter = parameter, .grad = grad, .finite = true};
    pc_parallel_for(rt, n, GRAIN, check_range, &s);
    return atomic_load(&s.finite);
}

/* The factors are rounded to the dtype before they are used, which is what torch does with a number times a tensor. */
#define UPDATE(T, ABS)                                                                                                 \
    do {                                                                                                               \
        const T *p = s->parameter, *g = s->grad;                                                                       \
        T *mean = s->sensitivity, *spread = s->uncertainty;                                                            \
        const T b1 = (T)s->beta1, c1 = (T)(1.0 - s->beta1), b2 = (T)s->beta2, c2 = (T)(1.0 - s->beta2);                \
        for (int64_t i = begin; i < end; i++) {                                                                        \
            const T now = g != NULL ? ABS(p[i] * g[i]) : (T)0;                                                         \
            mean[i] = b1 * mean[i] + c1 * now;                                                                         \
            spread[i] = b2 * spread[i] + c2 * ABS(now - mean[i]);                                                      \
        }                                                                                                              \
    } while (0)

static void update_range(void *ctx, int64_t begin, int64_t end)
{
    step_of *s = ctx;
    if (s->dtype == PC_F64)
        UPDATE(double, fabs);
    else
        UPDATE(float, fabsf);
}

void pc_importance_update(pc_runtime *rt, pc_dtype dtype, int64_t n, const void *parameter, const void *grad,
                          double beta1, double beta2, void *sensitivity, void *uncertainty)
{
    step_of s = {.dtype = dtype,
                 .parameter = parameter,
                 .grad = grad,
                 .beta1 = beta1,
                 .beta2 = beta2,
                 .sensitivity = sensitivity,
                 .uncertainty = uncertainty,
                 .finite = true};
    pc_parallel_for(rt, n, GRAIN, update_range, &s);
}

/* ------------------------------------------------------------------- scores */

static double element_score(pc_dtype dtype, pc_importance of, int64_t i)
{
    if (dtype == PC_F64)
        return ((const double *)of.sensitivity)[i] * ((const double *)of.uncertainty)[i];
    return (double)(((const float *)of.sensitivity)[i] * ((const float *)of.uncertainty)[i]);
}

static double rounded(pc_dtype dtype, double x) { return dtype == PC_F64 ? x : (double)(float)x; }

void pc_triplet_scores(pc_dtype dtype, int64_t r, int64_t in, int64_t out, pc_importance a, pc_importance b,
                       pc_importance e, double *scores)
{
    for (int64_t i = 0; i < r; i++) {
        double of_a = 0, of_b = 0;
        for (int64_t j = 0; j < in; j++)
            of_a += element_score(dtype, a, i * in + j);
        for (int64_t j = 0; j < out; j++)
            of_b += element_score(dtype, b, j * r + i);
        of_a = in > 0 ? rounded(dtype, of_a / (double)in) : 0;
        of_b = out > 0 ? rounded(dtype, of_b / (double)out) : 0;
        scores[i] = rounded(dtype, element_score(dtype, e, i) + rounded(dtype, of_a + of_b));
    }
}

static int by_size(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    if (isnan(a) || isnan(b))
        return (isnan(a) != 0) - (isnan(b) != 0);
    return (a > b) - (a < b);
}

pc_status pc_rank_threshold(int64_t n, const double *scores, int64_t keep, double *threshold, pc_error *err)
{
    *threshold = -INFINITY;
    if (keep >= n)
        return PC_OK;
    size_t bytes;
    if (n < 0 || __builtin_mul_overflow((size_t)n, sizeof *scores, &bytes))
        return pc_fail_nomem(err, "the scores of singular values");
    double *sorted = pc_malloc(bytes);
    if (sorted == NULL)
        return pc_fail_nomem(err, "the scores of singular values");
    memcpy(sorted, scores, bytes);
    qsort(sorted, (size_t)n, sizeof *sorted, by_size);
    *threshold = sorted[keep > 0 ? n - keep - 1 : n - 1];
    pc_free(sorted);
    return PC_OK;
}

int64_t pc_rank_budget(const pc_rank_schedule *schedule, int64_t step, bool *allocate)
{
    const int64_t end = schedule->total_step - schedule->tfinal;
    if (step <= schedule->tinit) {
        *allocate = false;
        return schedule->initial;
    }
    if (step > end) {
        *allocate = true;
        return schedule->target;
    }
    const double left = 1.0 - (double)(step - schedule->tinit) / (double)(end - schedule->tinit);
    *allocate = schedule->interval != 0 && step % schedule->interval == 0;
    return (int64_t)((double)(schedule->initial - schedule->target) * pow(left, 3.0) +
                     (double)schedule->target);
}

/* ------------------------------------------------------------ orthogonality */

pc_status pc_orthogonality(pc_runtime *rt, pc_dtype dtype, int64_t r, int64_t n, bool columns, const void *matrix,
                           double scale, void *grad, double *norm, pc_error *err)
{
    *norm = 0;
    if (r == 0)
        return PC_OK;
    size_t bytes;
    if (__builtin_mul_overflow((size_t)r, (size_t)r, &bytes) ||
        __builtin_mul_overflow(bytes, pc_dtype_size(dtype), &bytes))
        return pc_fail_nomem(err, "a Gram matrix");
    void *gram = pc_malloc(bytes);
    if (gram == NULL)
        return pc_fail_nomem(err, "a Gram matrix");
    const int64_t width = columns ? r : n;
    pc_status status =
        pc_gemm(rt, dtype, columns, !columns, r, r, n, 1.0, matrix, width, matrix, width, 0.0, gram, r, err);
    if (status == PC_OK) {
        double sum = 0;
        for (int64_t i = 0; i < r * r; i++) {
            double x = pc_get_double(dtype, gram, i);
            if (i % (r + 1) == 0)
                pc_put_double(dtype, gram, i, x -= 1.0);
            sum += x * x;
        }
        *norm = sqrt(sum);
        if (grad != NULL && *norm > 0) {
            const double factor = 2.0 * scale / *norm;
            status = columns ? pc_gemm(rt, dtype, false, false, n, r, r, factor, matrix, r, gram, r, 1.0, grad, r, err)
                             : pc_gemm(rt, dtype, false, false, r, n, r, factor, gram, r, matrix, n, 1.0, grad, n, err);
        }
    }
    pc_free(gram);
    return status;
}
