/* Row operations (pc_row_ops) in terms of a vector type V of VW elements of type REAL.  Included by the ISA files. */

static inline V v_act(pc_activation_fn act, V x)
{
    switch (act) {
    case PC_ACT_GELU:
        return v_gelu(x);
    case PC_ACT_GELU_TANH:
        return v_gelu_tanh(x);
    case PC_ACT_RELU:
        return v_max(v_set1(0), x);
    case PC_ACT_SILU:
        return v_silu(x);
    case PC_ACT_TANH:
        return v_tanh(x);
    case PC_ACT_NONE:
    default:
        return x;
    }
}

static void row_activate(pc_activation_fn act, int64_t n, const void *x_, void *y_)
{
    const REAL *x = x_;
    REAL *y = y_;
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        v_store(y + i, v_act(act, v_load(x + i)));
    if (i < n)
        v_storen(y + i, v_act(act, v_loadn(x + i, n - i)), n - i);
}

static void row_finish(pc_activation_fn act, int64_t n, const void *bias_, void *y_)
{
    const REAL *bias = bias_;
    REAL *y = y_;
    if (bias == NULL) {
        if (act != PC_ACT_NONE)
            row_activate(act, n, y, y);
        return;
    }
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        v_store(y + i, v_act(act, v_load(y + i) + v_load(bias + i)));
    if (i < n)
        v_storen(y + i, v_act(act, v_loadn(y + i, n - i) + v_loadn(bias + i, n - i)), n - i);
}

static void row_multiply(int64_t n, const void *x_, const void *s_, void *y_)
{
    const REAL *x = x_, *s = s_;
    REAL *y = y_;
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        v_store(y + i, v_load(x + i) * v_load(s + i));
    if (i < n)
        v_storen(y + i, v_loadn(x + i, n - i) * v_loadn(s + i, n - i), n - i);
}

static void row_scale(int64_t n, const void *x_, double c, void *y_)
{
    const REAL *x = x_;
    REAL *y = y_;
    V factor = v_set1((REAL)c);
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        v_store(y + i, v_load(x + i) * factor);
    if (i < n)
        v_storen(y + i, v_loadn(x + i, n - i) * factor, n - i);
}

static void row_axpy(int64_t n, double c, const void *x_, void *y_)
{
    const REAL *x = x_;
    REAL *y = y_;
    V factor = v_set1((REAL)c);
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        v_store(y + i, v_fma(factor, v_load(x + i), v_load(y + i)));
    if (i < n)
        v_storen(y + i, v_fma(factor, v_loadn(x + i, n - i), v_loadn(y + i, n - i)), n - i);
}

/* The sum of squared distances from `centre`; lanes past the end do not count. */
static double squares_about(int64_t n, const REAL *x, REAL centre)
{
    V c = v_set1(centre), s0 = v_set1(0), s1 = v_set1(0);
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        V d0 = v_load(x + i) - c, d1 = v_load(x + i + VW) - c;
        s0 = v_fma(d0, d0, s0);
        s1 = v_fma(d1, d1, s1);
    }
    double sum = (double)v_sum(s0 + s1);
    for (; i < n; i++)
        sum += ((double)x[i] - (double)centre) * ((double)x[i] - (double)centre);
    return sum;
}

static void row_moments(int64_t n, const void *x_, const void *residual_, void *y_, double *mean, double *variance)
{
    const REAL *x = x_, *residual = residual_;
    REAL *y = y_;
    V s0 = v_set1(0);
    double sum = 0.0;
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        V v = v_load(x + i);
        if (residual != NULL)
            v = v + v_load(residual + i);
        v_store(y + i, v);
        s0 = s0 + v;
    }
    for (; i < n; i++) {
        y[i] = residual != NULL ? x[i] + residual[i] : x[i];
        sum += (double)y[i];
    }
    sum += (double)v_sum(s0);
    *mean = sum / (double)n;
    *variance = squares_about(n, y, (REAL)*mean) / (double)n;
}

static void row_spread(int64_t n, const void *x_, double *mean, double *variance)
{
    const REAL *x = x_;
    V s0 = v_set1(0);
    double sum = 0.0;
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        s0 = s0 + v_load(x + i);
    for (; i < n; i++)
        sum += (double)x[i];
    sum += (double)v_sum(s0);
    *mean = sum / (double)n;
    *variance = squares_about(n, x, (REAL)*mean) / (double)n;
}

static double row_mean_square(int64_t n, const void *x) { return squares_about(n, x, 0) / (double)n; }

static void row_normalise(int64_t n, const void *x_, double mean, double r, const void *weight_, const void *bias_,
                          void *y_)
{
    const REAL *x = x_, *weight = weight_, *bias = bias_;
    REAL *y = y_;
    V centre = v_set1((REAL)mean), factor = v_set1((REAL)r);
    for (int64_t i = 0; i < n; i += VW) {
        int64_t left = n - i;
        bool whole = left >= VW;
        V v = ((whole ? v_load(x + i) : v_loadn(x + i, left)) - centre) * factor;
        if (weight != NULL)
            v = v * (whole ? v_load(weight + i) : v_loadn(weight + i, left));
        if (bias != NULL)
            v = v + (whole ? v_load(bias + i) : v_loadn(bias + i, left));
        if (whole)
            v_store(y + i, v);
        else
            v_storen(y + i, v, left);
    }
}

static void row_softmax(int64_t n, const void *x_, double c, const void *add_, void *y_)
{
    const REAL *x = x_, *add = add_;
    REAL *y = y_;
    V factor = v_set1((REAL)c), top = v_set1(-(REAL)INFINITY), sums = v_set1(0);
    REAL highest = -(REAL)INFINITY;
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        V v = v_load(x + i) * factor;
        if (add != NULL)
            v = v + v_load(add + i);
        v_store(y + i, v);
        top = v_max(top, v);
    }
    int64_t whole = i;
    for (; i < n; i++) {
        REAL v = x[i] * (REAL)c;
        if (add != NULL)
            v += add[i];
        y[i] = v;
        highest = v > highest ? v : highest;
    }
    REAL high = v_highest(top); /* NaN may be lost here, but not in the exponentials below */
    if (high > highest)
        highest = high;
    V offset = v_set1(highest);
    for (i = 0; i < whole; i += VW) {
        V v = v_exp(v_load(y + i) - offset);
        v_store(y + i, v);
        sums = sums + v;
    }
    REAL sum = v_sum(sums);
    if (i < n) {
        v_storen(y + i, v_exp(v_loadn(y + i, n - i) - offset), n - i);
        for (; i < n; i++)
            sum += y[i];
    }
    row_scale(n, y, (double)((REAL)1 / sum), y);
}

#include "simd_gradients.h"

ROW_OPS_LINKAGE const pc_row_ops ROW_OPS_NAME = {
    row_activate,    row_finish,    row_multiply, row_scale,         row_axpy,           row_moments,
    row_spread,      row_mean_square, row_normalise, row_softmax,  row_activate_back, row_normalise_back, row_softmax_back,
    row_scale_back};
