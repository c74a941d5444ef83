/* Gradients: kernels on every instruction set against f64 and plain loops, methods against finite differences, and every
 * allocation on the way made to fail. */
#include "model.h"

#include "../../src/core/gradients.h"
#include "../../src/kernels/gradients.h"
#include "../../src/kernels/table.h"

static pc_runtime *rt;
static const char *isas[] = {"generic", "avx2", "avx512"};

static void *numbers(pc_dtype dtype, int64_t n, uint64_t seed)
{
    void *values = malloc((size_t)n * pc_dtype_size(dtype) + 1);
    fill_noise(dtype, values, n, seed);
    return values;
}

/* The largest difference, relative to the largest of `want` (at least 1). */
static double off_by(pc_dtype dtype, const void *got, const double *want, int64_t n)
{
    double worst = 0.0, largest = 1.0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs(pc_get_double(dtype, got, i) - want[i]);
        worst = d > worst || d != d ? d : worst;
        largest = fabs(want[i]) > largest ? fabs(want[i]) : largest;
    }
    return worst / largest;
}

/* --------------------------------------------------------------------- kernels */

TEST(linear_dx)
{
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {31, 17, 40}, {255, 33, 50}, {256, 50, 33}, {300, 130, 97}, {0, 4, 4}, {4, 0, 4}};
    static const pc_dtype dtypes[] = {PC_F32, PC_F16, PC_BF16, PC_F64};
    pc_error err;
    for (size_t c = 0; c < sizeof shapes / sizeof *shapes; c++)
        for (int d = 0; d < 4; d++)
            for (int variant = 0; variant < 4; variant++) {
                const int64_t m = shapes[c][0], n = shapes[c][1], k = shapes[c][2];
                const bool turned = variant & 1, add = variant & 2;
                const pc_dtype wdt = dtypes[d], dt = pc_compute_dtype(wdt);
                void *dy = numbers(dt, m * n, 1), *w = numbers(wdt, n * k, 2), *dx = numbers(dt, m * k, 3);
                double *want = malloc((size_t)(m * k) * sizeof *want + 1);
                for (int64_t i = 0; i < m; i++)
                    for (int64_t j = 0; j < k; j++) {
                        double sum = add ? pc_get_double(dt, dx, i * k + j) : 0.0;
                        for (int64_t p = 0; p < n; p++)
                            sum += pc_get_double(dt, dy, i * n + p) *
                                   pc_get_double(wdt, w, turned ? j * n + p : p * k + j);
                        want[i * k + j] = sum;
                    }
                CHECK_STATUS(pc_linear_dx(rt, dt, turned, add, m, n, k, dy, wdt, w, dx, &err), PC_OK);
                CHECK(off_by(dt, dx, want, m * k) < (dt == PC_F64 ? 1e-13 : 1e-5));
                free(dy), free(w), free(dx), free(want);
            }
}

TEST(slopes_of_activations)
{
    for (int a = PC_ACT_NONE; a <= PC_ACT_TANH; a++) {
        const pc_activation_fn act = (pc_activation_fn)a;
        enum { N = 203 };
        double x[N], y[N], up[N], down[N], want[N], dy[N], got[N];
        float xf[N], yf[N], dyf[N], gotf[N];
        for (int i = 0; i < N; i++) {
            x[i] = 12.0 * noise(4, i) + 1e-3;
            dy[i] = noise(5, i);
            xf[i] = (float)x[i];
            dyf[i] = (float)dy[i];
            up[i] = x[i] + 1e-6;
            down[i] = x[i] - 1e-6;
        }
        pc_activate(rt, PC_F64, act, N, x, y);
        pc_activate(rt, PC_F32, act, N, xf, yf);
        pc_activate(rt, PC_F64, act, N, up, up);
        pc_activate(rt, PC_F64, act, N, down, down);
        for (int i = 0; i < N; i++)
            want[i] = dy[i] * (up[i] - down[i]) / 2e-6;
        const bool output = pc_activation_saves_output(act);
        pc_activate_back(rt, PC_F64, act, N, output ? y : x, dy, got);
        CHECK(off_by(PC_F64, got, want, N) < 1e-8);
        pc_activate_back(rt, PC_F32, act, N, output ? yf : xf, dyf, gotf);
        CHECK(off_by(PC_F32, gotf, want, N) < 3e-6);
    }
}

TEST(norms_in_f32_follow_f64)
{
    static const int64_t widths[] = {1, 2, 15, 16, 33, 384};
    pc_error err;
    for (size_t c = 0; c < sizeof widths / sizeof *widths; c++)
        for (int centred = 0; centred < 2; centred++) {
            const int64_t m = 37, n = widths[c];
            void *x = numbers(PC_F64, m * n, 1), *dy = numbers(PC_F64, m * n, 2), *w = numbers(PC_F64, n, 3);
            void *xf = malloc((size_t)(m * n) * 4), *dyf = malloc((size_t)(m * n) * 4);
            double *dx = calloc((size_t)(m * n), 8), *dw = calloc((size_t)n, 8), *db = calloc((size_t)n, 8);
            float *dxf = calloc((size_t)(m * n), 4), *dwf = calloc((size_t)n, 4), *dbf = calloc((size_t)n, 4);
            pc_convert(rt, PC_F32, xf, PC_F64, x, m * n);
            pc_convert(rt, PC_F32, dyf, PC_F64, dy, m * n);
            CHECK_STATUS(pc_norm_back(rt, PC_F64, centred != 0, m, n, x, PC_F64, w, 0.1, dy, dx, dw, db, &err), PC_OK);
            CHECK_STATUS(pc_norm_back(rt, PC_F32, centred != 0, m, n, xf, PC_F64, w, 0.1, dyf, dxf, dwf, dbf, &err), PC_OK);
            CHECK(off_by(PC_F32, dxf, dx, m * n) < 2e-5);
            CHECK(off_by(PC_F32, dwf, dw, n) < 2e-5);
            CHECK(off_by(PC_F32, dbf, db, n) < 2e-5);
            free(x), free(dy), free(w), free(xf), free(dyf), free(dx), free(dw), free(db), free(dxf), free(dwf), free(dbf);
        }
}

TEST(attention_in_f32_follows_f64)
{ /* which the tests in Python hold against finite differences */
    static const int64_t shapes[][3] = {{1, 1, 1}, {5, 3, 7}, {48, 48, 32}, {65, 130, 16}, {129, 64, 20}, {1, 48, 32}};
    pc_error err;
    for (size_t c = 0; c < sizeof shapes / sizeof *shapes; c++)
        for (int variant = 0; variant < 4; variant++) {
            pc_attention_shape s = {.batch = 2, .heads = 3, .tq = shapes[c][0], .tk = shapes[c][1], .dim = shapes[c][2]};
            s.scale = 0.7;
            s.dropout = variant & 1 ? 0.3 : 0.0;
            s.rng = (pc_rng){3, 8};
            const int64_t width = s.heads * s.dim, nq = s.batch * s.tq * width, nk = s.batch * s.tk * width;
            const int64_t counts[4] = {nq, nk, nk, nq};
            uint8_t *mask = variant & 2 ? malloc((size_t)(s.batch * s.tk)) : NULL;
            for (int64_t i = 0; mask != NULL && i < s.batch * s.tk; i++)
                mask[i] = i % 3 != 1 && i >= s.tk / 2; /* of short sequences all */
            void *in[4], *wide[4];
            for (int i = 0; i < 4; i++) {
                in[i] = numbers(PC_F32, counts[i], 10 + (uint64_t)i);
                wide[i] = malloc((size_t)counts[i] * 8);
                pc_convert(rt, PC_F64, wide[i], PC_F32, in[i], counts[i]);
            }
            float *out = malloc((size_t)nq * 4), *g[3];
            double *wide_out = malloc((size_t)nq * 8), *wide_g[3];
            for (int i = 0; i < 3; i++) {
                g[i] = numbers(PC_F32, counts[i], 30); /* overwritten in full */
                wide_g[i] = numbers(PC_F64, counts[i], 31);
            }
            CHECK_STATUS(pc_attention_train(rt, PC_F32, &s, in[0], in[1], in[2], mask, out, &err), PC_OK);
            CHECK_STATUS(pc_attention_train(NULL, PC_F64, &s, wide[0], wide[1], wide[2], mask, wide_out, &err), PC_OK);
            CHECK(off_by(PC_F32, out, wide_out, nq) < 1e-5);
            CHECK_STATUS(pc_attention_back(rt, PC_F32, &s, in[0], in[1], in[2], mask, in[3], g[0], g[1], g[2], &err), PC_OK);
            CHECK_STATUS(pc_attention_back(NULL, PC_F64, &s, wide[0], wide[1], wide[2], mask, wide[3], wide_g[0],
                                           wide_g[1], wide_g[2], &err),
                         PC_OK);
            for (int i = 0; i < 3; i++)
                CHECK(off_by(PC_F32, g[i], wide_g[i], counts[i]) < 3e-5);
            float *alone = malloc((size_t)nk * 4); /* one of the three, without the others */
            CHECK_STATUS(pc_attention_back(rt, PC_F32, &s, in[0], in[1], in[2], mask, in[3], NULL, alone, NULL, &err), PC_OK);
            CHECK(memcmp(alone, g[1], (size_t)nk * 4) == 0);
            for (int i = 0; i < 4; i++)
                free(in[i]), free(wide[i]);
            for (int i = 0; i < 3; i++)
                free(g[i]), free(wide_g[i]);
            free(out), free(wide_out), free(alone), free(mask);
        }
}

TEST(draws_are_those_of_single_units)
{
    const pc_rng rng = {0x123456789ABCDEFu, 0xFEDCBA9876543210u};
    static const double shares[] = {0.0, 0.1, 0.5, 0.999, 1.0};
    float keep[301];
    for (int n = 0; n <= 300; n += 13)
        for (size_t s = 0; s < sizeof shares / sizeof *shares; s++)
            for (uint64_t first = 0; first < 0x200000000u; first += 0x0FFFFFFFCu) {
                keep[n] = -7.0f;
                pc_kernels()->keep(rng, first, n, shares[s], keep);
                CHECK(keep[n] == -7.0f);
                int wrong = 0;
                for (int i = 0; i < n; i++)
                    wrong += (keep[i] != 0.0f) != ((double)pc_rng_unit(rng, first + (uint64_t)i) >= shares[s]);
                CHECK_INT(wrong, 0);
            }
}

/* --------------------------------------------------------------------- methods */

static const char *const modules[] = {"emb", "model.layers.0.q", "c1d", "conv", "grouped", "head.out"};

static pc_config *plain_lora(void)
{
    pc_config *config = config_new("LORA", "emb,q,c1d,conv,grouped,head.out");
    set_int(config, "r", 2);
    return config;
}
static pc_config *biased_lora(void)
{
    pc_config *config = config_new("LORA", "q,c1d,conv,grouped,head.out");
    set_int(config, "r", 2);
    set_bool(config, "lora_bias", true);
    config->bias = PC_BIAS_ADAPTED;
    return config;
}
static pc_config *dropped_lora(void)
{
    pc_config *config = plain_lora();
    set_double(config, "lora_dropout", 0.4);
    return config;
}
static pc_config *plain_dora(void)
{
    pc_config *config = config_new("LORA", "emb,q,c1d,conv,head.out");
    set_int(config, "r", 3);
    set_bool(config, "use_dora", true);
    config->bias = PC_BIAS_ADAPTED;
    return config;
}
static pc_config *dropped_dora(void)
{
    pc_config *config = plain_dora();
    set_double(config, "lora_dropout", 0.4);
    return config;
}
static pc_config *pissa_with_dora(void)
{
    pc_config *config = config_new("LORA", "q,c1d");
    set_int(config, "r", 2);
    set_init(config, "pissa");
    set_bool(config, "use_dora", true);
    return config;
}
static pc_config *dropped_pissa(void)
{
    pc_config *config = pissa_with_dora();
    set_bool(config, "use_dora", false);
    set_double(config, "lora_dropout", 0.4);
    return config;
}
static pc_config *output_ia3(void)
{
    pc_config *config = config_new("IA3", "q,c1d,conv,grouped,head.out");
    *(pc_selector *)field_of(config, "feedforward_modules") = list_of(config, "");
    return config;
}
static pc_config *input_ia3(void)
{
    pc_config *config = config_new("IA3", "q,c1d,conv,grouped,head.out");
    *(pc_selector *)field_of(config, "feedforward_modules") = list_of(config, "q,c1d,conv,grouped,head.out");
    return config;
}
static pc_config *plain_adalora(void)
{
    pc_config *config = config_new("ADALORA", "q,c1d,head.out");
    set_int(config, "total_step", 100);
    set_int(config, "init_r", 4);
    set_double(config, "lora_dropout", 0.3);
    return config;
}
static pc_config *saved_modules(void)
{
    pc_config *config = config_new("LORA", "k");
    config->modules_to_save = strings_of(&config->pool, "emb,q,c1d,conv,grouped,out");
    return config;
}

static const struct {
    const char *name;
    pc_config *(*make)(void);
    bool constant_norm; /* DoRA: its factors' differences see the norm change, its gradients do not */
} configs[] = {
    {"lora", plain_lora, false},           {"lora with biases", biased_lora, false}, {"lora, dropout", dropped_lora, false},
    {"dora", plain_dora, true},            {"dora, dropout", dropped_dora, true},    {"pissa and dora", pissa_with_dora, true},
    {"pissa, dropout", dropped_pissa, false}, {"ia3", output_ia3, false},            {"ia3, input", input_ia3, false},
    {"adalora", plain_adalora, false},     {"modules_to_save", saved_modules, false},
};

/* Σ weights · y of the call as it is now. */
static double loss(const pc_call *call, pc_activation *activation, const void *x, const double *weights)
{
    pc_error err;
    const int64_t n = call_outputs(call);
    double *y = malloc((size_t)n * sizeof *y + 1), sum = 0.0;
    CHECK_STATUS(pc_forward(call, activation, x, y, &err), PC_OK);
    for (int64_t i = 0; i < n; i++)
        sum += weights[i] * y[i];
    free(y);
    return sum;
}

static double slope(const pc_call *call, pc_activation *activation, const void *x, const double *weights, double *place)
{
    const double before = *place;
    *place = before + 1e-5;
    double up = loss(call, activation, x, weights);
    *place = before - 1e-5;
    double down = loss(call, activation, x, weights);
    *place = before;
    return (up - down) / 2e-5;
}

static bool close_to(double got, double want) { return fabs(got - want) <= 1e-7 + 1e-6 * fabs(want); }

static pc_status there_and_back(const pc_call *call, pc_activation *activation, const void *x, const double *weights,
                                double *dx, pc_error *err)
{
    const int64_t n = call_outputs(call);
    const pc_target none = {NULL, PC_F32};
    pc_kept kept = {0};
    pc_pool_init_scratch(&kept.pool);
    double *y = malloc((size_t)n * sizeof *y + 1);
    pc_status status = pc_forward_keeping(call, activation, x, y, &kept, err);
    memcpy(y, weights, (size_t)n * sizeof *y);
    pc_sum sum = {.data = dx};
    if (status == PC_OK)
        status = pc_backward(call, activation, &kept, x, y, dx != NULL ? &sum : NULL, none, none, err);
    pc_pool_free(&kept.pool);
    free(y);
    return status;
}

static void check_module(model *m, const char *module, const char *names, bool constant_norm)
{
    pc_error err;
    pc_call call = call_of(m, module, 4);
    call.rt = rt;
    call.training = true;
    call.rng = (pc_rng){9, 5};
    call.padding_idx = -1;
    void *x = input_for(&call);
    const bool ids = call.module->kind == PC_EMBEDDING;
    const int64_t inputs = call_inputs(&call), outputs = call_outputs(&call);
    double *weights = numbers(PC_F64, outputs, 77), *dx = ids ? NULL : malloc((size_t)inputs * sizeof *dx);
    pc_activation *activation = pc_registry_acquire(m->registry);
    for (size_t a = 0; a < activation->count; a++) {
        pc_adapter *adapter = activation->adapters[a];
        adapter->trainable = true;
        CHECK_STATUS(pc_gradients_prepare(adapter, &err), PC_OK);
        for (size_t t = 0; t < adapter->tensor_count; t++)
            pc_gradient_clear(adapter, &adapter->tensors[t]);
    }
    CHECK_STATUS(there_and_back(&call, activation, x, weights, dx, &err), PC_OK);
    int wrong = 0, checked = 0;
    for (int64_t i = 0; i < inputs && !ids; i += 1 + inputs / 12, checked++)
        wrong += !close_to(dx[i], slope(&call, activation, x, weights, (double *)x + i));
    for (size_t a = 0; a < activation->count; a++) {
        const pc_adapter *adapter = activation->adapters[a];
        for (size_t t = 0; t < adapter->tensor_count; t++) {
            const pc_tensor *tensor = &adapter->tensors[t];
            if (tensor->module != call.module_index || !tensor->trainable || (constant_norm && tensor->role <= 4 && tensor->role != 2))
                continue;
            const double *gradient = pc_gradient_now(adapter, tensor);
            CHECK(gradient != NULL);
            double *values = pc_tensor_data(adapter, tensor);
            const int64_t n = pc_tensor_count(tensor);
            for (int64_t i = 0; gradient != NULL && i < n; i += 1 + n / 9, checked++)
                wrong += !close_to(gradient[i], slope(&call, activation, x, weights, values + i));
        }
    }
    if (wrong != 0)
        fprintf(stderr, "%s on %s: %d of %d gradients are wrong\n", names, module, wrong, checked);
    CHECK_INT(wrong, 0);
    pc_activation_release(activation);
    free(x), free(weights), free(dx);
}

TEST(methods_against_finite_differences)
{
    for (size_t c = 0; c < sizeof configs / sizeof *configs; c++) {
        pc_error err;
        model m;
        model_init(&m, PC_F64);
        add_adapter(&m, "one", configs[c].make(), true);
        REQUIRE_STATUS(activate(&m, "one", &err), PC_OK);
        for (size_t i = 0; i < sizeof modules / sizeof *modules; i++)
            check_module(&m, modules[i], configs[c].name, configs[c].constant_norm);
        model_free(&m);
    }
}

TEST(methods_one_in_another)
{
    pc_error err;
    model m;
    model_init(&m, PC_F64);
    add_adapter(&m, "a", dropped_lora(), true);
    add_adapter(&m, "b", input_ia3(), true);
    add_adapter(&m, "c", output_ia3(), true);
    add_adapter(&m, "d", plain_lora(), true);
    REQUIRE_STATUS(activate(&m, "a,b,c,d", &err), PC_OK);
    for (size_t i = 1; i < sizeof modules / sizeof *modules; i++)
        check_module(&m, modules[i], "four adapters", false);
    model_free(&m);
}

TEST(what_is_frozen_gets_no_gradient)
{
    pc_error err;
    model m;
    model_init(&m, PC_F64);
    pc_adapter *frozen = add_adapter(&m, "a", plain_lora(), true), *learns = add_adapter(&m, "b", biased_lora(), true);
    REQUIRE_STATUS(activate(&m, "a,b", &err), PC_OK);
    frozen->trainable = false;
    learns->trainable = true;
    pc_call call = call_of(&m, "c1d", 3);
    pc_activation *activation = pc_registry_acquire(m.registry);
    bool needs_x;
    CHECK(pc_learns(activation, call.module_index, false, &needs_x));
    CHECK(needs_x);
    CHECK_STATUS(pc_gradients_prepare(learns, &err), PC_OK);
    void *x = input_for(&call);
    double *weights = numbers(PC_F64, call_outputs(&call), 3);
    CHECK_STATUS(there_and_back(&call, activation, x, weights, NULL, &err), PC_OK);
    for (size_t t = 0; t < frozen->tensor_count; t++)
        CHECK(pc_gradient_now(frozen, &frozen->tensors[t]) == NULL);
    learns->trainable = false;
    CHECK(!pc_learns(activation, call.module_index, false, &needs_x));
    CHECK(!needs_x);
    CHECK(pc_learns(NULL, -1, true, &needs_x));
    pc_activation_release(activation);
    free(x), free(weights);
    model_free(&m);
}

TEST(allocations_that_fail)
{
    for (size_t c = 0; c < sizeof configs / sizeof *configs; c++) {
        pc_error err;
        model m;
        model_init(&m, PC_F64);
        pc_adapter *adapter = add_adapter(&m, "one", configs[c].make(), true);
        REQUIRE_STATUS(activate(&m, "one", &err), PC_OK);
        adapter->trainable = true;
        pc_activation *activation = pc_registry_acquire(m.registry);
        for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
            pc_call call = call_of(&m, modules[i], 3);
            call.training = true;
            call.padding_idx = -1;
            void *x = input_for(&call);
            double *weights = numbers(PC_F64, call_outputs(&call), 1);
            double *dx = call.module->kind == PC_EMBEDDING ? NULL : malloc((size_t)call_inputs(&call) * sizeof *dx);
            FOR_EACH_ALLOCATION (n) {
                pc_status status = pc_gradients_prepare(adapter, &err);
                if (status == PC_OK)
                    status = there_and_back(&call, activation, x, weights, dx, &err);
                CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
            }
            free(x), free(weights), free(dx);
        }
        pc_activation_release(activation);
        model_free(&m);
    }
}

int main(void)
{
    pc_error err;
    pc_kernels_init();
    if (pc_runtime_new(&rt, &err) != PC_OK || pc_runtime_set_threads(rt, 3, &err) != PC_OK)
        return 1;
    RUN(methods_against_finite_differences);
    RUN(methods_one_in_another);
    RUN(what_is_frozen_gets_no_gradient);
    RUN(allocations_that_fail);
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (!pc_kernels_force_isa(isas[i]))
            continue;
        RUN(linear_dx);
        RUN(slopes_of_activations);
        RUN(norms_in_f32_follow_f64);
        RUN(attention_in_f32_follows_f64);
        RUN(draws_are_those_of_single_units);
    }
    pc_runtime_free(rt);
    return check_done();
}
