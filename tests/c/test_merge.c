/* Merged weights compute what the adapters do, and leave the base as it was. */
#include "reference.h"

static const char *const everything[] = {"emb", "model.layers.0.q", "model.layers.1.k", "c1d", "conv", "head.out"};
#define MODULES (sizeof everything / sizeof *everything)

static pc_config *lora(bool dora, const char *init)
{
    pc_config *config = config_new("LORA", strcmp(init, "true") != 0 ? "q,k,c1d,head.out" : "emb,q,k,c1d,conv,head.out");
    set_int(config, "r", 3);
    set_bool(config, "use_dora", dora);
    set_init(config, init);
    return config;
}

static pc_config *ia3(const char *feedforward)
{
    pc_config *config = config_new("IA3", "q,k,c1d,conv,grouped,head.out");
    *(pc_selector *)field_of(config, "feedforward_modules") = list_of(config, feedforward);
    return config;
}

static pc_config *adalora(void)
{
    pc_config *config = config_new("ADALORA", "q,k,c1d");
    set_int(config, "total_step", 10);
    return config;
}

static pc_config *lora_bias(void)
{
    pc_config *config = config_new("LORA", "q,k,c1d,conv");
    set_bool(config, "lora_bias", true);
    config->bias = PC_BIAS_ALL;
    return config;
}

/* Merge, compare every module with what the active adapters gave, unmerge, compare with the base. */
static void check_merge(model *m, const char *names, pc_adapter *const *adapters, size_t count, double tolerance)
{
    pc_error err;
    CHECK_STATUS(activate(m, names, &err), PC_OK);
    void *x[MODULES], *active[MODULES];
    const void *weights[MODULES];
    pc_call calls[MODULES];
    for (size_t i = 0; i < MODULES; i++) {
        calls[i] = call_of(m, everything[i], 3);
        weights[i] = calls[i].module->weight;
        x[i] = input_for(&calls[i]);
        active[i] = run(m, &calls[i], x[i]);
    }
    pc_merged *merged = NULL;
    CHECK_STATUS(pc_merge(NULL, m->registry, adapters, count, true, &merged, &err), PC_OK);
    CHECK_STATUS(pc_registry_set_merged(m->registry, merged, &err), PC_OK);
    for (size_t i = 0; i < MODULES; i++) {
        void *y = run(m, &calls[i], x[i]);
        double gap = difference(calls[i].compute, y, active[i], call_outputs(&calls[i]));
        if (!(gap <= tolerance))
            fprintf(stderr, "%s %s: %g\n", names, everything[i], gap);
        CHECK(gap <= tolerance);
        CHECK(calls[i].module->weight == weights[i]);
        free(y);
    }
    /* Disabled means the base model, merged or not. */
    CHECK_STATUS(pc_registry_set_enabled(m->registry, false, &err), PC_OK);
    for (size_t i = 0; i < MODULES; i++)
        CHECK(agrees(m, everything[i], NULL, 0, 2e-5));
    CHECK_STATUS(pc_registry_set_enabled(m->registry, true, &err), PC_OK);
    CHECK_STATUS(pc_registry_set_merged(m->registry, NULL, &err), PC_OK);
    for (size_t i = 0; i < MODULES; i++) {
        void *y = run(m, &calls[i], x[i]);
        CHECK(difference(calls[i].compute, y, active[i], call_outputs(&calls[i])) == 0.0);
        free(y);
        free(x[i]);
        free(active[i]);
    }
}

static void check_one(pc_config *(*make)(void))
{
    static const struct {
        pc_dtype dtype;
        double tolerance;
    } rows[] = {{PC_F32, 2e-5}, {PC_F64, 1e-11}, {PC_BF16, 3e-2}, {PC_F16, 4e-3}};
    for (size_t i = 0; i < 4; i++) {
        model m;
        model_init(&m, rows[i].dtype);
        pc_adapter *adapter = add_adapter(&m, "a", make(), true);
        if (adapter != NULL)
            check_merge(&m, "a", &adapter, 1, rows[i].tolerance);
        model_free(&m);
    }
}

static pc_config *plain(void) { return lora(false, "true"); }
static pc_config *dora(void) { return lora(true, "true"); }
static pc_config *pissa(void) { return lora(false, "pissa"); }
static pc_config *pissa_dora(void) { return lora(true, "pissa"); }
static pc_config *ia3_mixed(void) { return ia3("k,conv,c1d"); }
static pc_config *ia3_output(void) { return ia3(""); }

TEST(lora_merges) { check_one(plain); }
TEST(dora_merges) { check_one(dora); }
TEST(pissa_merges) { check_one(pissa); }
TEST(pissa_with_dora_merges) { check_one(pissa_dora); }
TEST(ia3_merges) { check_one(ia3_mixed); }
TEST(ia3_output_merges) { check_one(ia3_output); }
TEST(adalora_merges) { check_one(adalora); }
TEST(lora_bias_and_trained_biases_merge) { check_one(lora_bias); }

TEST(several_merge_in_order)
{
    model m;
    model_init(&m, PC_F64);
    pc_adapter *a = add_adapter(&m, "a", plain(), true), *b = add_adapter(&m, "b", ia3_mixed(), true);
    pc_adapter *c = add_adapter(&m, "c", adalora(), true), *d = add_adapter(&m, "d", dora(), true);
    check_merge(&m, "a,b,c", (pc_adapter *[]){a, b, c}, 3, 1e-11);
    check_merge(&m, "c,b,a", (pc_adapter *[]){c, b, a}, 3, 1e-11);
    check_merge(&m, "d,c", (pc_adapter *[]){d, c}, 2, 1e-11);
    model_free(&m);
}

TEST(grouped_convolutions)
{
    model m;
    pc_error err;
    pc_merged *merged = NULL;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "grouped");
    pc_adapter *low_rank = add_adapter(&m, "a", config, true), *scaling = add_adapter(&m, "b", ia3("grouped"), true);
    /* The low-rank update reaches across groups: no grouped weight can hold it. */
    CHECK_STATUS(pc_merge(NULL, m.registry, &low_rank, 1, false, &merged, &err), PC_ERR_UNSUPPORTED);
    CHECK_CONTAINS(err.text, "groups > 1");
    CHECK_STATUS(activate(&m, "b", &err), PC_OK);
    CHECK_STATUS(pc_merge(NULL, m.registry, &scaling, 1, false, &merged, &err), PC_OK);
    CHECK_STATUS(pc_registry_set_merged(m.registry, merged, &err), PC_OK);
    CHECK(agrees(&m, "grouped", &scaling, 1, 2e-5));
    model_free(&m);
}

TEST(a_layer_without_bias_gets_lora_bias)
{
    model m;
    pc_error err;
    pc_merged *merged = NULL;
    model_init(&m, PC_F32);
    model_add(&m, (pc_module){.name = "bare", .kind = PC_LINEAR, .in_features = IN, .out_features = OUT});
    pc_config *config = config_new("LORA", "bare");
    set_bool(config, "lora_bias", true);
    pc_adapter *adapter = add_adapter(&m, "a", config, true);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    CHECK(agrees(&m, "bare", &adapter, 1, 2e-5));
    CHECK_STATUS(pc_merge(NULL, m.registry, &adapter, 1, false, &merged, &err), PC_OK);
    CHECK_STATUS(pc_registry_set_merged(m.registry, merged, &err), PC_OK);
    CHECK(agrees(&m, "bare", &adapter, 1, 2e-5));
    model_free(&m);
}

TEST(safe_merge_names_a_broken_adapter)
{
    model m;
    pc_error err;
    pc_merged *merged = NULL;
    model_init(&m, PC_F16);
    pc_adapter *good = add_adapter(&m, "good", plain(), true), *bad = add_adapter(&m, "bad", plain(), true);
    pc_put_double(PC_F16, pc_tensor_data(bad, tensor_named(&m, bad, "c1d.lora_A.weight")), 1, NAN);
    pc_adapter *both[] = {good, bad};
    CHECK_STATUS(pc_merge(NULL, m.registry, both, 2, true, &merged, &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "NaNs detected in the merged weights. The adapter bad seems to be broken");
    CHECK_CONTAINS(err.text, "c1d");
    CHECK_STATUS(pc_merge(NULL, m.registry, both, 2, false, &merged, &err), PC_OK);
    pc_merged_release(merged);
    model_free(&m);
}

TEST(an_adapter_that_is_active_but_not_merged_waits)
{
    model m;
    pc_error err;
    pc_merged *merged = NULL;
    model_init(&m, PC_F64);
    pc_adapter *a = add_adapter(&m, "a", plain(), true);
    pc_config *config = config_new("LORA", "q,grouped");
    pc_adapter *b = add_adapter(&m, "b", config, true);
    CHECK_STATUS(pc_merge(NULL, m.registry, &a, 1, false, &merged, &err), PC_OK);
    CHECK_STATUS(activate(&m, "b", &err), PC_OK);
    CHECK_STATUS(pc_registry_set_merged(m.registry, merged, &err), PC_OK);
    CHECK(agrees(&m, "model.layers.0.q", &a, 1, 1e-11));
    CHECK(agrees(&m, "grouped", &b, 1, 1e-11));
    /* Deleting a merged adapter takes its share out. */
    CHECK_STATUS(pc_registry_remove(m.registry, "a", 1, &err), PC_OK);
    CHECK(agrees(&m, "model.layers.0.q", &b, 1, 1e-11));
    model_free(&m);
}

TEST(switching_takes_the_merge_back_in_the_same_step)
{
    model m;
    model_init(&m, PC_F64);
    pc_error err;
    pc_adapter *a = add_adapter(&m, "a", plain(), true);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    pc_merged *merged = NULL;
    CHECK_STATUS(pc_merge(NULL, m.registry, &a, 1, false, &merged, &err), PC_OK);
    CHECK_STATUS(pc_registry_set_merged(m.registry, merged, &err), PC_OK);
    pc_activation *before = pc_registry_acquire(m.registry);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    pc_activation *after = pc_registry_acquire(m.registry);
    CHECK(before->merged != NULL); /* a forward pass in flight keeps what it took */
    CHECK(after->merged == NULL);
    pc_activation_release(before);
    pc_activation_release(after);
    model_free(&m);
}

#ifdef PC_TEST_HOOKS
TEST(every_failed_allocation_is_clean)
{
    model m;
    pc_error err;
    model_init(&m, PC_BF16);
    pc_adapter *list[] = {add_adapter(&m, "a", dora(), true), add_adapter(&m, "b", adalora(), true),
                          add_adapter(&m, "c", pissa(), true), add_adapter(&m, "d", ia3_mixed(), true)};
    const long before = pc_test_live_allocations();
    FOR_EACH_ALLOCATION (n) {
        pc_merged *merged = NULL;
        pc_status status = pc_merge(NULL, m.registry, list, 4, true, &merged, &err);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
        pc_merged_release(merged);
        CHECK_INT(pc_test_live_allocations(), before);
    }
    model_free(&m);
}
#endif

int main(void)
{
    pc_kernels_init();
    RUN(lora_merges);
    RUN(dora_merges);
    RUN(pissa_merges);
    RUN(pissa_with_dora_merges);
    RUN(ia3_merges);
    RUN(ia3_output_merges);
    RUN(adalora_merges);
    RUN(lora_bias_and_trained_biases_merge);
    RUN(several_merge_in_order);
    RUN(grouped_convolutions);
    RUN(a_layer_without_bias_gets_lora_bias);
    RUN(safe_merge_names_a_broken_adapter);
    RUN(an_adapter_that_is_active_but_not_merged_waits);
    RUN(switching_takes_the_merge_back_in_the_same_step);
#ifdef PC_TEST_HOOKS
    RUN(every_failed_allocation_is_clean);
#endif
    return check_done();
}
