/* What each method computes, alone, together, disabled and after a change,
 * against plain loops (reference.h). */
#include "reference.h"

static const pc_dtype dtypes[] = {PC_F32, PC_F64, PC_F16, PC_BF16};
#define DTYPES (sizeof dtypes / sizeof *dtypes)

static double tolerance_of(pc_dtype dtype) { return dtype == PC_F64 ? 1e-12 : 2e-5; }

static const char *const everything[] = {"emb",   "model.layers.0.q", "model.layers.1.k", "c1d", "conv", "grouped",
                                         "head.out"};
#define MODULES (sizeof everything / sizeof *everything)
#define ALL_TARGETS "emb,q,k,c1d,conv,grouped,head.out"
#define LINEAR_TARGETS "q,k,c1d,head.out"

/* Build the config's adapter on a fresh model of every dtype and compare each module. */
static void check_everywhere(pc_config *(*make)(void), bool randomise)
{
    for (size_t t = 0; t < DTYPES; t++) {
        model m;
        pc_error err;
        model_init(&m, dtypes[t]);
        pc_adapter *adapter = add_adapter(&m, "a", make(), randomise);
        if (adapter != NULL) {
            CHECK_STATUS(activate(&m, "a", &err), PC_OK);
            for (size_t i = 0; i < MODULES; i++)
                CHECK(agrees(&m, everything[i], &adapter, 1, tolerance_of(m.dtype)));
            CHECK_STATUS(pc_registry_set_enabled(m.registry, false, &err), PC_OK);
            for (size_t i = 0; i < MODULES; i++)
                CHECK(agrees(&m, everything[i], NULL, 0, tolerance_of(m.dtype)));
        }
        model_free(&m);
    }
}

static pc_config *plain_lora(void)
{
    pc_config *config = config_new("LORA", ALL_TARGETS);
    set_int(config, "r", 4);
    set_double(config, "lora_alpha", 3.0);
    return config;
}

static pc_config *rslora_with_patterns(void)
{
    pc_config *config = plain_lora();
    pc_error err;
    set_bool(config, "use_rslora", true);
    static const struct {
        const char *field, *text;
        double value;
    } rows[] = {{"rank_pattern", "layers\\.0\\.q", 2}, {"alpha_pattern", "q|c1d", 7}};
    for (size_t i = 0; i < 2; i++) {
        pc_number_pattern *item = pc_pool_array(&config->pool, 1, sizeof *item);
        item->value = rows[i].value;
        CHECK_STATUS(pc_pattern_compile(rows[i].text, strlen(rows[i].text), &item->regex, &err), PC_OK);
        *(pc_number_patterns *)field_of(config, rows[i].field) = (pc_number_patterns){item, 1};
    }
    return config;
}

static pc_config *lora_with_bias(void)
{
    pc_config *config = config_new("LORA", "q,k,c1d,conv,grouped,head.out");
    set_int(config, "r", 2);
    set_bool(config, "lora_bias", true);
    return config;
}

static pc_config *dora(void)
{
    pc_config *config = config_new("LORA", "emb,q,k,c1d,conv,head.out");
    set_int(config, "r", 3);
    set_bool(config, "use_dora", true);
    return config;
}

static pc_config *ia3(void)
{
    pc_config *config = config_new("IA3", "q,k,c1d,conv,grouped,head.out");
    *(pc_selector *)field_of(config, "feedforward_modules") = list_of(config, "k,grouped,c1d");
    return config;
}

static pc_config *ia3_output(void)
{
    pc_config *config = config_new("IA3", "q,k,c1d,conv,grouped,head.out");
    *(pc_selector *)field_of(config, "feedforward_modules") = list_of(config, "");
    return config;
}

static pc_config *adalora(void)
{
    pc_config *config = config_new("ADALORA", LINEAR_TARGETS);
    set_int(config, "total_step", 100);
    set_int(config, "init_r", 4);
    pc_mask *mask = pc_pool_array(&config->pool, 1, sizeof *mask);
    bool *keep = pc_pool_array(&config->pool, 4, sizeof *keep);
    keep[0] = keep[2] = keep[3] = true;
    *mask = (pc_mask){{"model.layers.0.q.lora_E", 23}, keep, 4};
    *(pc_masks *)field_of(config, "rank_pattern") = (pc_masks){mask, 1};
    return config;
}

static pc_config *adalora_without_alpha(void)
{
    pc_config *config = adalora();
    set_double(config, "lora_alpha", 0.0);
    return config;
}

static pc_config *pissa(void)
{
    pc_config *config = config_new("LORA", LINEAR_TARGETS);
    set_int(config, "r", 2);
    set_init(config, "pissa");
    return config;
}

static pc_config *pissa_fast(void)
{
    pc_config *config = pissa();
    set_init(config, "pissa_niter_16");
    return config;
}

static pc_config *pissa_dora(void)
{
    pc_config *config = pissa();
    set_bool(config, "use_dora", true);
    return config;
}

static pc_config *olora(void)
{
    pc_config *config = config_new("LORA", LINEAR_TARGETS);
    set_int(config, "r", 2);
    set_init(config, "olora");
    return config;
}

TEST(lora_on_every_kind) { check_everywhere(plain_lora, true); }
TEST(rslora_and_patterns) { check_everywhere(rslora_with_patterns, true); }
TEST(lora_bias) { check_everywhere(lora_with_bias, true); }
TEST(dora_on_every_kind) { check_everywhere(dora, true); }
TEST(ia3_feedforward_and_output) { check_everywhere(ia3, true); }
TEST(ia3_output_only) { check_everywhere(ia3_output, true); }
TEST(adalora_with_a_rank_pattern) { check_everywhere(adalora, true); }
TEST(adalora_alpha_zero) { check_everywhere(adalora_without_alpha, true); }
TEST(pissa_trained) { check_everywhere(pissa, true); }
TEST(pissa_with_dora) { check_everywhere(pissa_dora, true); }
TEST(olora_trained) { check_everywhere(olora, true); }

/* --------------------------------------------------------------------- nesting */

TEST(methods_nest_in_the_order_given)
{
    static const char *const orders[] = {"a,b,c,d", "d,c,b,a", "b,d,a,c", "c,a", "b", "d,b"};
    for (size_t t = 0; t < 2; t++) {
        model m;
        pc_error err;
        model_init(&m, dtypes[t]);
        pc_adapter *all[4] = {add_adapter(&m, "a", plain_lora(), true), add_adapter(&m, "b", dora(), true),
                              add_adapter(&m, "c", ia3(), true), add_adapter(&m, "d", adalora(), true)};
        for (size_t i = 0; i < sizeof orders / sizeof *orders; i++) {
            pc_adapter *active[4];
            size_t count = 0;
            for (const char *c = orders[i]; *c != '\0'; c += c[1] == ',' ? 2 : 1)
                active[count++] = all[*c - 'a'];
            CHECK_STATUS(activate(&m, orders[i], &err), PC_OK);
            for (size_t j = 0; j < MODULES; j++)
                CHECK(agrees(&m, everything[j], active, count, 4 * tolerance_of(m.dtype)));
        }
        model_free(&m);
    }
}

TEST(more_adapters_than_the_stack_holds)
{
    model m;
    pc_error err;
    model_init(&m, PC_F64);
    pc_adapter *adapters[20];
    char names[20][4];
    const char *list[20];
    size_t lens[20];
    for (size_t i = 0; i < 20; i++) {
        lens[i] = (size_t)snprintf(names[i], sizeof names[i], "a%zu", i);
        list[i] = names[i];
        pc_config *config = plain_lora();
        set_double(config, "lora_alpha", 0.3);
        adapters[i] = add_adapter(&m, names[i], config, true);
    }
    CHECK_STATUS(pc_registry_activate(m.registry, list, lens, 20, &err), PC_OK);
    CHECK(agrees(&m, "model.layers.0.q", adapters, 20, 1e-11));
    model_free(&m);
}

/* -------------------------------------------------------------- initial values */

static double largest(const pc_adapter *adapter, const pc_tensor *tensor)
{
    double most = 0.0;
    for (int64_t i = 0; i < pc_tensor_count(tensor); i++)
        most = fmax(most, fabs(value_at(adapter, tensor, i)));
    return most;
}

/* A new adapter changes nothing. */
static void check_new_is_neutral(pc_config *config, double tolerance)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    pc_adapter *adapter = add_adapter(&m, "a", config, false);
    if (adapter != NULL) {
        CHECK_STATUS(activate(&m, "a", &err), PC_OK);
        for (size_t i = 0; i < MODULES; i++)
            CHECK(agrees(&m, everything[i], NULL, 0, tolerance));
    }
    model_free(&m);
}

TEST(new_adapters_change_nothing)
{
    pc_config *(*const make[])(void) = {plain_lora, rslora_with_patterns, lora_with_bias, dora,      ia3, ia3_output,
                                        adalora,    pissa,                pissa_fast,     pissa_dora, olora};
    for (size_t i = 0; i < sizeof make / sizeof *make; i++)
        check_new_is_neutral(make[i](), 1e-5);
    pc_config *config = config_new("LORA", LINEAR_TARGETS);
    set_int(config, "r", 4);
    set_init(config, "orthogonal");
    check_new_is_neutral(config, 1e-5);
    config = plain_lora();
    set_init(config, "gaussian");
    check_new_is_neutral(config, 1e-5);
}

TEST(initial_values_have_pefts_distributions)
{
    model m;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "q,emb,conv");
    set_int(config, "r", 4);
    set_init(config, "false");
    set_bool(config, "lora_bias", false);
    pc_adapter *adapter = add_adapter(&m, "a", config, false);
    REQUIRE(adapter != NULL);
    double most = largest(adapter, tensor_named(&m, adapter, "model.layers.0.q.lora_A.weight"));
    CHECK(most <= 1.0 / sqrt(IN) && most > 0.6 / sqrt(IN));
    most = largest(adapter, tensor_named(&m, adapter, "model.layers.0.q.lora_B.weight"));
    CHECK(most <= 1.0 / sqrt(4) && most > 0.6 / sqrt(4));
    most = largest(adapter, tensor_named(&m, adapter, "conv.lora_A.weight"));
    CHECK(most <= 1.0 / sqrt(4 * 6) && most > 0.6 / sqrt(4 * 6));
    CHECK(largest(adapter, tensor_named(&m, adapter, "emb.lora_embedding_A")) > 1.0);
    config = config_new("LORA", "emb,q");
    adapter = add_adapter(&m, "b", config, false);
    REQUIRE(adapter != NULL);
    CHECK(largest(adapter, tensor_named(&m, adapter, "emb.lora_embedding_A")) == 0.0);
    CHECK(largest(adapter, tensor_named(&m, adapter, "emb.lora_embedding_B")) > 1.0);
    CHECK(largest(adapter, tensor_named(&m, adapter, "model.layers.0.q.lora_B.weight")) == 0.0);
    /* Two modules do not get the same draws. */
    CHECK(value_at(adapter, tensor_named(&m, adapter, "model.layers.0.q.lora_A.weight"), 0) !=
          value_at(adapter, tensor_named(&m, adapter, "model.layers.1.q.lora_A.weight"), 0));
    model_free(&m);
}

/* PiSSA's and OLoRA's factors are the top of the base weight's decomposition. */
TEST(pissa_takes_the_largest_singular_values)
{
    for (int fast = 0; fast < 2; fast++) {
        model m;
        model_init(&m, PC_F64);
        pc_config *config = fast ? pissa_fast() : pissa();
        if (fast)
            set_init(config, "pissa_niter_100"); /* the test's matrix has close singular values */
        pc_adapter *adapter = add_adapter(&m, "a", config, false);
        REQUIRE(adapter != NULL);
        const pc_module *q = module_of(&m, "model.layers.0.q");
        double w[OUT * IN], u[OUT * OUT], s[OUT], vt[OUT * IN];
        memcpy(w, q->weight, sizeof w);
        pc_error err;
        CHECK_STATUS(pc_svd(PC_F64, OUT, IN, w, u, s, vt, &err), PC_OK);
        const pc_tensor *a = tensor_named(&m, adapter, "model.layers.0.q.lora_A.weight");
        const pc_tensor *b = tensor_named(&m, adapter, "model.layers.0.q.lora_B.weight");
        const double scaling = pc_adapter_slot(adapter, index_of(&m, "model.layers.0.q"))->scaling;
        for (int64_t o = 0; o < OUT; o++)
            for (int64_t i = 0; i < IN; i++) {
                double want = 0.0, got = 0.0;
                for (int64_t k = 0; k < 2; k++) {
                    want += u[o * OUT + k] * s[k] * vt[k * IN + i];
                    got += scaling * value_at(adapter, b, o * 2 + k) * value_at(adapter, a, k * IN + i);
                }
                CHECK_CLOSE(got, want, fast ? 1e-6 : 1e-10);
            }
        model_free(&m);
    }
}

TEST(pissa_with_a_rank_beyond_the_matrix)
{
    model m;
    pc_error err;
    model_init(&m, PC_F64);
    pc_config *config = pissa();
    set_int(config, "r", 50);
    pc_adapter *adapter = add_adapter(&m, "a", config, false);
    REQUIRE(adapter != NULL);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    CHECK(agrees(&m, "model.layers.0.q", NULL, 0, 1e-11));
    model_free(&m);
}

/* ---------------------------------------------------------------------- dropout */

TEST(dropout_acts_in_training_only)
{
    for (int variant = 0; variant < 3; variant++) {
        model m;
        pc_error err;
        model_init(&m, PC_F64);
        pc_config *config = variant == 0 ? plain_lora() : variant == 1 ? dora() : adalora();
        set_double(config, "lora_dropout", 0.5);
        pc_adapter *adapter = add_adapter(&m, "a", config, true);
        REQUIRE(adapter != NULL);
        CHECK_STATUS(activate(&m, "a", &err), PC_OK);
        CHECK(agrees(&m, "model.layers.0.q", &adapter, 1, 1e-11));
        pc_call call = call_of(&m, "model.layers.0.q", 3);
        call.training = true;
        call.rng = (pc_rng){1, 1};
        void *x = input_for(&call), *first = run(&m, &call, x), *same = run(&m, &call, x);
        call.rng.stream = 2;
        void *other = run(&m, &call, x);
        call.training = false;
        void *eval = run(&m, &call, x);
        CHECK(difference(PC_F64, first, same, call_outputs(&call)) == 0.0);
        CHECK(difference(PC_F64, first, other, call_outputs(&call)) > 1e-3);
        CHECK(difference(PC_F64, first, eval, call_outputs(&call)) > 1e-3);
        /* The mean over many draws is the result without dropout. */
        double mean[3 * OUT] = {0};
        call.training = true;
        for (uint64_t i = 0; i < 4000; i++) {
            call.rng.stream = 100 + i;
            double *y = run(&m, &call, x);
            for (int64_t j = 0; j < 3 * OUT; j++)
                mean[j] += y[j] / 4000;
            free(y);
        }
        CHECK(difference(PC_F64, mean, eval, 3 * OUT) < 0.1);
        free(x);
        free(first);
        free(same);
        free(other);
        free(eval);
        model_free(&m);
    }
}

/* -------------------------------------------------------- biases, saved modules */

TEST(a_trained_bias_is_in_effect_while_active)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    pc_config *config = plain_lora();
    config->bias = PC_BIAS_ALL;
    pc_adapter *all = add_adapter(&m, "all", config, false);
    config = config_new("LORA", "q");
    config->bias = PC_BIAS_ADAPTED;
    pc_adapter *adapted = add_adapter(&m, "adapted", config, false);
    REQUIRE(all != NULL && adapted != NULL);
    CHECK(tensor_named(&m, all, "model.layers.0.norm.bias") != NULL);
    CHECK(tensor_named(&m, all, "head.dense.bias") != NULL);
    CHECK(tensor_named(&m, all, "model.layers.0.k.base_layer.bias") != NULL);
    CHECK(tensor_named(&m, adapted, "model.layers.0.k.base_layer.bias") == NULL);
    const pc_tensor *bias = tensor_named(&m, adapted, "model.layers.0.q.base_layer.bias");
    REQUIRE(bias != NULL);
    pc_module *q = module_of(&m, "model.layers.0.q");
    CHECK(memcmp(pc_tensor_data(adapted, bias), q->bias, bias->nbytes) == 0);
    fill_noise(PC_F32, pc_tensor_data(adapted, bias), OUT, 99);

    pc_module effective = *q;
    CHECK_STATUS(activate(&m, "all,adapted", &err), PC_OK);
    pc_activation *activation = pc_registry_acquire(m.registry);
    CHECK_STATUS(pc_effective_weights(activation, index_of(&m, "model.layers.0.q"), &effective, &err), PC_OK);
    CHECK(effective.weight == q->weight && effective.bias == pc_tensor_data(adapted, bias));
    effective.dtype = PC_F16; /* converted since: a bias of F32 over a weight of F16 */
    CHECK_STATUS(pc_effective_weights(activation, index_of(&m, "model.layers.0.q"), &effective, &err), PC_ERR_VALUE);
    pc_activation_release(activation);
    const void *own = q->bias;
    q->bias = pc_tensor_data(adapted, bias);
    CHECK(agrees(&m, "model.layers.0.q", &adapted, 1, 2e-5));
    q->bias = own;
    CHECK_STATUS(pc_registry_set_enabled(m.registry, false, &err), PC_OK);
    CHECK(agrees(&m, "model.layers.0.q", NULL, 0, 2e-5));
    model_free(&m);
}

TEST(saved_modules_replace_every_layer_beneath)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "q,head.dense");
    config->modules_to_save = strings_of(&config->pool, "head,score");
    pc_adapter *adapter = add_adapter(&m, "a", config, true);
    REQUIRE(adapter != NULL);
    const pc_slot *slot = pc_adapter_slot(adapter, index_of(&m, "head.dense"));
    REQUIRE(slot != NULL);
    CHECK(slot->replaces && !slot->adapts);
    CHECK(adapter->slots[adapter->slot_count - 1].replaces);
    const pc_tensor *saved = tensor_named(&m, adapter, "head.dense.weight");
    REQUIRE(saved != NULL && tensor_named(&m, adapter, "head.out.bias") != NULL);
    pc_pool pool;
    pc_pool_init(&pool);
    pc_string name;
    CHECK_STATUS(pc_tensor_name(m.registry, adapter, saved, true, &pool, &name, &err), PC_OK);
    CHECK(strcmp(name.text, "head.modules_to_save.a.dense.weight") == 0);
    pc_pool_free(&pool);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    pc_module *layer = module_of(&m, "head.dense");
    pc_module kept = *layer;
    pc_call call = call_of(&m, "head.dense", 2);
    void *x = input_for(&call), *got = run(&m, &call, x);
    layer->weight = pc_tensor_data(adapter, saved);
    layer->bias = pc_tensor_data(adapter, tensor_named(&m, adapter, "head.dense.bias"));
    void *want = malloc(sizeof(float) * 2 * OUT);
    CHECK_STATUS(pc_base_forward(&call, x, want, NULL, &err), PC_OK);
    CHECK(difference(PC_F32, got, want, 2 * OUT) < 1e-6);
    *layer = kept;
    free(x);
    free(got);
    free(want);
    model_free(&m);
}

TEST(tensor_names_are_pefts)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    pc_adapter *adapter = add_adapter(&m, "my adapter", dora(), false);
    REQUIRE(adapter != NULL);
    static const struct {
        const char *key, *full;
    } rows[] = {
        {"emb.lora_embedding_A", "emb.lora_embedding_A.my adapter"},
        {"c1d.lora_A.weight", "c1d.lora_A.my adapter.weight"},
        {"c1d.lora_magnitude_vector", "c1d.lora_magnitude_vector.my adapter.weight"},
    };
    pc_pool pool;
    pc_pool_init(&pool);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const pc_tensor *tensor = tensor_named(&m, adapter, rows[i].key);
        REQUIRE(tensor != NULL);
        pc_string name;
        CHECK_STATUS(pc_tensor_name(m.registry, adapter, tensor, true, &pool, &name, &err), PC_OK);
        CHECK(strcmp(name.text, rows[i].full) == 0);
    }
    pc_pool_free(&pool);
    model_free(&m);
}

/* --------------------------------------------------------------- allocation */

#ifdef PC_TEST_HOOKS
TEST(forward_survives_every_failed_allocation)
{
    model m;
    pc_error err;
    model_init(&m, PC_BF16);
    pc_config *config = dora();
    set_double(config, "lora_dropout", 0.25);
    add_adapter(&m, "a", config, true);
    add_adapter(&m, "b", ia3(), true);
    add_adapter(&m, "c", adalora(), true);
    CHECK_STATUS(activate(&m, "a,b,c", &err), PC_OK);
    for (size_t i = 0; i < MODULES; i++) {
        pc_call call = call_of(&m, everything[i], 2);
        call.training = true;
        void *x = input_for(&call), *y = malloc((size_t)call_outputs(&call) * 8);
        pc_activation *activation = pc_registry_acquire(m.registry);
        const long before = pc_test_live_allocations();
        FOR_EACH_ALLOCATION (n) {
            pc_status status = pc_forward(&call, activation, x, y, &err);
            CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
            CHECK_INT(pc_test_live_allocations(), before);
        }
        pc_activation_release(activation);
        free(x);
        free(y);
    }
    model_free(&m);
}

TEST(build_and_init_survive_every_failed_allocation)
{
    pc_config *(*const make[])(void) = {dora, ia3, adalora, pissa_dora, pissa_fast, olora};
    for (size_t i = 0; i < sizeof make / sizeof *make; i++) {
        model m;
        pc_error err;
        model_init(&m, PC_F16);
        pc_config *config = make[i]();
        config->modules_to_save = strings_of(&config->pool, "head");
        config->bias = PC_BIAS_ALL;
        config->target_modules = list_of(config, "q,c1d");
        const long before = pc_test_live_allocations();
        FOR_EACH_ALLOCATION (n) {
            pc_adapter *adapter = NULL;
            pc_status status = pc_adapter_build(m.registry, "a", 1, config, NULL, &adapter, &err);
            if (status == PC_OK) {
                status = pc_adapter_init(NULL, m.registry, adapter, 1, &err);
                adapter->config = NULL; /* this loop keeps it */
                pc_adapter_release(adapter);
            }
            CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
            CHECK_INT(pc_test_live_allocations(), before);
        }
        pc_config_free(config);
        model_free(&m);
    }
}
#endif

int main(void)
{
    pc_kernels_init();
    RUN(lora_on_every_kind);
    RUN(rslora_and_patterns);
    RUN(lora_bias);
    RUN(dora_on_every_kind);
    RUN(ia3_feedforward_and_output);
    RUN(ia3_output_only);
    RUN(adalora_with_a_rank_pattern);
    RUN(adalora_alpha_zero);
    RUN(pissa_trained);
    RUN(pissa_with_dora);
    RUN(olora_trained);
    RUN(methods_nest_in_the_order_given);
    RUN(more_adapters_than_the_stack_holds);
    RUN(new_adapters_change_nothing);
    RUN(initial_values_have_pefts_distributions);
    RUN(pissa_takes_the_largest_singular_values);
    RUN(pissa_with_a_rank_beyond_the_matrix);
    RUN(dropout_acts_in_training_only);
    RUN(a_trained_bias_is_in_effect_while_active);
    RUN(saved_modules_replace_every_layer_beneath);
    RUN(tensor_names_are_pefts);
#ifdef PC_TEST_HOOKS
    RUN(forward_survives_every_failed_allocation);
    RUN(build_and_init_survive_every_failed_allocation);
#endif
    return check_done();
}
