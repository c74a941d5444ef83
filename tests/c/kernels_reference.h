/* The simplest loops that do what src/kernels/kernels.h says, in f64 arithmetic: what the fast kernels are compared
 * with. */
#ifndef PEFTC_TESTS_KERNELS_REFERENCE_H
#define PEFTC_TESTS_KERNELS_REFERENCE_H

#include <math.h>
#include <string.h>

#include "../../src/core/memory.h"
#include "../../src/core/rng.h"
#include "../../src/kernels/kernels.h"

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

static void ref_convert(pc_dtype dst_dtype, void *dst, pc_dtype src_dtype, const void *src, int64_t n)
{
    if (n <= 0)
        return;
    if (dst_dtype == src_dtype) {
        memcpy(dst, src, (size_t)n * pc_dtype_size(src_dtype));
        return;
    }
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dst_dtype, dst, i, pc_get_double(src_dtype, src, i));
}

static void ref_product(pc_dtype dt, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, double alpha,
                        pc_dtype adt, const void *a, int64_t lda, pc_dtype bdt, const void *b, int64_t ldb, double beta,
                        pc_dtype biasdt, const void *bias, pc_activation_fn act, void *c, int64_t ldc)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0;
            for (int64_t p = 0; p < k; p++)
                sum += pc_get_double(adt, a, trans_a ? p * lda + i : i * lda + p) *
                       pc_get_double(bdt, b, trans_b ? j * ldb + p : p * ldb + j);
            sum *= alpha;
            if (beta != 0.0)
                sum += beta * pc_get_double(dt, c, i * ldc + j);
            if (bias != NULL)
                sum += pc_get_double(biasdt, bias, j);
            pc_put_double(dt, c, i * ldc + j, apply(act, sum));
        }
}

static void ref_scale_columns(pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                      void *y)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j, pc_get_double(dt, x, i * n + j) * pc_get_double(sdt, s, j));
}

static void ref_scale_rows(pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype sdt, const void *s,
                   void *y)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j, pc_get_double(dt, x, i * n + j) * pc_get_double(sdt, s, i));
}

static void ref_add_row(pc_dtype dt, int64_t m, int64_t n, pc_dtype vdt, const void *v, double scale, void *y)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            pc_put_double(dt, y, i * n + j, pc_get_double(dt, y, i * n + j) + scale * pc_get_double(vdt, v, j));
}

static void ref_add(pc_dtype dt, int64_t n, const void *x, double scale, void *y)
{
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dt, y, i, pc_get_double(dt, y, i) + scale * pc_get_double(dt, x, i));
}

static void ref_dropout(pc_dtype dt, int64_t n, const void *x, double p, uint64_t seed, uint64_t stream,
                void *y)
{
    pc_rng rng = {seed, stream};
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dt, y, i,
                      (double)pc_rng_unit(rng, (uint64_t)i) >= p ? pc_get_double(dt, x, i) * (1.0 / (1.0 - p)) : 0.0);
}

static void ref_layer_norm(pc_dtype dt, int64_t m, int64_t n, const void *x, const void *residual, pc_dtype wdt,
                   const void *weight, const void *bias, double eps, void *y)
{
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

static void ref_rms_norm(pc_dtype dt, int64_t m, int64_t n, const void *x, pc_dtype wdt, const void *weight,
                 double eps, void *y)
{
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

static void ref_softmax(pc_dtype dt, int64_t m, int64_t n, const void *x, void *y)
{
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

static void ref_attention(pc_dtype dt, int64_t batch, int64_t heads, int64_t tq, int64_t tk, int64_t dim,
                       const void *q, const void *k, const void *v, const uint8_t *mask, double scale, void *out)
{
    double *s = pc_malloc((size_t)tk * sizeof *s);
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
}

static void ref_gather_rows(pc_dtype dt, int64_t n, int64_t dim, const int64_t *ids, pc_dtype tdt,
                    const void *table, void *y)
{
    for (int64_t i = 0; i < n; i++)
        ref_convert(dt, (char *)y + (size_t)(i * dim) * pc_dtype_size(dt), tdt,
                   (const char *)table + (size_t)(ids[i] * dim) * pc_dtype_size(tdt), dim);
}

static void ref_conv2d(pc_dtype dt, const pc_conv_shape *s, const void *x, pc_dtype wdt, const void *w,
                    const void *bias, void *y)
{
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
}

#endif
