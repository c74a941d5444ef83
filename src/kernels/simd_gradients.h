/* Row operations that gradients are made of.  Included by simd_rows.h. */

static inline V v_act_slope(pc_activation_fn act, V saved)
{
    switch (act) {
    case PC_ACT_GELU:
        return v_gelu_slope(saved);
    case PC_ACT_GELU_TANH:
        return v_gelu_tanh_slope(saved);
    case PC_ACT_RELU:
        return v_select_less(v_set1(0), saved, v_set1(1), v_set1(0));
    case PC_ACT_SILU:
        return v_silu_slope(saved);
    case PC_ACT_TANH:
        return v_set1(1) - saved * saved;
    case PC_ACT_NONE:
    default:
        return v_set1(1);
    }
}

static void row_activate_back(pc_activation_fn act, int64_t n, const void *saved_, const void *dy_, void *dx_)
{
    const REAL *saved = saved_, *dy = dy_;
    REAL *dx = dx_;
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        v_store(dx + i, v_load(dy + i) * v_act_slope(act, v_load(saved + i)));
    if (i < n)
        v_storen(dx + i, v_loadn(dy + i, n - i) * v_act_slope(act, v_loadn(saved + i, n - i)), n - i);
}

static void row_normalise_back(int64_t n, bool centred, const void *x_, double mean, double r, const void *weight_,
                               const void *dy_, void *dx_)
{
    const REAL *x = x_, *weight = weight_, *dy = dy_;
    REAL *dx = dx_;
    V centre = v_set1((REAL)mean), factor = v_set1((REAL)r), sums = v_set1(0), along = v_set1(0);
    for (int64_t i = 0; i < n; i += VW) { /* lanes past the end have g = 0 */
        int64_t left = n - i;
        bool whole = left >= VW;
        V g = whole ? v_load(dy + i) : v_loadn(dy + i, left);
        if (weight != NULL)
            g = g * (whole ? v_load(weight + i) : v_loadn(weight + i, left));
        sums = sums + g;
        along = v_fma(g, ((whole ? v_load(x + i) : v_loadn(x + i, left)) - centre) * factor, along);
    }
    V a = v_set1(centred ? v_sum(sums) / (REAL)n : (REAL)0), b = v_set1(v_sum(along) / (REAL)n);
    for (int64_t i = 0; i < n; i += VW) {
        int64_t left = n - i;
        bool whole = left >= VW;
        V g = whole ? v_load(dy + i) : v_loadn(dy + i, left);
        if (weight != NULL)
            g = g * (whole ? v_load(weight + i) : v_loadn(weight + i, left));
        V normal = ((whole ? v_load(x + i) : v_loadn(x + i, left)) - centre) * factor;
        g = (g - a - normal * b) * factor;
        if (whole)
            v_store(dx + i, g);
        else
            v_storen(dx + i, g, left);
    }
}

static void row_softmax_back(int64_t n, const void *y_, const void *dy_, double c, void *dx_)
{
    const REAL *y = y_, *dy = dy_;
    REAL *dx = dx_;
    V sums = v_set1(0), factor = v_set1((REAL)c);
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        sums = v_fma(v_load(y + i), v_load(dy + i), sums);
    if (i < n)
        sums = v_fma(v_loadn(y + i, n - i), v_loadn(dy + i, n - i), sums);
    V sum = v_set1(v_sum(sums));
    for (i = 0; i + VW <= n; i += VW)
        v_store(dx + i, (v_load(dy + i) - sum) * v_load(y + i) * factor);
    if (i < n)
        v_storen(dx + i, (v_loadn(dy + i, n - i) - sum) * v_loadn(y + i, n - i) * factor, n - i);
}

/* A few rows at once, so that dv is in hand for all of them; R is a constant where this is called. */
static inline void scale_back_rows(int R, int64_t n, const REAL *dy, int64_t lddy, const REAL *x, int64_t ldx,
                                   const REAL *v, REAL *dx, int64_t lddx, REAL *dv)
{
    for (int64_t i = 0; i < n; i += VW) {
        int64_t left = n - i;
        bool whole = left >= VW;
        V factor = whole ? v_load(v + i) : v_loadn(v + i, left), sum = v_set1(0);
        for (int r = 0; r < R; r++) {
            V g = whole ? v_load(dy + r * lddy + i) : v_loadn(dy + r * lddy + i, left);
            if (dv != NULL)
                sum = v_fma(g, whole ? v_load(x + r * ldx + i) : v_loadn(x + r * ldx + i, left), sum);
            if (dx != NULL && whole)
                v_store(dx + r * lddx + i, g * factor);
            else if (dx != NULL)
                v_storen(dx + r * lddx + i, g * factor, left);
        }
        if (dv != NULL && whole)
            v_store(dv + i, v_load(dv + i) + sum);
        else if (dv != NULL)
            v_storen(dv + i, v_loadn(dv + i, left) + sum, left);
    }
}

static void row_scale_back(int64_t n, int64_t rows, const void *dy, int64_t lddy, const void *x, int64_t ldx,
                           const void *v, void *dx, int64_t lddx, void *dv)
{
    if (rows == 4 && dx != NULL && dv != NULL)
        scale_back_rows(4, n, dy, lddy, x, ldx, v, dx, lddx, dv);
    else
        scale_back_rows((int)rows, n, dy, lddy, x, ldx, v, dx, lddx, dv);
}
