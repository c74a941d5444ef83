/* The simplest loops that do what kernels.h says. */
#include <math.h>
#include <string.h>

#include "../core/memory.h"
#include "../core/rng.h"
#include "kernels.h"
#include "openblas.h"

static double apply(pc_activation_fn act, double x)
{
    switch (act) {
    case PC_ACT_GELU:
        return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440));
    case PC_ACT_GELU_TANH:
        return 0.5 * x * (1.0 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    case PC_ACT_RELU:
        return x < 0.0 ? 0.0 : x;
    case PC_ACT_SILU:
        return x / (1.0 + exp(-x));
    case PC_ACT_TANH:
        return tanh(x);
    case PC_ACT_NONE:
    default:
        return x;
    }
}

void pc_convert(pc_runtime *rt, pc_dtype dst_dtype, void *dst, pc_dtype src_dtype, const void *src, int64_t n)
{
    (void)rt;
    if (n <= 0)
        return;
    if (dst_dtype == src_dtype) {
        memcpy(dst, src, (size_t)n * pc_dtype_size(src_dtype));
        return;
    }
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dst_dtype, dst, i, pc_get_double(src_dtype, src, i));
}

typedef struct finish {
    pc_dtype dt, bdt;
    int64_t n;
    const void *bias;
    pc_activation_fn act;
    void *y;
} finish;

static void finish_rows(void *ctx, int64_t begin, int64_t end)
{
    const finish *f = ctx;
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < f->n; j++) {
            double v = pc_get_double(f->dt, f->y, i * f->n + j);
            if (f->bias != NULL)
                v += pc_get_double(f->bdt, f->bias, j);
            pc_put_double(f->dt, f->y, i * f->n + j, apply(f->act, v));
        }
}

static pc_status linear(pc_runtime *rt, pc_dtype dt, bool trans, int64_t m, int64_t n, int64_t k, const void *x,
                        pc_dtype wdt, const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err)
{
    if (m <= 0 || n <= 0)
        return PC_OK;
    void *wide = NULL;
    if (wdt != dt) {
        wide = pc_malloc((size_t)(n * k) * pc_dtype_size(dt));
        if (wide == NULL)
            return pc_fail_nomem(err, "a weight");
        pc_convert(rt, dt, wide, wdt, w, n * k);
        w = wide;
    }
    pc_status status = pc_gemm(rt, dt, false, trans, m, n, k, 1.0, x, k, w, trans ? k : n, 0.0, y, n, err);
    pc_free(wide);
    finish f = {dt, wdt, n, bias, act, y};
    if (status == PC_OK && (bias != NULL || act != PC_ACT_NONE))
        pc_parallel_for(rt, m, 1, finish_rows, &f);
    return status;
}

pc_status pc_linear(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, pc_dtype wdt,
                    const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err)
{
    return linear(rt, dt, true, m, n, k, x, wdt, w, bias, act, y, err);
}

pc_status pc_linear_t(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, pc_dtype wdt,
                      const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err)
{
    return linear(rt, dt, false, m, n, k, x, wdt, w, bias, act, y, err);
}

pc_status pc_gemm(pc_runtime *rt, pc_dtype dt, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k,
                  double alpha, const void *a, int64_t lda, const void *b, int64_t ldb, double beta, void *c,
                  int64_t ldc, pc_error *err)
{
    (void)rt;
    (void)err;
    if (m <= 0 || n <= 0)
        return PC_OK;
    if (k <= 0) {
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++)
                pc_put_double(dt, c, i * ldc + j, beta == 0.0 ? 0.0 : beta * pc_get_double(dt, c, i * ldc + j));
        return PC_OK;
    }
    int ta = trans_a ? PC_BLAS_TRANS : PC_BLAS_NO_TRANS, tb = trans_b ? PC_BLAS_TRANS : PC_BLAS_NO_TRANS;
    if (dt == PC_F64)
        PC_BLAS(cblas_dgemm)(PC_BLAS_ROW_MAJOR, ta, tb, (int32_t)m, (int32_t)n, (int32_t)k, alpha, a, (int32_t)lda, b,
                             (int32_t)ldb, beta, c, (int32_t)ldc);
    else
        PC_BLAS(cblas_sgemm)(PC_BLAS_ROW_MAJOR, ta, tb, (int32_t)m, (int32_t)n, (int32_t)k, (float)alpha, a,
                             (int32_t)lda, b, (int32_t)ldb, (float)beta, c, (int32_t)ldc);
    return PC_OK;
}

pc_status pc_lowrank_add(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, int64_t r, const void *x,
                         pc_dtype adt, const void *a, const void *e, pc_dtype bdt, const void *b, double scale,
                         void *y, pc_error *err)
{
    if (m <= 0 || n <= 0 || r <= 0)
        return PC_OK;
    size_t size = pc_dtype_size(dt);
    char *t = pc_malloc((size_t)(m * r + n * r) * size);
    if (t == NULL)
        return pc_fail_nomem(err, "a low-rank product");
    char *wide = t + (size_t)(m * r) * size;
    pc_status status = pc_linear(rt, dt, m, r, k, x, adt, a, NULL, PC_ACT_NONE, t, err);
    if (status == PC_OK) {
        if (e != NULL)
            pc_scale_columns(rt, dt, m, r, t, adt, e, t);
        pc_convert(rt, dt, wide, bdt, b, n * r);
        status = pc_gemm(rt, dt, false, true, m, n, r, scale, t, r, wide, r, 1.0, y, n, err);
    }
    pc_free(t);
    return status;
}

void pc_scale_columns(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                      void *y)
{
    (void)rt;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j, pc_get_double(dt, x, i * n + j) * pc_get_double(sdt, s, j));
}

void pc_scale_rows(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                   void *y)
{
    (void)rt;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j, pc_get_double(dt, x, i * n + j) * pc_get_double(sdt, s, i));
}

void pc_add_row(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, pc_dtype vdt, const void *v, double scale, void *y)
{
    (void)rt;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j, pc_get_double(dt, y, i * n + j) + scale * pc_get_double(vdt, v, j));
}

void pc_add(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, double scale, void *y)
{
    (void)rt;
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dt, y, i, pc_get_double(dt, y, i) + scale * pc_get_double(dt, x, i));
}

void pc_activate(pc_runtime *rt, pc_dtype dt, pc_activation_fn act, int64_t n, const void *x, void *y)
{
    (void)rt;
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dt, y, i, apply(act, pc_get_double(dt, x, i)));
}

void pc_dropout(pc_runtime *rt, pc_dtype dt, int64_t n, const void *x, double p, uint64_t seed, uint64_t stream,
                void *y)
{
    (void)rt;
    pc_rng rng = {seed, stream};
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dt, y, i,
                      (double)pc_rng_unit(rng, (uint64_t)i) >= p ? pc_get_double(dt, x, i) * (1.0 / (1.0 - p)) : 0.0);
}

void pc_layer_norm(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, const void *residual, pc_dtype wdt,
                   const void *weight, const void *bias, double eps, void *y)
{
    (void)rt;
    for (int64_t i = 0; i < m; i++) {
        double mean = 0.0, var = 0.0;
        for (int64_t j = 0; j < n; j++) {
            double v = pc_get_double(dt, x, i * n + j);
            if (residual != NULL)
                v += pc_get_double(dt, residual, i * n + j);
            pc_put_double(dt, y, i * n + j, v);
            mean += v;
        }
        mean /= (double)n;
        for (int64_t j = 0; j < n; j++) {
            double d = pc_get_double(dt, y, i * n + j) - mean;
            var += d * d;
        }
        double rstd = 1.0 / sqrt(var / (double)n + eps);
        for (int64_t j = 0; j < n; j++) {
            double v = (pc_get_double(dt, y, i * n + j) - mean) * rstd;
            if (weight != NULL)
                v *= pc_get_double(wdt, weight, j);
            if (bias != NULL)
                v += pc_get_double(wdt, bias, j);
            pc_put_double(dt, y, i * n + j, v);
        }
    }
}

void pc_rms_norm(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype wdt, const void *weight,
                 double eps, void *y)
{
    (void)rt;
    for (int64_t i = 0; i < m; i++) {
        double sum = 0.0;
        for (int64_t j = 0; j < n; j++) {
            double v = pc_get_double(dt, x, i * n + j);
            sum += v * v;
        }
        double r = 1.0 / sqrt(sum / (double)n + eps);
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j,
                          pc_get_double(dt, x, i * n + j) * r * (weight != NULL ? pc_get_double(wdt, weight, j) : 1.0));
    }
}

void pc_softmax(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, void *y)
{
    (void)rt;
    for (int64_t i = 0; i < m; i++) {
        double max = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j < n; j++)
            max = fmax(max, pc_get_double(dt, x, i * n + j));
        for (int64_t j = 0; j < n; j++) {
            double e = exp(pc_get_double(dt, x, i * n + j) - max);
            pc_put_double(dt, y, i * n + j, e);
            sum += e;
        }
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j, pc_get_double(dt, y, i * n + j) / sum);
    }
}

pc_status pc_attention(pc_runtime *rt, pc_dtype dt, int64_t batch, int64_t heads, int64_t tq, int64_t tk, int64_t dim,
                       const void *q, const void *k, const void *v, const uint8_t *mask, double scale, void *out,
                       pc_error *err)
{
    (void)rt;
    double *s = pc_malloc((size_t)tk * sizeof *s);
    if (s == NULL)
        return pc_fail_nomem(err, "attention");
    int64_t width = heads * dim;
    for (int64_t b = 0; b < batch; b++) {
        bool any = mask == NULL;
        for (int64_t j = 0; !any && j < tk; j++)
            any = mask[b * tk + j] != 0;
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < tq; i++) {
                double max = -INFINITY, sum = 0.0;
                for (int64_t j = 0; j < tk; j++) {
                    double dot = 0.0;
                    for (int64_t d = 0; d < dim; d++)
                        dot += pc_get_double(dt, q, (b * tq + i) * width + h * dim + d) *
                               pc_get_double(dt, k, (b * tk + j) * width + h * dim + d);
                    s[j] = !any ? 0.0 : mask == NULL || mask[b * tk + j] ? dot * scale : -INFINITY;
                    max = fmax(max, s[j]);
                }
                for (int64_t j = 0; j < tk; j++)
                    sum += s[j] = exp(s[j] - max);
                for (int64_t d = 0; d < dim; d++) {
                    double o = 0.0;
                    for (int64_t j = 0; j < tk; j++)
                        o += s[j] / sum * pc_get_double(dt, v, (b * tk + j) * width + h * dim + d);
                    pc_put_double(dt, out, (b * tq + i) * width + h * dim + d, o);
                }
            }
    }
    pc_free(s);
    return PC_OK;
}

void pc_gather_rows(pc_runtime *rt, pc_dtype dt, int64_t n, int64_t dim, const int64_t *ids, pc_dtype tdt,
                    const void *table, void *y)
{
    for (int64_t i = 0; i < n; i++)
        pc_convert(rt, dt, (char *)y + (size_t)(i * dim) * pc_dtype_size(dt), tdt,
                   (const char *)table + (size_t)(ids[i] * dim) * pc_dtype_size(tdt), dim);
}

pc_status pc_conv_output(pc_conv_shape *s, pc_error *err)
{
    const int64_t in[2] = {s->height, s->width};
    int64_t out[2];
    for (int i = 0; i < 2; i++) {
        int64_t reach = s->dilation[i] * (s->kernel[i] - 1) + 1;
        int64_t padded = in[i] + 2 * s->padding[i];
        if (padded < reach)
            return pc_fail(err, PC_ERR_VALUE, "conv2d: kernel %lld with dilation %lld does not fit input %lld with padding %lld",
                           (long long)s->kernel[i], (long long)s->dilation[i], (long long)in[i], (long long)s->padding[i]);
        out[i] = (padded - reach) / s->stride[i] + 1;
    }
    s->out_height = out[0];
    s->out_width = out[1];
    return PC_OK;
}

pc_status pc_conv2d(pc_runtime *rt, pc_dtype dt, const pc_conv_shape *s, const void *x, pc_dtype wdt, const void *w,
                    const void *bias, void *y, pc_error *err)
{
    (void)rt;
    (void)err;
    int64_t ig = s->in_channels / s->groups, og = s->out_channels / s->groups;
    int64_t at = 0;
    for (int64_t b = 0; b < s->batch; b++)
        for (int64_t o = 0; o < s->out_channels; o++)
            for (int64_t oy = 0; oy < s->out_height; oy++)
                for (int64_t ox = 0; ox < s->out_width; ox++) {
                    double sum = bias != NULL ? pc_get_double(wdt, bias, o) : 0.0;
                    for (int64_t c = 0; c < ig; c++)
                        for (int64_t ky = 0; ky < s->kernel[0]; ky++)
                            for (int64_t kx = 0; kx < s->kernel[1]; kx++) {
                                int64_t iy = oy * s->stride[0] - s->padding[0] + ky * s->dilation[0];
                                int64_t ix = ox * s->stride[1] - s->padding[1] + kx * s->dilation[1];
                                if (iy < 0 || iy >= s->height || ix < 0 || ix >= s->width)
                                    continue;
                                int64_t channel = o / og * ig + c;
                                sum += pc_get_double(dt, x, ((b * s->in_channels + channel) * s->height + iy) * s->width + ix) *
                                       pc_get_double(wdt, w, ((o * ig + c) * s->kernel[0] + ky) * s->kernel[1] + kx);
                            }
                    pc_put_double(dt, y, at++, sum);
                }
    return PC_OK;
}

void pc_kernels_init(void) { PC_BLAS(openblas_set_num_threads)(1); }
const char *pc_kernels_isa(void) { return "generic"; }
const char *pc_kernels_blas(void) { return PC_BLAS(openblas_get_config)(); }
