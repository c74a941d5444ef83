/* Gradients of products and elementwise functions. */
#include "gradients.h"

#include <math.h>
#include <string.h>

#include "../core/memory.h"
#include "linear.h"

#define GRAIN 16384

/* --------------------------------------------------------------- dx of linear */

/* The weight in dtype dt: itself, or a copy that *room keeps. */
static const void *widened(pc_runtime *rt, pc_dtype dt, pc_dtype wdt, const void *w, int64_t n, int64_t k, void **room)
{
    size_t bytes;
    *room = NULL;
    if (wdt == dt)
        return w;
    if (pc_mul_size((size_t)n, (size_t)k, &bytes) && pc_mul_size(bytes, pc_dtype_size(dt), &bytes))
        *room = pc_malloc(bytes);
    if (*room != NULL)
        pc_convert(rt, dt, *room, wdt, w, n * k);
    return *room;
}

pc_status pc_linear_dx(pc_runtime *rt, pc_dtype dt, bool turned, bool add, int64_t m, int64_t n, int64_t k,
                       const void *dy, pc_dtype wdt, const void *w, void *dx, pc_error *err)
{
    if (m <= 0 || k <= 0)
        return PC_OK;
    if (dt == PC_F32 && n > 0 && (m >= PC_MANY_ROWS || wdt == PC_F32)) {
        if (m >= PC_MANY_ROWS) {
            pc_linear_job job = {.m = m, .n = k, .k = n, .x = dy, .wdt = wdt, .w = w, .y = dx};
            job.turned = !turned;
            job.accumulate = add;
            return pc_linear_many(rt, &job, err);
        }
        return pc_gemm(rt, dt, false, turned, m, k, n, 1.0, dy, n, w, turned ? n : k, add ? 1.0 : 0.0, dx, k, err);
    }
    void *room;
    const void *wide = widened(rt, dt, wdt, w, n, k, &room);
    if (wide == NULL && n > 0)
        return pc_fail_nomem(err, "the scratch of a linear layer's gradient");
    pc_status status =
        pc_gemm(rt, dt, false, turned, m, k, n, 1.0, dy, n, wide, turned ? n : k, add ? 1.0 : 0.0, dx, k, err);
    pc_free(room);
    return status;
}

pc_status pc_linear_dw(pc_runtime *rt, pc_dtype dt, bool turned, int64_t m, int64_t n, int64_t k, const void *dy,
                       const void *x, void *dw, pc_error *err)
{
    return turned ? pc_gemm(rt, dt, true, false, k, n, m, 1.0, x, k, dy, n, 1.0, dw, n, err)
                  : pc_gemm(rt, dt, true, false, n, k, m, 1.0, dy, n, x, k, 1.0, dw, k, err);
}

/* ----------------------------------------------------------------------- sums */

/* Columns that one piece of work adds up, and rows that it adds up in the compute dtype before it goes to double. */
#define SUM_COLUMNS 64
#define SUM_ROWS 32

typedef struct sum_job {
    pc_dtype dt;
    int64_t m, n;
    const void *a, *b;
    double scale;
    void *sums;
} sum_job;

static double product_at(const sum_job *j, int64_t i)
{
    if (j->dt == PC_F64)
        return ((const double *)j->a)[i] * (j->b != NULL ? ((const double *)j->b)[i] : 1.0);
    return (double)((const float *)j->a)[i] * (j->b != NULL ? (double)((const float *)j->b)[i] : 1.0);
}

static void add_to(const sum_job *j, int64_t i, double sum)
{
    if (j->dt == PC_F64)
        ((double *)j->sums)[i] += j->scale * sum;
    else
        ((float *)j->sums)[i] += (float)(j->scale * sum);
}

/* sums[0 … cols) += rows of a, or of a ⊙ b: loops that the compiler turns into vectors. */
static void add_rows_f32(const sum_job *j, int64_t first, int64_t rows, int64_t at, int64_t cols, float *sums)
{
    for (int64_t i = first; i < first + rows; i++) {
        const float *a = (const float *)j->a + i * j->n + at;
        const float *b = j->b != NULL ? (const float *)j->b + i * j->n + at : NULL;
        if (b != NULL)
            for (int64_t c = 0; c < cols; c++)
                sums[c] += a[c] * b[c];
        else
            for (int64_t c = 0; c < cols; c++)
                sums[c] += a[c];
    }
}

static void sum_rows_range(void *ctx, int64_t begin, int64_t end)
{
    const sum_job *j = ctx;
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t at = piece * SUM_COLUMNS, cols = pc_min(SUM_COLUMNS, j->n - at);
        double sums[SUM_COLUMNS] = {0};
        for (int64_t i = 0; i < j->m; i += SUM_ROWS) {
            int64_t rows = pc_min(SUM_ROWS, j->m - i);
            if (j->dt == PC_F32) {
                float part[SUM_COLUMNS] = {0};
                add_rows_f32(j, i, rows, at, cols, part);
                for (int64_t c = 0; c < cols; c++)
                    sums[c] += (double)part[c];
            } else {
                for (int64_t r = i; r < i + rows; r++)
                    for (int64_t c = 0; c < cols; c++)
                        sums[c] += product_at(j, r * j->n + at + c);
            }
        }
        for (int64_t c = 0; c < cols; c++)
            add_to(j, at + c, sums[c]);
    }
}

void pc_sum_rows(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *a, const void *b, double scale,
                 void *sums)
{
    sum_job j = {dt, m, n, a, b, scale, sums};
    pc_parallel_for(rt, (n + SUM_COLUMNS - 1) / SUM_COLUMNS, pc_max(1, GRAIN / pc_max(m * SUM_COLUMNS, 1)),
                    sum_rows_range, &j);
}

static void sum_columns_range(void *ctx, int64_t begin, int64_t end)
{
    const sum_job *j = ctx;
    for (int64_t i = begin; i < end; i++) {
        double sum = 0.0;
        for (int64_t c = 0; c < j->n; c++)
            sum += product_at(j, i * j->n + c);
        add_to(j, i, sum);
    }
}

void pc_sum_columns(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *a, const void *b, double scale,
                    void *sums)
{
    sum_job j = {dt, m, n, a, b, scale, sums};
    pc_parallel_for(rt, m, pc_max(1, GRAIN / pc_max(n, 1)), sum_columns_range, &j);
}

/* ---------------------------------------------------------------- elementwise */

typedef struct slope_job {
    pc_dtype dt;
    pc_activation_fn act;
    int64_t n;
    const void *saved, *dy;
    void *dx;
} slope_job;

static void activate_back_range(void *ctx, int64_t begin, int64_t end)
{
    const slope_job *j = ctx;
    pc_rows(j->dt)->activate_back(j->act, end - begin, pc_at(j->dt, j->saved, begin), pc_at(j->dt, j->dy, begin),
                                  pc_at_mut(j->dt, j->dx, begin));
}

void pc_activate_back(pc_runtime *rt, pc_dtype dt, pc_activation_fn act, int64_t n, const void *saved, const void *dy,
                      void *dx)
{
    slope_job j = {dt, act, n, saved, dy, dx};
    pc_parallel_for(rt, n, GRAIN / 4, activate_back_range, &j);
}

static void softmax_back_range(void *ctx, int64_t begin, int64_t end)
{
    const slope_job *j = ctx;
    for (int64_t i = begin * j->n; i < end * j->n; i += j->n)
        pc_rows(j->dt)->softmax_back(j->n, pc_at(j->dt, j->saved, i), pc_at(j->dt, j->dy, i), 1.0,
                                     pc_at_mut(j->dt, j->dx, i));
}

void pc_softmax_back(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *y, const void *dy, void *dx)
{
    slope_job j = {dt, PC_ACT_NONE, n, y, dy, dx};
    if (n > 0)
        pc_parallel_for(rt, m, pc_max(1, GRAIN / (4 * n)), softmax_back_range, &j);
}

/* -------------------------------------------------------------- normalisation */

typedef struct norm_job {
    pc_dtype dt;
    bool centred;
    int64_t n;
    const void *x, *weight, *dy;
    double eps;
    void *dx, *normal; /* normal: (x - mean) / σ, for dweight; or NULL */
} norm_job;

static void norm_back_range(void *ctx, int64_t begin, int64_t end)
{
    const norm_job *j = ctx;
    const pc_row_ops *ops = pc_rows(j->dt);
    for (int64_t i = begin; i < end; i++) {
        const void *x = pc_at(j->dt, j->x, i * j->n), *dy = pc_at(j->dt, j->dy, i * j->n);
        double mean = 0.0, variance;
        if (j->centred)
            ops->spread(j->n, x, &mean, &variance);
        else
            variance = ops->mean_square(j->n, x);
        double r = 1.0 / sqrt(variance + j->eps);
        if (j->normal != NULL)
            ops->normalise(j->n, x, mean, r, NULL, NULL, pc_at_mut(j->dt, j->normal, i * j->n));
        if (j->dx != NULL)
            ops->normalise_back(j->n, j->centred, x, mean, r, j->weight, dy, pc_at_mut(j->dt, j->dx, i * j->n));
    }
}

pc_status pc_norm_back(pc_runtime *rt, pc_dtype dt, bool centred, int64_t m, int64_t n, const void *x, pc_dtype wdt,
                       const void *weight, double eps, const void *dy, void *dx, void *dweight, void *dbias,
                       pc_error *err)
{
    if (m <= 0 || n <= 0)
        return PC_OK;
    void *room = NULL, *normal = NULL;
    norm_job j = {dt, centred, n, x, NULL, dy, eps, dx, NULL};
    size_t bytes;
    if (weight != NULL) {
        j.weight = widened(rt, dt, wdt, weight, 1, n, &room);
        if (j.weight == NULL)
            return pc_fail_nomem(err, "the scratch of a norm's gradient");
    }
    if (dweight != NULL) {
        if (pc_mul_size((size_t)m, (size_t)n, &bytes) && pc_mul_size(bytes, pc_dtype_size(dt), &bytes))
            normal = pc_malloc(bytes);
        if (normal == NULL) {
            pc_free(room);
            return pc_fail_nomem(err, "the scratch of a norm's gradient");
        }
        j.normal = normal;
    }
    if (dx != NULL || dweight != NULL)
        pc_parallel_for(rt, m, pc_max(1, GRAIN / (4 * n)), norm_back_range, &j);
    if (dweight != NULL)
        pc_sum_rows(rt, dt, m, n, dy, normal, 1.0, dweight);
    if (dbias != NULL)
        pc_sum_rows(rt, dt, m, n, dy, NULL, 1.0, dbias);
    pc_free(normal);
    pc_free(room);
    return PC_OK;
}

/* ------------------------------------------------------------------ embedding */

void pc_scatter_rows(pc_dtype dt, int64_t n, int64_t dim, const int64_t *ids, int64_t skip, const void *dy,
                     void *dtable)
{
    for (int64_t i = 0; i < n; i++)
        if (ids[i] != skip)
            pc_rows(dt)->axpy(dim, 1.0, pc_at(dt, dy, i * dim), pc_at_mut(dt, dtable, ids[i] * dim));
}
