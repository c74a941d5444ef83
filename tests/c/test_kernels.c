/* Every kernel on every instruction set of this machine against the loops of kernels_reference.h, over random shapes
 * and dtypes, in buffers of exactly the right size. */
#include "check.h"
#include "kernels_reference.h"

#include "../../src/kernels/mersenne.h"
#include "../../src/kernels/scale.h"
#include "../../src/kernels/table.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t state = 88172645463325252u;
static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}
static int64_t below(int64_t n) { return (int64_t)(next_random() % (uint64_t)n); }
static double uniform(void) { return (double)(next_random() >> 11) * 0x1p-53 * 2.0 - 1.0; }

static const pc_dtype all_dtypes[4] = {PC_F32, PC_F64, PC_F16, PC_BF16};
static const int64_t extents[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 64, 65, 97, 130};
static int64_t extent(void) { return extents[below((int64_t)(sizeof extents / sizeof *extents))]; }

static void *buffer(pc_dtype dt, int64_t n)
{
    void *p = malloc((size_t)n * pc_dtype_size(dt) + (n == 0));
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dt, p, i, uniform());
    return p;
}

static void *copy_of(pc_dtype dt, const void *x, int64_t n)
{
    void *p = malloc((size_t)n * pc_dtype_size(dt) + (n == 0));
    memcpy(p, x, (size_t)n * pc_dtype_size(dt));
    return p;
}

/* Largest |got - want| / (1 + |want|); NaN and infinity must agree. */
static double distance(pc_dtype dt, const void *got, const void *want, int64_t n)
{
    double worst = 0.0;
    for (int64_t i = 0; i < n; i++) {
        double g = pc_get_double(dt, got, i), w = pc_get_double(dt, want, i);
        if (isnan(w) || isinf(w)) {
            if (isnan(w) ? !isnan(g) : g != w)
                return INFINITY;
        } else {
            double d = fabs(g - w) / (1.0 + fabs(w));
            if (!(d <= worst))
                worst = isnan(d) ? INFINITY : d;
        }
    }
    return worst;
}

static double tolerance(pc_dtype dt, int64_t k) { return (dt == PC_F64 ? 1e-14 : 1e-6) * (4.0 + sqrt((double)k)); }

static pc_runtime *rt;
static const char *isas[] = {"generic", "avx2", "avx512", "neon"};

TEST(linear)
{
    pc_error err;
    for (int round = 0; round < 400; round++) {
        pc_dtype dt = all_dtypes[below(2)], wdt = all_dtypes[below(4)];
        int64_t m = extent(), n = extent(), k = extent();
        if (round % 40 == 0) {
            k = 1000 + below(1200);
            m = 1 + below(120);
        }
        if (round % 40 == 1)
            k = 512 * (1 + below(4));
        bool rows = below(2) != 0, biased = below(2) != 0;
        pc_activation_fn act = (pc_activation_fn)below(6);
        void *x = buffer(dt, m * k), *w = buffer(wdt, n * k), *bias = biased ? buffer(wdt, n) : NULL;
        void *y = buffer(dt, m * n), *want = copy_of(dt, y, m * n);
        if (below(4) == 0 && m * k > 0 && n > 0) { /* what is not finite stays in its own row */
            pc_put_double(dt, x, below(m * k), below(2) ? (double)NAN : (double)INFINITY);
            act = PC_ACT_NONE;
        }
        ref_product(dt, false, rows, m, n, k, 1.0, dt, x, k, wdt, w, rows ? k : n, 0.0, wdt, bias, act, want, n);
        pc_runtime *r = below(2) ? rt : NULL;
        CHECK_STATUS(rows ? pc_linear(r, dt, m, n, k, x, wdt, w, bias, act, y, &err)
                          : pc_linear_t(r, dt, m, n, k, x, wdt, w, bias, act, y, &err),
                     PC_OK);
        double d = distance(dt, y, want, m * n);
        if (d > tolerance(dt, k))
            fprintf(stderr, "%s rows %d dt %d wdt %d m %d n %d k %d act %d: %g\n", pc_kernels_isa(), rows, (int)dt,
                    (int)wdt, (int)m, (int)n, (int)k, (int)act, d);
        CHECK(d <= tolerance(dt, k));
        free(x), free(w), free(bias), free(y), free(want);
    }
}

TEST(many_rows)
{ /* enough of them that the weight is packed: several passes over the depth, copied rows, several slabs, odd edges */
    static const int64_t shapes[][3] = {{256, 17, 17}, {263, 49, 130}, {300, 33, 800}, {257, 20, 2048}, {700, 50, 1}};
    pc_error err;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int t = s < 2 ? 0 : 3; t < 4; t++) { /* all dtypes for the small ones */
            int64_t m = shapes[s][0], n = shapes[s][1], k = shapes[s][2];
            pc_dtype wdt = all_dtypes[s < 2 ? t : below(4)];
            pc_activation_fn act = (pc_activation_fn)below(6);
            void *x = buffer(PC_F32, m * k), *w = buffer(wdt, n * k), *bias = t % 2 ? buffer(wdt, n) : NULL;
            void *y = buffer(PC_F32, m * n), *z = buffer(PC_F32, m * n), *want = buffer(PC_F32, m * n);
            ref_product(PC_F32, false, true, m, n, k, 1.0, PC_F32, x, k, wdt, w, k, 0.0, wdt, bias, act, want, n);
            CHECK_STATUS(pc_linear(rt, PC_F32, m, n, k, x, wdt, w, bias, act, y, &err), PC_OK);
            CHECK_STATUS(pc_linear(NULL, PC_F32, m, n, k, x, wdt, w, bias, act, z, &err), PC_OK);
            CHECK(distance(PC_F32, y, want, m * n) <= tolerance(PC_F32, k));
            CHECK(memcmp(y, z, (size_t)(m * n) * sizeof(float)) == 0);
            free(x), free(w), free(bias), free(y), free(z), free(want);
        }
    int64_t m = 256, n = 1120, k = 700; /* two slabs */
    void *x = buffer(PC_F32, m * k), *w = buffer(PC_F32, n * k), *y = buffer(PC_F32, m * n), *want = buffer(PC_F32, m * n);
    CHECK_STATUS(pc_linear(rt, PC_F32, m, n, k, x, PC_F32, w, NULL, PC_ACT_NONE, y, &err), PC_OK);
    CHECK_STATUS(pc_gemm(NULL, PC_F32, false, true, m, n, k, 1.0, x, k, w, k, 0.0, want, n, &err), PC_OK);
    CHECK(distance(PC_F32, y, want, m * n) <= tolerance(PC_F32, k));
    pc_test_fail_allocation(1);
    CHECK_STATUS(pc_linear(rt, PC_F32, m, n, k, x, PC_F32, w, NULL, PC_ACT_NONE, y, &err), PC_ERR_NOMEM);
    pc_test_fail_allocation(0);
    free(x), free(w), free(y), free(want);
}

TEST(infinite_weights)
{ /* a weight that is not finite reaches its own column in every row, and no padding leaks */
    pc_error err;
    for (int64_t m = 1; m < 70; m += 3) {
        int64_t n = 20, k = 21;
        float *x = buffer(PC_F32, m * k), *w = buffer(PC_F32, n * k), *y = buffer(PC_F32, m * n);
        w[5 * k + 3] = INFINITY;
        w[19 * k + 20] = NAN;
        CHECK_STATUS(pc_linear(rt, PC_F32, m, n, k, x, PC_F32, w, NULL, PC_ACT_NONE, y, &err), PC_OK);
        for (int64_t i = 0; i < m * n; i++)
            CHECK(i % n == 5 ? isinf(y[i]) : i % n == 19 ? isnan(y[i]) : isfinite(y[i]));
        free(x), free(w), free(y);
    }
}

TEST(threads_agree)
{
    pc_error err;
    int64_t m = 150, n = 200, k = 1500;
    float *x = buffer(PC_F32, m * k), *w = buffer(PC_F32, n * k), *y = buffer(PC_F32, m * n), *z = buffer(PC_F32, m * n);
    for (int rows = 1; rows <= m; rows += 149 / 3) {
        CHECK_STATUS(pc_linear(rt, PC_F32, rows, n, k, x, PC_F32, w, NULL, PC_ACT_GELU, y, &err), PC_OK);
        CHECK_STATUS(pc_linear(NULL, PC_F32, rows, n, k, x, PC_F32, w, NULL, PC_ACT_GELU, z, &err), PC_OK);
        CHECK(memcmp(y, z, (size_t)(rows * n) * sizeof *y) == 0);
        CHECK_STATUS(pc_linear_t(rt, PC_F32, rows, n, k, x, PC_F32, w, NULL, PC_ACT_GELU, y, &err), PC_OK);
        CHECK_STATUS(pc_linear_t(NULL, PC_F32, rows, n, k, x, PC_F32, w, NULL, PC_ACT_GELU, z, &err), PC_OK);
        CHECK(memcmp(y, z, (size_t)(rows * n) * sizeof *y) == 0);
    }
    free(x), free(w), free(y), free(z);
}

TEST(gemm)
{
    pc_error err;
    for (int round = 0; round < 300; round++) {
        pc_dtype dt = all_dtypes[below(2)];
        int64_t m = extent(), n = extent(), k = extent();
        bool ta = below(2), tb = below(2);
        int64_t lda = (ta ? m : k) + below(3), ldb = (tb ? k : n) + below(3), ldc = n + below(3);
        double alpha = below(3) ? uniform() : (double)below(2), beta = below(2) ? uniform() : 0.0;
        void *a = buffer(dt, (ta ? k : m) * lda), *b = buffer(dt, (tb ? n : k) * ldb), *c = buffer(dt, m * ldc);
        if (beta == 0.0)
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++)
                    pc_put_double(dt, c, i * ldc + j, (double)NAN);
        void *want = copy_of(dt, c, m * ldc);
        ref_product(dt, ta, tb, m, n, k, alpha, dt, a, lda, dt, b, ldb, beta, dt, NULL, PC_ACT_NONE, want, ldc);
        CHECK_STATUS(pc_gemm(below(2) ? rt : NULL, dt, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, &err),
                     PC_OK);
        CHECK(distance(dt, c, want, m * ldc) <= tolerance(dt, k));
        free(a), free(b), free(c), free(want);
    }
    float one = 1.0f;
    CHECK_STATUS(pc_gemm(rt, PC_F32, false, false, 1, 1, 1, 1.0, &one, (int64_t)1 << 40, &one, 1, 0.0, &one, 1, &err),
                 PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "2147483647");
}

TEST(lowrank)
{
    pc_error err;
    for (int round = 0; round < 200; round++) {
        pc_dtype dt = all_dtypes[below(2)], adt = all_dtypes[below(4)], bdt = all_dtypes[below(4)];
        int64_t m = extent(), n = extent(), k = extent(), r = below(5) == 0 ? 200 + below(100) : extent();
        void *x = buffer(dt, m * k), *a = buffer(adt, r * k), *b = buffer(bdt, n * r);
        void *e = below(2) ? buffer(adt, r) : NULL, *y = buffer(dt, m * n);
        void *want = copy_of(dt, y, m * n), *t = buffer(PC_F64, m * r);
        double scale = uniform();
        ref_product(PC_F64, false, true, m, r, k, scale, dt, x, k, adt, a, k, 0.0, adt, NULL, PC_ACT_NONE, t, r);
        if (e != NULL)
            ref_scale_columns(PC_F64, m, r, t, adt, e, t);
        ref_product(dt, false, true, m, n, r, 1.0, PC_F64, t, r, bdt, b, r, 1.0, dt, NULL, PC_ACT_NONE, want, n);
        CHECK_STATUS(pc_lowrank_add(below(2) ? rt : NULL, dt, m, n, k, r, x, adt, a, e, bdt, b, scale, y, &err), PC_OK);
        CHECK(distance(dt, y, want, m * n) <= 20.0 * tolerance(dt, k + r));
        free(x), free(a), free(b), free(e), free(y), free(want), free(t);
    }
}

TEST(conversions)
{
    for (int round = 0; round < 200; round++) {
        pc_dtype from = all_dtypes[below(4)], to = all_dtypes[below(4)];
        int64_t n = round < 20 ? 65536 + below(70) : extent();
        void *x = buffer(from, n), *y = buffer(to, n), *want = buffer(to, n);
        for (int64_t i = 0; i < n && pc_dtype_size(from) == 2; i++)
            ((uint16_t *)x)[i] = (uint16_t)(round < 20 ? i : below(65536)); /* every pattern */
        for (int64_t i = 0; i < n && from == PC_F32; i++)
            ((uint32_t *)x)[i] = (uint32_t)next_random();
        ref_convert(to, want, from, x, n);
        pc_convert(rt, to, y, from, x, n);
        CHECK(distance(to, y, want, n) == 0.0);
        free(x), free(y), free(want);
    }
}

TEST(rows)
{
    for (int round = 0; round < 300; round++) {
        pc_dtype dt = all_dtypes[below(2)], vdt = all_dtypes[below(4)];
        int64_t m = extent(), n = round % 30 == 0 ? 1000 + below(2000) : extent();
        void *x = buffer(dt, m * n), *res = buffer(dt, m * n), *s = buffer(vdt, n), *b = buffer(vdt, n);
        void *rows = buffer(vdt, m), *y = buffer(dt, m * n), *want = copy_of(dt, y, m * n);
        double c = uniform();
        pc_runtime *r = below(2) ? rt : NULL;
        bool plain = below(3) == 0;
        pc_scale_columns(r, dt, m, n, x, vdt, s, y);
        ref_scale_columns(dt, m, n, x, vdt, s, want);
        CHECK(distance(dt, y, want, m * n) <= tolerance(dt, 0));
        pc_scale_rows(r, dt, m, n, x, vdt, rows, y);
        ref_scale_rows(dt, m, n, x, vdt, rows, want);
        CHECK(distance(dt, y, want, m * n) <= tolerance(dt, 0));
        pc_add_row(r, dt, m, n, vdt, s, c, y);
        ref_add_row(dt, m, n, vdt, s, c, want);
        CHECK(distance(dt, y, want, m * n) <= tolerance(dt, 0));
        pc_add(r, dt, m * n, x, c, y);
        ref_add(dt, m * n, x, c, want);
        CHECK(distance(dt, y, want, m * n) <= tolerance(dt, 0));
        pc_layer_norm(r, dt, m, n, x, below(2) ? res : NULL, vdt, plain ? NULL : s, plain ? NULL : b, 1e-5, y);
        free(y);
        y = copy_of(dt, x, m * n); /* in place */
        ref_layer_norm(dt, m, n, x, plain ? NULL : res, vdt, plain ? NULL : s, b, 1e-5, want);
        pc_layer_norm(r, dt, m, n, y, plain ? NULL : res, vdt, plain ? NULL : s, b, 1e-5, y);
        CHECK(distance(dt, y, want, m * n) <= 1000.0 * tolerance(dt, 0)); /* two nearly equal values: ill-conditioned */
        ref_rms_norm(dt, m, n, x, vdt, plain ? NULL : s, 1e-6, want);
        pc_rms_norm(r, dt, m, n, x, vdt, plain ? NULL : s, 1e-6, y);
        CHECK(distance(dt, y, want, m * n) <= 10.0 * tolerance(dt, 0));
        ref_softmax(dt, m, n, x, want);
        pc_softmax(r, dt, m, n, x, y);
        CHECK(distance(dt, y, want, m * n) <= tolerance(dt, 0));
        if (m > 0 && n > 0) {
            int64_t ids[5] = {below(m), below(m), below(m), 0, m - 1};
            void *got = buffer(dt, 5 * n), *exact = buffer(dt, 5 * n);
            void *table = buffer(vdt, m * n);
            pc_gather_rows(r, dt, 5, n, ids, vdt, table, got);
            ref_gather_rows(dt, 5, n, ids, vdt, table, exact);
            CHECK(distance(dt, got, exact, 5 * n) == 0.0);
            free(got), free(exact), free(table);
        }
        free(x), free(res), free(s), free(b), free(rows), free(y), free(want);
    }
}

TEST(activations)
{ /* absolute error against f64 over the range where they are curved, and the far ends */
    int64_t n = 200001;
    float *x = malloc((size_t)n * sizeof *x), *y = malloc((size_t)n * sizeof *y);
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(-20.0 + 40.0 * (double)i / (double)(n - 1));
    for (int act = PC_ACT_NONE; act <= PC_ACT_TANH; act++) {
        pc_activate(rt, PC_F32, (pc_activation_fn)act, n, x, y);
        double worst = 0.0;
        for (int64_t i = 0; i < n; i++) {
            double want = apply((pc_activation_fn)act, (double)x[i]);
            worst = fmax(worst, fabs((double)y[i] - want) / fmax(1.0, fabs(want)));
        }
        CHECK(worst <= 1e-6);
        float ends[6] = {NAN, INFINITY, 3e38f, -3e38f, 0.0f, -1e5f}, got[6];
        pc_activate(NULL, PC_F32, (pc_activation_fn)act, 6, ends, got);
        CHECK(isnan(got[0]));
        for (int i = 1; i < 6; i++) {
            double want = apply((pc_activation_fn)act, (double)ends[i]);
            CHECK(want > 1e37 ? (double)got[i] >= 1e37 : fabs((double)got[i] - want) <= 1e-6 * fmax(1.0, fabs(want)));
        }
    }
    /* tanh and exp (through softmax of pairs) to relative accuracy */
    double worst = 0.0;
    for (int64_t i = 0; i < n; i++)
        x[i] *= 0.05f;
    pc_activate(rt, PC_F32, PC_ACT_TANH, n, x, y);
    for (int64_t i = 0; i < n; i++)
        if (x[i] != 0.0f)
            worst = fmax(worst, fabs((double)y[i] / tanh((double)x[i]) - 1.0));
    CHECK(worst <= 1e-6);
    worst = 0.0;
    for (int64_t i = 0; i < 80000; i++) {
        float pair[17] = {0}, out[17];
        for (int j = 1; j < 17; j++)
            pair[j] = -(float)(i * 17 + j) * (86.0f / (80000.0f * 17.0f));
        pc_softmax(NULL, PC_F32, 1, 17, pair, out);
        for (int j = 1; j < 17; j++)
            worst = fmax(worst, fabs((double)out[j] / (double)out[0] / exp((double)pair[j]) - 1.0));
    }
    CHECK(worst <= 1e-6);
    free(x), free(y);
}

TEST(attention)
{
    pc_error err;
    for (int round = 0; round < 150; round++) {
        pc_dtype dt = all_dtypes[below(2)];
        int64_t batch = 1 + below(3), heads = 1 + below(4), tq = extent(), tk = extent(), dim = 1 + below(80);
        if (round % 3 == 0)
            dim = 16 * (1 + below(4));
        int64_t width = heads * dim;
        void *q = buffer(dt, batch * tq * width), *k = buffer(dt, batch * tk * width), *v = buffer(dt, batch * tk * width);
        void *out = buffer(dt, batch * tq * width), *want = copy_of(dt, out, batch * tq * width);
        uint8_t *mask = malloc((size_t)(batch * tk) + 1);
        for (int64_t i = 0; i < batch * tk; i++)
            mask[i] = i < tk && round % 5 == 0 ? 0 : (uint8_t)below(3);
        const uint8_t *used = below(3) ? mask : NULL;
        ref_attention(dt, batch, heads, tq, tk, dim, q, k, v, used, 0.3, want);
        CHECK_STATUS(pc_attention(below(2) ? rt : NULL, dt, batch, heads, tq, tk, dim, q, k, v, used, 0.3, out, &err),
                     PC_OK);
        double d = distance(dt, out, want, batch * tq * width);
        CHECK(d <= tolerance(dt, tk));
        free(q), free(k), free(v), free(out), free(want), free(mask);
    }
}

TEST(convolution)
{
    pc_error err;
    for (int round = 0; round < 120; round++) {
        pc_dtype dt = all_dtypes[below(2)], wdt = all_dtypes[below(4)];
        pc_conv_shape s = {.batch = below(3), .groups = 1 + below(3), .height = 1 + below(12), .width = 1 + below(12)};
        s.in_channels = s.groups * (1 + below(4));
        s.out_channels = s.groups * (1 + below(4));
        for (int i = 0; i < 2; i++) {
            s.kernel[i] = 1 + below(4);
            s.stride[i] = 1 + below(3);
            s.padding[i] = below(3);
            s.dilation[i] = 1 + below(2);
        }
        pc_status status = pc_conv_output(&s, &err);
        if (status != PC_OK) {
            CHECK_STATUS(status, PC_ERR_VALUE);
            CHECK_CONTAINS(err.text, "does not fit");
            continue;
        }
        int64_t out = s.batch * s.out_channels * s.out_height * s.out_width;
        void *x = buffer(dt, s.batch * s.in_channels * s.height * s.width);
        void *w = buffer(wdt, s.out_channels * (s.in_channels / s.groups) * s.kernel[0] * s.kernel[1]);
        void *bias = below(2) ? buffer(wdt, s.out_channels) : NULL, *y = buffer(dt, out), *want = buffer(dt, out);
        ref_conv2d(dt, &s, x, wdt, w, bias, want);
        CHECK_STATUS(pc_conv2d(below(2) ? rt : NULL, dt, &s, x, wdt, w, bias, y, &err), PC_OK);
        CHECK(distance(dt, y, want, out) <= tolerance(dt, 64));
        free(x), free(w), free(bias), free(y), free(want);
    }
}

TEST(dropout)
{
    int64_t n = 10007;
    float *x = buffer(PC_F32, n), *y = buffer(PC_F32, n), *want = buffer(PC_F32, n);
    for (double p = 0.0; p <= 1.0; p += 0.25) {
        ref_dropout(PC_F32, n, x, p, 7, 9, want);
        pc_dropout(rt, PC_F32, n, x, p, 7, 9, y);
        if (p < 1.0)
            CHECK(distance(PC_F32, y, want, n) <= 1e-6);
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++)
            kept += y[i] != 0.0f;
        CHECK(fabs((double)kept / (double)n - (1.0 - p)) < 0.03);
    }
    free(x), free(y), free(want);
}

TEST(factorisations)
{
    pc_error err;
    for (int round = 0; round < 60; round++) {
        pc_dtype dt = all_dtypes[below(2)];
        int64_t m = extent(), n = extent(), q = m < n ? m : n;
        void *a = buffer(dt, m * n), *kept = copy_of(dt, a, m * n), *back = buffer(dt, m * n), *eye = buffer(dt, q * q);
        void *u = buffer(dt, m * q), *s = buffer(dt, q), *vt = buffer(dt, q * n);
        CHECK_STATUS(pc_svd(dt, m, n, a, u, s, vt, &err), PC_OK);
        for (int64_t i = 1; i < q; i++)
            CHECK(pc_get_double(dt, s, i) <= pc_get_double(dt, s, i - 1) && pc_get_double(dt, s, i) >= 0.0);
        ref_scale_columns(dt, m, q, u, dt, s, u);
        ref_product(dt, false, false, m, n, q, 1.0, dt, u, q, dt, vt, n, 0.0, dt, NULL, PC_ACT_NONE, back, n);
        CHECK(distance(dt, back, kept, m * n) <= 40.0 * tolerance(dt, q));
        memcpy(a, kept, (size_t)(m * n) * pc_dtype_size(dt));
        CHECK_STATUS(pc_qr(dt, m, n, a, u, vt, &err), PC_OK);
        ref_product(dt, false, false, m, n, q, 1.0, dt, u, q, dt, vt, n, 0.0, dt, NULL, PC_ACT_NONE, back, n);
        CHECK(distance(dt, back, kept, m * n) <= 40.0 * tolerance(dt, q));
        ref_product(dt, true, false, q, q, m, 1.0, dt, u, q, dt, u, q, 0.0, dt, NULL, PC_ACT_NONE, eye, q);
        for (int64_t i = 0; i < q * q; i++)
            CHECK(fabs(pc_get_double(dt, eye, i) - (i / q == i % q)) <= 40.0 * tolerance(dt, m));
        for (int64_t i = 0; i < q; i++)
            for (int64_t j = 0; j < i; j++)
                CHECK(pc_get_double(dt, vt, i * n + j) == 0.0);
        free(a), free(kept), free(back), free(eye), free(u), free(s), free(vt);
    }
    float bad[4] = {1.0f, NAN, 2.0f, 3.0f}, u[4], s[2], vt[4];
    CHECK_STATUS(pc_svd(PC_F32, 2, 2, bad, u, s, vt, &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "NaN");
}

TEST(no_memory)
{
    pc_error err;
    long live = pc_test_live_allocations();
    int64_t m = 40, n = 33, k = 70;
    float *x = buffer(PC_F32, m * k), *b = buffer(PC_F32, n * 8), *a = buffer(PC_F32, 8 * k), *y = buffer(PC_F32, m * n);
    double *xd = buffer(PC_F64, m * k), *yd = buffer(PC_F64, m * n), *ud = buffer(PC_F64, m * m), *vd = buffer(PC_F64, k * k);
    void *w = buffer(PC_F16, n * k), *bias = buffer(PC_F16, n);
    pc_conv_shape s = {.batch = 2, .in_channels = 2, .height = 5, .width = 5, .out_channels = 3, .kernel = {3, 3},
                       .stride = {1, 1}, .padding = {1, 1}, .dilation = {1, 1}, .groups = 1};
    CHECK_STATUS(pc_conv_output(&s, &err), PC_OK);
    FOR_EACH_ALLOCATION (i) {
        pc_status status = pc_linear(NULL, PC_F32, m, n, k, x, PC_F16, w, bias, PC_ACT_NONE, y, &err);
        if (status == PC_OK)
            status = pc_linear(NULL, PC_F64, m, n, k, xd, PC_F16, w, bias, PC_ACT_NONE, yd, &err);
        if (status == PC_OK)
            status = pc_lowrank_add(NULL, PC_F32, m, n, k, 8, x, PC_F32, a, NULL, PC_F32, b, 1.0, y, &err);
        if (status == PC_OK)
            status = pc_lowrank_add(NULL, PC_F64, m, n, k, 8, xd, PC_F32, a, NULL, PC_F32, b, 1.0, yd, &err);
        if (status == PC_OK)
            status = pc_attention(NULL, PC_F32, 1, 2, 18, 20, 35, x, x, x, NULL, 1.0, y, &err);
        if (status == PC_OK)
            status = pc_conv2d(NULL, PC_F32, &s, x, PC_F16, w, bias, y, &err);
        if (status == PC_OK)
            status = pc_svd(PC_F64, m, k, xd, ud, yd, vd, &err);
        if (status == PC_OK)
            status = pc_qr(PC_F64, m, k, xd, ud, vd, &err);
        CHECK(status == (pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK));
        CHECK_INT(pc_test_live_allocations(), live);
    }
    free(x), free(b), free(a), free(y), free(xd), free(yd), free(ud), free(vd), free(w), free(bias);
}

/* OpenBLAS on one thread, called from several at once and in a child. */
static void *gemm_thread(void *arg)
{
    pc_error err;
    enum { N = 96 };
    double *a = malloc(N * N * sizeof *a), *c = malloc(N * N * sizeof *c);
    for (int i = 0; i < N * N; i++)
        a[i] = (double)(i % 7) - 3.0;
    bool good = true;
    for (int round = 0; round < 50; round++) {
        good &= pc_gemm(round % 2 ? rt : NULL, PC_F64, false, true, N, N, N, 1.0, a, N, a, N, 0.0, c, N, &err) == PC_OK;
        double sum = 0.0;
        for (int p = 0; p < N; p++)
            sum += a[5 * N + p] * a[9 * N + p];
        good &= c[5 * N + 9] == sum && c[9 * N + 5] == sum;
    }
    free(a), free(c);
    *(bool *)arg = good;
    return NULL;
}

/* Rows of exactly `cols` elements, `gap` apart, with nothing behind the last one. */
static void *spread(pc_dtype dt, int64_t rows, int64_t cols, int64_t gap, int64_t *stride)
{
    *stride = cols + gap;
    return buffer(dt, rows > 0 ? (rows - 1) * *stride + cols : 0);
}

static double stored_tolerance(pc_dtype dt, int64_t k)
{
    return dt == PC_F16 ? 2e-3 : dt == PC_BF16 ? 1.6e-2 : tolerance(dt, k);
}

/* |got - want| ≤ bound · (1 + |want| / largest): rows of got lie ldg apart, want is packed, f64. */
static bool agrees(pc_dtype dt, const void *got, int64_t ldg, const double *want, int64_t m, int64_t n, double bound)
{
    double largest = 1.0;
    for (int64_t i = 0; i < m * n; i++)
        largest = fmax(largest, fabs(want[i]));
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            if (!(fabs(pc_get_double(dt, got, i * ldg + j) - want[i * n + j]) <= bound * largest))
                return false;
    return true;
}

static double *doubles(int64_t n) { return calloc((size_t)n + (n == 0), sizeof(double)); }

/* h (m,r) = x · aᵀ, in f64 */
static double *hidden_of(pc_dtype dt, const void *x, int64_t ldx, const void *a, int64_t m, int64_t r, int64_t k,
                         bool turned)
{
    double *h = doubles(m * r);
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < r; p++)
            for (int64_t j = 0; j < k; j++)
                h[i * r + p] += pc_get_double(dt, x, i * ldx + j) * pc_get_double(dt, a, turned ? j * r + p : p * k + j);
    return h;
}

TEST(lowrank_in_place)
{
    static const int64_t ranks[] = {0, 1, 3, 4, 8, 16, 17, 33, 50};
    pc_error err;
    for (int round = 0; round < 160; round++) {
        pc_dtype dt = all_dtypes[round % 4];
        int64_t m = extent(), n = extent(), k = extent(), ldx, ldy, ldo = 0;
        if (round % 20 == 0)
            k = 1000 + below(600);
        void *x = spread(dt, m, k, below(3), &ldx), *y = spread(dt, m, n, below(3), &ldy);
        bool in_place = below(2) != 0;
        void *out = in_place ? y : spread(dt, m, n, below(3), &ldo);
        ldo = in_place ? ldy : ldo;
        pc_lowrank_term terms[3];
        int count = 1 + (int)below(3);
        double *want = doubles(m * n), reach = 0.0;
        for (int64_t i = 0; i < m * n; i++)
            want[i] = pc_get_double(dt, y, i / n * ldy + i % n);
        for (int t = 0; t < count; t++) {
            int64_t r = ranks[below(9)];
            void *a = buffer(dt, r * k), *b = buffer(dt, n * r), *e = below(2) ? buffer(dt, r) : NULL;
            void *bias = below(3) ? NULL : buffer(dt, n);
            terms[t] = (pc_lowrank_term){.r = r, .scale = uniform(), .a = a, .b = b, .e = e, .bias = bias};
            double *h = hidden_of(dt, x, ldx, a, m, r, k, false);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++) {
                    double sum = bias != NULL ? pc_get_double(dt, bias, j) : 0.0;
                    for (int64_t p = 0; p < r; p++)
                        sum += h[i * r + p] * (e != NULL ? pc_get_double(dt, e, p) : 1.0) * pc_get_double(dt, b, j * r + p);
                    want[i * n + j] += terms[t].scale * sum;
                }
            reach += (double)(r * k);
            free(h);
        }
        pc_runtime *r = below(2) ? rt : NULL;
        int64_t ranks_together = 0;
        for (int t = 0; t < count; t++)
            ranks_together += terms[t].r;
        float *hidden = dt != PC_F64 && below(2) ? buffer(PC_F32, ranks_together * m) : NULL;
        CHECK_STATUS(pc_lowrank_forward(r, dt, m, n, k, x, ldx, y, ldy, out, ldo, terms, count, hidden, &err), PC_OK);
        float *part = hidden;
        for (int t = 0; t < count && hidden != NULL; part += terms[t++].r * m) {
            double *h = hidden_of(dt, x, ldx, terms[t].a, m, terms[t].r, k, false);
            for (int64_t i = 0; i < m * terms[t].r; i++)
                CHECK(fabs((double)part[i % terms[t].r * m + i / terms[t].r] - h[i]) <= 1e-6 * (double)(k + 10));
            free(h);
        }
        free(hidden);
        CHECK(agrees(dt, out, ldo, want, m, n, stored_tolerance(dt, (int64_t)reach + 1)));
        for (int t = 0; t < count; t++)
            free((void *)(uintptr_t)terms[t].a), free((void *)(uintptr_t)terms[t].b),
                free((void *)(uintptr_t)terms[t].e), free((void *)(uintptr_t)terms[t].bias);
        if (!in_place)
            free(out);
        free(x), free(y), free(want);
    }
    pc_lowrank_term wide = {.r = PC_LOWRANK_MOST, .scale = 1.0}, both[2] = {wide, wide};
    float one = 1.0f;
    CHECK_STATUS(pc_lowrank_forward(rt, PC_F32, 1, 1, 1, &one, 1, &one, 1, &one, 1, both, 2, NULL, &err), PC_ERR_UNSUPPORTED);
    CHECK(one == 1.0f);
}

TEST(lowrank_gradients)
{
    static const int64_t ranks[] = {1, 3, 4, 8, 16, 17, 33, 70};
    pc_error err;
    for (int round = 0; round < 120; round++) {
        pc_dtype dt = all_dtypes[round % 4];
        int64_t m = extent(), n = extent(), k = extent(), r = ranks[below(8)], ldx, ldg, lddx;
        void *x = spread(dt, m, k, below(3), &ldx), *g = spread(dt, m, n, below(3), &ldg);
        lddx = k;
        void *dx = below(4) ? spread(dt, m, k, below(3), &lddx) : NULL;
        void *da = below(4) ? buffer(dt, r * k) : NULL, *db = below(4) ? buffer(dt, n * r) : NULL;
        void *de = below(4) ? buffer(dt, r) : NULL;
        void *a = buffer(dt, r * k), *b = buffer(dt, n * r), *e = below(2) ? buffer(dt, r) : NULL;
        pc_lowrank_term term = {.r = r, .scale = uniform(), .a = a, .b = b, .e = e};
        double *h = hidden_of(dt, x, ldx, a, m, r, k, false), *u = hidden_of(dt, g, ldg, b, m, r, n, true);
        double *wx = doubles(m * k), *wa = doubles(r * k), *wb = doubles(n * r), *we = doubles(r);
        for (int64_t i = 0; i < m; i++)
            for (int64_t p = 0; p < r; p++) {
                double s = term.scale * (e != NULL ? pc_get_double(dt, e, p) : 1.0);
                for (int64_t j = 0; j < k; j++) {
                    wx[i * k + j] += s * u[i * r + p] * pc_get_double(dt, a, p * k + j);
                    wa[p * k + j] += s * u[i * r + p] * pc_get_double(dt, x, i * ldx + j);
                }
                for (int64_t j = 0; j < n; j++)
                    wb[j * r + p] += s * h[i * r + p] * pc_get_double(dt, g, i * ldg + j);
                we[p] += term.scale * u[i * r + p] * h[i * r + p];
            }
        pc_runtime *threads = below(2) ? rt : NULL;
        float *hidden = NULL; /* as the forward pass leaves it */
        if (dt != PC_F64 && below(2)) {
            hidden = buffer(PC_F32, r * m);
            for (int64_t i = 0; i < m * r; i++)
                hidden[i % r * m + i / r] = (float)h[i];
        }
        int64_t ldbase = k;
        void *base = dx == NULL || below(2) ? NULL : below(2) ? dx : spread(dt, m, k, below(3), &ldbase);
        if (base != NULL && base == dx)
            ldbase = lddx;
        for (int64_t i = 0; i < m * k && base != NULL; i++)
            wx[i] += pc_get_double(dt, base, i / k * ldbase + i % k);
        CHECK_STATUS(pc_lowrank_backward(threads, dt, m, n, k, g, ldg, x, ldx, &term, hidden, base, ldbase, dx, lddx, da,
                                         db, de, &err),
                     PC_OK);
        if (base != dx)
            free(base);
        free(hidden);
        double bound = stored_tolerance(dt, m + n + k + r);
        CHECK(dx == NULL || agrees(dt, dx, lddx, wx, m, k, bound));
        CHECK(da == NULL || agrees(dt, da, k, wa, r, k, bound));
        CHECK(db == NULL || agrees(dt, db, r, wb, n, r, bound));
        CHECK(de == NULL || agrees(dt, de, r, we, 1, r, bound));
        free(x), free(g), free(dx), free(da), free(db), free(de), free(a), free(b), free(e), free(h), free(u);
        free(wx), free(wa), free(wb), free(we);
    }
}

TEST(lowrank_to_weight)
{
    static const int64_t ranks[] = {0, 1, 3, 8, 16, 17, 50};
    pc_error err;
    for (int round = 0; round < 120; round++) {
        pc_dtype dt = all_dtypes[round % 4];
        bool turned = below(2) != 0, in_place = below(2) != 0;
        int64_t n = extent(), k = extent(), r = ranks[below(7)], rows = turned ? k : n, cols = turned ? n : k, ldw, ldo;
        void *a = buffer(dt, r * k), *b = buffer(dt, n * r), *e = below(2) ? buffer(dt, r) : NULL;
        void *w = spread(dt, rows, cols, below(3), &ldw), *out = w;
        ldo = ldw;
        if (!in_place)
            out = spread(dt, rows, cols, below(3), &ldo);
        pc_lowrank_term term = {.r = r, .scale = uniform(), .a = a, .b = b, .e = e};
        double *want = doubles(rows * cols);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) {
                int64_t o = turned ? j : i, c = turned ? i : j;
                double sum = 0.0;
                for (int64_t p = 0; p < r; p++)
                    sum += pc_get_double(dt, b, o * r + p) * (e != NULL ? pc_get_double(dt, e, p) : 1.0) *
                           pc_get_double(dt, a, p * k + c);
                want[i * cols + j] = pc_get_double(dt, w, i * ldw + j) + term.scale * sum;
            }
        pc_runtime *threads = below(2) ? rt : NULL;
        CHECK_STATUS(pc_lowrank_to_weight(threads, dt, n, k, w, ldw, out, ldo, &term, turned, &err), PC_OK);
        CHECK(agrees(dt, out, ldo, want, rows, cols, stored_tolerance(dt, r)));
        if (!in_place)
            free(out);
        free(a), free(b), free(e), free(w), free(want);
    }
}

/* The authors' generator, seeded as they do: its first, 624th, 625th and 10,000th numbers (the last one is the C++
 * standard's check of mt19937). */
TEST(mersenne_twister_gives_its_known_answers)
{
    pc_mersenne m = {.used = PC_MERSENNE_WORDS};
    m.words[0] = 5489;
    for (uint32_t i = 1; i < PC_MERSENNE_WORDS; i++)
        m.words[i] = 1812433253u * (m.words[i - 1] ^ (m.words[i - 1] >> 30)) + i;
    uint32_t last = 0, first = 0, number;
    for (int i = 0; i < 10000; i++) {
        if (m.used == PC_MERSENNE_WORDS) {
            pc_kernels()->twist(m.words);
            m.used = 0;
        }
        pc_kernels()->temper(m.words + m.used++, 1, &number);
        first = i == 0 ? number : first;
        last = number;
    }
    CHECK(first == 3499211612u);
    CHECK(last == 4123659995u);
    double out[3001];
    pc_mersenne_keep(&m, PC_F64, 3001, 0.25, 2.0, out); /* an odd number of numbers, some of them across a twist */
    double sum = 0.0;
    for (int i = 0; i < 3001; i++) {
        CHECK(out[i] == 0.0 || out[i] == 2.0);
        sum += out[i];
    }
    CHECK(fabs(sum / 3001.0 - 0.5) < 0.05);
    for (int i = 0; i < 4; i++) {
        pc_mersenne_keep(&m, all_dtypes[i], 700, 1.0, 0.5, out);
        CHECK(pc_get_double(all_dtypes[i], out, 0) == 0.5 && pc_get_double(all_dtypes[i], out, 699) == 0.5);
        pc_mersenne_keep(&m, all_dtypes[i], 700, 0.0, 0.5, out);
        CHECK(pc_get_double(all_dtypes[i], out, 0) == 0.0 && pc_get_double(all_dtypes[i], out, 699) == 0.0);
    }
}

TEST(rows_times_a_vector)
{
    pc_error err;
    for (int trial = 0; trial < 200; trial++) {
        pc_dtype dt = all_dtypes[below(4)], vdt = pc_dtype_size(dt) == 2 && below(2) ? PC_F32 : dt;
        int64_t m = below(4) == 0 ? 300 + below(200) : extent(), n = below(8) == 0 ? 600 : extent(), ld = n + below(3);
        int64_t last = m > 0 ? (m - 1) * ld + n : 0;
        pc_runtime *r = below(2) ? rt : NULL;
        double bound = dt == PC_F64 ? 1e-13 : dt == PC_F32 ? 1e-5 : 1e-2;
        void *x = buffer(dt, last), *grad = buffer(dt, last), *v = buffer(vdt, n), *y = buffer(dt, last), *dv = buffer(vdt, n);
        pc_rows_scale(r, dt, m, n, x, ld, vdt, v, y, ld);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++)
                CHECK(fabs(pc_get_double(dt, y, i * ld + j) - pc_get_double(dt, x, i * ld + j) * pc_get_double(vdt, v, j)) <=
                      bound);
        void *dx = below(2) ? grad : y, *before = copy_of(dt, grad, last);
        CHECK_STATUS(pc_rows_scale_back(r, dt, m, n, grad, ld, x, ld, vdt, v, dx, ld, dv, &err), PC_OK);
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0;
            for (int64_t i = 0; i < m; i++) {
                double g = pc_get_double(dt, before, i * ld + j);
                sum += g * pc_get_double(dt, x, i * ld + j);
                CHECK(fabs(pc_get_double(dt, dx, i * ld + j) - g * pc_get_double(vdt, v, j)) <= bound);
            }
            CHECK(fabs(pc_get_double(vdt, dv, j) - sum) <= bound * (1.0 + fabs(sum)));
        }
        memcpy(grad, before, (size_t)last * pc_dtype_size(dt));
        long live = pc_test_live_allocations();
        pc_test_fail_allocation(1); /* nothing is written then */
        CHECK_STATUS(pc_rows_scale_back(r, dt, m, n, grad, ld, x, ld, vdt, v, grad, ld, dv, &err), PC_ERR_NOMEM);
        pc_test_fail_allocation(0);
        CHECK(memcmp(grad, before, (size_t)last * pc_dtype_size(dt)) == 0);
        CHECK_INT(pc_test_live_allocations(), live);
        free(x), free(grad), free(v), free(y), free(dv), free(before);
    }
}

TEST(concurrent_calls)
{
    pthread_t threads[4];
    bool good[4] = {false};
    for (int i = 0; i < 4; i++)
        REQUIRE(pthread_create(&threads[i], NULL, gemm_thread, &good[i]) == 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        CHECK(good[i]);
    }
    pid_t child = fork();
    if (child == 0) {
        bool fine = false;
        gemm_thread(&fine);
        _exit(fine ? 0 : 1);
    }
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void)
{
    pc_error err;
    pc_kernels_init();
    pc_kernels_init();
    if (pc_runtime_new(&rt, &err) != PC_OK || pc_runtime_set_threads(rt, 3, &err) != PC_OK)
        return 1;
    CHECK(strstr(pc_kernels_blas(), "OpenBLAS") != NULL);
    RUN(gemm);
    RUN(factorisations);
    RUN(mersenne_twister_gives_its_known_answers);
    RUN(concurrent_calls);
    RUN(dropout);
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (!pc_kernels_force_isa(isas[i]))
            continue;
        CHECK(strcmp(pc_kernels_isa(), isas[i]) == 0);
        RUN(linear);
        RUN(many_rows);
        RUN(infinite_weights);
        RUN(threads_agree);
        RUN(lowrank);
        RUN(lowrank_in_place);
        RUN(lowrank_gradients);
        RUN(lowrank_to_weight);
        RUN(rows_times_a_vector);
        RUN(conversions);
        RUN(rows);
        RUN(activations);
        RUN(attention);
        RUN(convolution);
        RUN(no_memory);
    }
    pc_runtime_free(rt);
    return check_done();
}
