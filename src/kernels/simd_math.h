/* Elementary functions on f32 vectors.  Included by the ISA files after their vector operations.
 * Polynomials: our own least-squares fits, reweighted towards the minimax one; errors measured over all of the
 * range in tests/c/test_kernels.c. */

#define LOG2E 0x1.715476p+0f
#define LN2_HIGH (355.0f / 512.0f) /* few bits: n · LN2_HIGH is exact */
#define LN2_LOW (-2.12194440e-4f)

/* e^x: relative error below 2e-7; 0 below -105, infinity above 88.73, NaN for NaN. */
static inline V v_exp(V x)
{
    x = v_min(v_set1(90.0f), v_max(v_set1(-105.0f), x));
    V n = v_round(x * v_set1(LOG2E));
    V r = v_fma(n, v_set1(-LN2_LOW), v_fma(n, v_set1(-LN2_HIGH), x));
    V p = v_set1(0x1.6a2348p-10f);
    p = v_fma(p, r, v_set1(0x1.123a6cp-7f));
    p = v_fma(p, r, v_set1(0x1.5558f4p-5f));
    p = v_fma(p, r, v_set1(0x1.555490p-3f));
    p = v_fma(p, r, v_set1(0x1.fffffcp-2f));
    p = v_fma(p, r * r, r) + v_set1(1.0f);
    return v_scale2(p, n);
}

/* P(t)^8 = 2 / erfc(t/√2) for t in [0, 15]. */
static inline V v_gelu_power(V t)
{
    V p = v_set1(3.3544602e-06f);
    p = v_fma(p, t, v_set1(-2.03807795e-05f));
    p = v_fma(p, t, v_set1(0.000118087548f));
    p = v_fma(p, t, v_set1(8.75046389e-05f));
    p = v_fma(p, t, v_set1(0.00112559216f));
    p = v_fma(p, t, v_set1(0.00931583438f));
    p = v_fma(p, t, v_set1(0.0488703847f));
    p = v_fma(p, t, v_set1(0.108752005f));
    p = v_fma(p, t, v_set1(1.09050834f));
    p = p * p;
    p = p * p;
    return p * p;
}

/* x Φ(x) = max(x, 0) - g(|x|), g(t) = t · ½ erfc(t/√2) = t / P(t)^8: absolute error below 3e-7, because g never
 * exceeds 0.17, and no cancellation for large |x|. */
static inline V v_gelu(V x)
{
    V t = v_min(v_set1(15.0f), v_abs(x));
    return v_max(v_set1(0.0f), x) - t / v_gelu_power(t);
}

/* x / (1 + e^-x) */
static inline V v_silu(V x) { return x / (v_set1(1.0f) + v_exp(v_set1(0.0f) - x)); }

/* ½x (1 + tanh u) = x / (1 + e^-2u), u = √(2/π) (x + 0.044715 x³) */
static inline V v_gelu_tanh(V x)
{
    const float c = -2.0f * 0.79788456f;
    return x / (v_set1(1.0f) + v_exp(x * v_fma(x * x, v_set1(c * 0.044715f), v_set1(c))));
}

static inline V v_tanh(V x)
{
    V t = v_abs(x), u = x * x;
    V p = v_set1(-0.00551513862f); /* near 0, where the other form cancels */
    p = v_fma(p, u, v_set1(0.0204693936f));
    p = v_fma(p, u, v_set1(-0.0536880121f));
    p = v_fma(p, u, v_set1(0.133308306f));
    p = v_fma(p, u, v_set1(-0.333332598f));
    p = v_fma(p * u, t, t);
    V q = v_set1(1.0f) - v_set1(2.0f) / (v_exp(t + t) + v_set1(1.0f));
    V r = v_select_less(t, v_set1(0.65f), p, q);
    return v_copysign(r, x);
}

/* d/dx of gelu: Φ(x) + x φ(x), with ½ erfc(t/√2) = 1 / P(t)^8: absolute error below 1e-6. */
static inline V v_gelu_slope(V x)
{
    V t = v_min(v_set1(15.0f), v_abs(x));
    V tail = v_set1(1.0f) / v_gelu_power(t), density = v_set1(0.39894228f) * v_exp(x * x * v_set1(-0.5f));
    return v_fma(x, density, v_select_less(x, v_set1(0.0f), tail, v_set1(1.0f) - tail));
}

/* s + x s (1 - s), s = 1 / (1 + e^-x) */
static inline V v_silu_slope(V x)
{
    V s = v_set1(1.0f) / (v_set1(1.0f) + v_exp(v_set1(0.0f) - x));
    return v_fma(x * s, v_set1(1.0f) - s, s);
}

/* s + x s (1 - s) (2u)', s = 1 / (1 + e^-2u) */
static inline V v_gelu_tanh_slope(V x)
{
    const float c = 2.0f * 0.79788456f;
    V square = x * x, s = v_set1(1.0f) / (v_set1(1.0f) + v_exp(v_set1(0.0f) - x * v_fma(square, v_set1(c * 0.044715f), v_set1(c))));
    V inner = x * v_fma(square, v_set1(3.0f * c * 0.044715f), v_set1(c));
    return v_fma(inner * s, v_set1(1.0f) - s, s);
}
