/* Row operations in f64: the same code as for f32 with vectors of one, and the C library's functions. */
#include "simd_common.h"

#define REAL double
#define VW 1
typedef double V;

static inline V v_set1(double x) { return x; }
static inline V v_load(const double *p) { return *p; }
static inline void v_store(double *p, V v) { *p = v; }
static inline V v_loadn(const double *p, int64_t n)
{
    (void)n;
    return *p;
}
static inline void v_storen(double *p, V v, int64_t n)
{
    (void)n;
    *p = v;
}
static inline V v_fma(V a, V b, V c) { return a * b + c; }
static inline V v_max(V a, V b) { return a > b ? a : b; }
static inline double v_sum(V a) { return a; }
static inline double v_highest(V a) { return a; }
static inline V v_exp(V x) { return exp(x); }
static inline V v_tanh(V x) { return tanh(x); }
static inline V v_gelu(V x) { return 0.5 * x * erfc(-0.70710678118654752440 * x); }
static inline V v_gelu_tanh(V x) { return x / (1.0 + exp(-2.0 * 0.79788456080286535588 * (x + 0.044715 * x * x * x))); }
static inline V v_silu(V x) { return x / (1.0 + exp(-x)); }

static inline V v_select_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
static inline V v_gelu_slope(V x)
{
    return 0.5 * erfc(-0.70710678118654752440 * x) + 0.39894228040143267794 * x * exp(-0.5 * x * x);
}
static inline V v_silu_slope(V x)
{
    double s = 1.0 / (1.0 + exp(-x));
    return s + x * s * (1.0 - s);
}
static inline V v_gelu_tanh_slope(V x)
{
    const double c = 2.0 * 0.79788456080286535588;
    double s = 1.0 / (1.0 + exp(-c * (x + 0.044715 * x * x * x)));
    return s + c * x * (1.0 + 3.0 * 0.044715 * x * x) * s * (1.0 - s);
}

#undef ROW_OPS_LINKAGE
#define ROW_OPS_LINKAGE
#define ROW_OPS_NAME pc_rows_f64

#include "simd_rows.h"
