/* Conversions, and everything that works on rows one at a time: scaling, activations, normalisation, softmax. */
#include <math.h>
#include <string.h>

#include "../core/rng.h"
#include "table.h"

/* Elements of a chunk that is widened on the stack. */
#define CHUNK 1024
/* Elements that make a piece of work worth another thread. */
#define GRAIN 16384

static int64_t row_grain(int64_t n) { return pc_max(1, GRAIN / pc_max(n, 1)); }

/* ---------------------------------------------------------------- conversion */

static void narrow_from_f32(pc_dtype dst_dtype, void *dst, const float *src, int64_t n)
{
    if (dst_dtype == PC_F32)
        memcpy(dst, src, (size_t)n * sizeof *src);
    else if (dst_dtype == PC_F64)
        for (int64_t i = 0; i < n; i++)
            ((double *)dst)[i] = (double)src[i];
    else
        pc_kernels()->narrow(dst_dtype, src, n, dst);
}

static void widen_to_f32(float *dst, pc_dtype src_dtype, const void *src, int64_t n)
{
    if (src_dtype == PC_F32)
        memcpy(dst, src, (size_t)n * sizeof *dst);
    else if (src_dtype == PC_F64)
        for (int64_t i = 0; i < n; i++)
            dst[i] = (float)((const double *)src)[i];
    else
        pc_kernels()->widen(src_dtype, src, n, dst);
}

static void convert_run(pc_dtype dst_dtype, void *dst, pc_dtype src_dtype, const void *src, int64_t n)
{
    if (n <= 0)
        return;
    if (dst_dtype == src_dtype) {
        memcpy(dst, src, (size_t)n * pc_dtype_size(src_dtype));
    } else if (dst_dtype == PC_F32) {
        widen_to_f32(dst, src_dtype, src, n);
    } else if (src_dtype == PC_F32) {
        narrow_from_f32(dst_dtype, dst, src, n);
    } else { /* f32 holds every f16 and bf16; f64 to 16 bits rounds twice, as a cast through f32 does everywhere */
        float middle[CHUNK];
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t part = pc_min(CHUNK, n - i);
            widen_to_f32(middle, src_dtype, pc_at(src_dtype, src, i), part);
            narrow_from_f32(dst_dtype, pc_at_mut(dst_dtype, dst, i), middle, part);
        }
    }
}

void pc_widen_to(pc_dtype dt, void *dst, pc_dtype src_dtype, const void *src, int64_t n)
{
    convert_run(dt, dst, src_dtype, src, n);
}

typedef struct run_job {
    pc_dtype dt, other;
    pc_activation_fn act;
    int64_t n;
    const void *x, *residual, *v, *bias;
    double c, eps;
    bool root_mean_square;
    pc_rng rng;
    void *y, *other_y; /* other_y: what dropout makes of `residual` */
} run_job;

static void convert_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    convert_run(j->dt, pc_at_mut(j->dt, j->y, begin), j->other, pc_at(j->other, j->x, begin), end - begin);
}

void pc_convert(pc_runtime *rt, pc_dtype dst_dtype, void *dst, pc_dtype src_dtype, const void *src, int64_t n)
{
    run_job j = {.dt = dst_dtype, .other = src_dtype, .x = src, .y = dst};
    pc_parallel_for(rt, n, 4 * GRAIN, convert_range, &j);
}

/* -------------------------------------------------------------------- scaling */

typedef union chunk {
    float f32[CHUNK];
    double f64[CHUNK];
} chunk;

/* A row vector in the compute dtype: itself, or widened into `room` (n ≤ CHUNK then). */
static const void *in_dtype(pc_dtype dt, pc_dtype vdt, const void *v, int64_t at, int64_t n, chunk *room)
{
    if (v == NULL)
        return NULL;
    if (vdt == dt)
        return pc_at(dt, v, at);
    convert_run(dt, room, vdt, pc_at(vdt, v, at), n);
    return room;
}

/* Columns that one pass over the rows can take. */
static int64_t pass_width(pc_dtype dt, pc_dtype vdt, int64_t n) { return vdt == dt ? pc_max(n, 1) : CHUNK; }

static void scale_columns_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    const pc_row_ops *ops = pc_rows(j->dt);
    int64_t step = pass_width(j->dt, j->other, j->n);
    chunk room;
    for (int64_t at = 0; at < j->n; at += step) {
        int64_t part = pc_min(step, j->n - at);
        const void *s = in_dtype(j->dt, j->other, j->v, at, part, &room);
        for (int64_t i = begin; i < end; i++)
            ops->multiply(part, pc_at(j->dt, j->x, i * j->n + at), s, pc_at_mut(j->dt, j->y, i * j->n + at));
    }
}

void pc_scale_columns(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                      void *y)
{
    run_job j = {.dt = dt, .other = sdt, .n = n, .x = x, .v = s, .y = y};
    if (n > 0)
        pc_parallel_for(rt, m, row_grain(n), scale_columns_range, &j);
}

static void scale_rows_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    for (int64_t i = begin; i < end; i++)
        pc_rows(j->dt)->scale(j->n, pc_at(j->dt, j->x, i * j->n), pc_get_double(j->other, j->v, i),
                              pc_at_mut(j->dt, j->y, i * j->n));
}

void pc_scale_rows(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                   void *y)
{
    run_job j = {.dt = dt, .other = sdt, .n = n, .x = x, .v = s, .y = y};
    if (n > 0)
        pc_parallel_for(rt, m, row_grain(n), scale_rows_range, &j);
}

static void add_row_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    const pc_row_ops *ops = pc_rows(j->dt);
    int64_t step = pass_width(j->dt, j->other, j->n);
    chunk room;
    for (int64_t at = 0; at < j->n; at += step) {
        int64_t part = pc_min(step, j->n - at);
        const void *v = in_dtype(j->dt, j->other, j->v, at, part, &room);
        for (int64_t i = begin; i < end; i++)
            ops->axpy(part, j->c, v, pc_at_mut(j->dt, j->y, i * j->n + at));
    }
}

void pc_add_row(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, pc_dtype vdt, const void *v, double scale, void *y)
{
    run_job j = {.dt = dt, .other = vdt, .n = n, .v = v, .c = scale, .y = y};
    if (n > 0)
        pc_parallel_for(rt, m, row_grain(n), add_row_range, &j);
}

static void add_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    pc_rows(j->dt)->axpy(end - begin, j->c, pc_at(j->dt, j->x, begin), pc_at_mut(j->dt, j->y, begin));
}

void pc_add(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, double scale, void *y)
{
    run_job j = {.dt = dt, .x = x, .c = scale, .y = y};
    pc_parallel_for(rt, n, GRAIN, add_range, &j);
}

static void sum_two_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    for (int64_t at = begin; at < end; at += CHUNK) {
        const int64_t part = pc_min(CHUNK, end - at);
        void *y = pc_at_mut(j->dt, j->y, at);
        memcpy(y, pc_at(j->dt, j->x, at), (size_t)part * pc_dtype_size(j->dt));
        pc_rows(j->dt)->axpy(part, 1.0, pc_at(j->dt, j->v, at), y);
    }
}

void pc_sum_two(pc_runtime *rt, pc_dtype dt, int64_t n, const void *a, const void *b, void *y)
{
    run_job j = {.dt = dt, .x = a, .v = b, .y = y};
    pc_parallel_for(rt, n, GRAIN, sum_two_range, &j);
}

static void activate_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    pc_rows(j->dt)->activate(j->act, end - begin, pc_at(j->dt, j->x, begin), pc_at_mut(j->dt, j->y, begin));
}

void pc_activate(pc_runtime *rt, pc_dtype dt, pc_activation_fn act, int64_t n, const void *x, void *y)
{
    run_job j = {.dt = dt, .act = act, .x = x, .y = y};
    pc_parallel_for(rt, n, GRAIN / 4, activate_range, &j);
}

/* Elements whose draws are made at once. */
#define DRAWS 256

/* Elements [at, at + n) of y ← x with the same draws for whatever else is dropped with it. */
static void drop_part(const run_job *j, const void *x, int64_t at, int64_t n, const float *keep, void *y)
{
    if (j->dt == PC_F32) {
        pc_kernels()->drop(n, pc_at(j->dt, x, at), keep, (float)j->c, pc_at_mut(j->dt, y, at));
        return;
    }
    const double *from = pc_at(j->dt, x, at);
    double *to = pc_at_mut(j->dt, y, at);
    for (int64_t i = 0; i < n; i++)
        to[i] = keep[i] != 0.0f ? from[i] * j->c : 0.0;
}

static void dropout_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    float keep[DRAWS];
    for (int64_t at = 4 * begin; at < pc_min(j->n, 4 * end); at += DRAWS) { /* a block has four draws */
        int64_t part = pc_min(DRAWS, pc_min(j->n, 4 * end) - at);
        pc_kernels()->keep(j->rng, (uint64_t)at, part, j->eps, keep);
        drop_part(j, j->x, at, part, keep, j->y);
        if (j->residual != NULL)
            drop_part(j, j->residual, at, part, keep, j->other_y);
    }
}

void pc_dropout_two(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, void *y, const void *x2, void *y2, double p,
                    uint64_t seed, uint64_t stream)
{
    run_job j = {.dt = dt, .n = n, .x = x, .residual = x2, .other_y = y2, .y = y, .eps = p};
    j.c = p < 1.0 ? 1.0 / (1.0 - p) : 0.0;
    j.rng = (pc_rng){seed, stream};
    pc_parallel_for(rt, n / 4 + (n % 4 != 0), GRAIN / 16, dropout_range, &j);
}

void pc_dropout(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, double p, uint64_t seed, uint64_t stream,
                void *y)
{
    pc_dropout_two(rt, dt, n, x, y, NULL, NULL, p, seed, stream);
}

/* -------------------------------------------------------------- normalisation */

static void layer_norm_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx; /* x; root_mean_square leaves the mean alone; v weight; bias */
    const pc_row_ops *ops = pc_rows(j->dt);
    int64_t n = j->n, step = pass_width(j->dt, j->other, n);
    chunk weight_room, bias_room;
    const void *weight = NULL, *bias = NULL;
    if (n <= step) {
        weight = in_dtype(j->dt, j->other, j->v, 0, n, &weight_room);
        bias = in_dtype(j->dt, j->other, j->bias, 0, n, &bias_room);
    }
    for (int64_t i = begin; i < end; i++) {
        const void *x = pc_at(j->dt, j->x, i * n);
        void *y = pc_at_mut(j->dt, j->y, i * n);
        double mean = 0.0, variance;
        if (j->root_mean_square) {
            variance = ops->mean_square(n, x);
        } else {
            ops->moments(n, x, j->residual != NULL ? pc_at(j->dt, j->residual, i * n) : NULL, y, &mean, &variance);
            x = y;
        }
        double r = 1.0 / sqrt(variance + j->eps);
        for (int64_t at = 0; at < n; at += step) {
            int64_t part = pc_min(step, n - at);
            if (n > step) {
                weight = in_dtype(j->dt, j->other, j->v, at, part, &weight_room);
                bias = in_dtype(j->dt, j->other, j->bias, at, part, &bias_room);
            }
            ops->normalise(part, pc_at(j->dt, x, at), mean, r, weight, bias, pc_at_mut(j->dt, y, at));
        }
    }
}

void pc_layer_norm(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, const void *residual, pc_dtype wdt,
                   const void *weight, const void *bias, double eps, void *y)
{
    run_job j = {.dt = dt, .other = wdt, .n = n, .x = x, .v = weight, .bias = bias, .eps = eps, .y = y};
    j.residual = residual;
    if (n > 0)
        pc_parallel_for(rt, m, row_grain(4 * n), layer_norm_range, &j);
}

void pc_rms_norm(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype wdt, const void *weight,
                 double eps, void *y)
{
    run_job j = {.dt = dt, .other = wdt, .n = n, .x = x, .v = weight, .eps = eps, .root_mean_square = true, .y = y};
    if (n > 0)
        pc_parallel_for(rt, m, row_grain(4 * n), layer_norm_range, &j);
}

static void softmax_range(void *ctx, int64_t begin, int64_t end)
{
    const run_job *j = ctx;
    for (int64_t i = begin; i < end; i++)
        pc_rows(j->dt)->softmax(j->n, pc_at(j->dt, j->x, i * j->n), 1.0, NULL, pc_at_mut(j->dt, j->y, i * j->n));
}

void pc_softmax(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, void *y)
{
    run_job j = {.dt = dt, .n = n, .x = x, .y = y};
    if (n > 0)
        pc_parallel_for(rt, m, row_grain(4 * n), softmax_range, &j);
}

/* ------------------------------------------------------------------ embedding */

typedef struct gather_job {
    pc_dtype dt, tdt;
    int64_t dim;
    const int64_t *ids;
    const void *table;
    void *y;
} gather_job;

static void gather_range(void *ctx, int64_t begin, int64_t end)
{
    const gather_job *j = ctx;
    for (int64_t i = begin; i < end; i++)
        convert_run(j->dt, pc_at_mut(j->dt, j->y, i * j->dim), j->tdt, pc_at(j->tdt, j->table, j->ids[i] * j->dim),
                    j->dim);
}

void pc_gather_rows(pc_runtime *rt, pc_dtype dt, int64_t n, int64_t dim, const int64_t *ids, pc_dtype tdt,
                    const void *table, void *y)
{
    gather_job j = {dt, tdt, dim, ids, table, y};
    if (dim > 0)
        pc_parallel_for(rt, n, row_grain(dim), gather_range, &j);
}
