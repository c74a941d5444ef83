/* Filling an adapter from a file or a dict. */
#include "model.h"

/* ---------------------------------------------------------- a source in memory */

typedef struct entry {
    char name[96];
    pc_dtype dtype;
    int ndim;
    uint64_t shape[4];
    uint64_t seed; /* of its values */
} entry;

typedef struct source {
    pc_weights base;
    entry entries[64];
    pc_tensor_info info[64];
    size_t reads, fail_at; /* the read (from 1) that fails; 0: none */
} source;

static pc_status source_read(pc_weights *self, size_t i, void *dst, pc_error *err)
{
    source *s = (source *)self;
    if (++s->reads == s->fail_at)
        return pc_fail(err, PC_ERR_IO, "the disk is gone");
    int64_t n = (int64_t)(s->info[i].nbytes / pc_dtype_size(s->entries[i].dtype));
    fill_noise(s->entries[i].dtype, dst, n, s->entries[i].seed);
    return PC_OK;
}

static void source_close(pc_weights *self) { (void)self; }

static void source_init(source *s)
{
    memset(s, 0, sizeof *s);
    s->base = (pc_weights){.label = "file", .tensors = s->info, .read = source_read, .close = source_close};
}

static entry *put(source *s, pc_dtype dtype, const char *name, int ndim, uint64_t d0, uint64_t d1)
{
    size_t i = s->base.count++;
    entry *e = &s->entries[i];
    *e = (entry){.dtype = dtype, .ndim = ndim, .shape = {d0, d1}, .seed = 500 + i};
    snprintf(e->name, sizeof e->name, "%s", name);
    uint64_t bytes = pc_dtype_size(dtype) * d0 * (ndim > 1 ? d1 : 1);
    s->info[i] = (pc_tensor_info){e->name, strlen(e->name), dtype, ndim, e->shape, bytes};
    return e;
}

/* LoRA r=2 on both q, in PEFT's names. */
static void put_q(source *s, pc_dtype dtype)
{
    put(s, dtype, "base_model.model.model.layers.0.q.lora_A.weight", 2, 2, IN);
    put(s, dtype, "base_model.model.model.layers.0.q.lora_B.weight", 2, OUT, 2);
    put(s, dtype, "model.layers.1.q.lora_A.weight", 2, 2, IN);
    put(s, dtype, "model.layers.1.q.lora_B.weight", 2, OUT, 2);
}

static pc_config *lora_q(void)
{
    pc_config *config = config_new("LORA", "q");
    set_int(config, "r", 2);
    return config;
}

typedef struct loaded {
    pc_status status;
    pc_adapter *adapter;
    pc_load_report report;
    pc_error err;
} loaded;

static loaded load(model *m, pc_config *config, source *s)
{
    loaded l = {.status = PC_OK};
    l.err.text[0] = '\0';
    pc_pool_init(&l.report.pool);
    l.status = pc_adapter_build(m->registry, "a", 1, config, &s->base, &l.adapter, &l.err);
    if (l.status != PC_OK) {
        pc_config_free(config);
        return l;
    }
    l.status = pc_adapter_load(NULL, m->registry, l.adapter, &s->base, 9, &l.report, &l.err);
    return l;
}

static void unload(loaded *l)
{
    pc_adapter_release(l->adapter);
    pc_load_report_free(&l->report);
}

static bool holds(const model *m, const loaded *l, const char *key, pc_dtype file_dtype, uint64_t seed)
{
    const pc_tensor *tensor = tensor_named(m, l->adapter, key);
    for (int64_t i = 0; tensor != NULL && i < pc_tensor_count(tensor); i++) {
        char in_file[8], converted[8];
        pc_put_double(file_dtype, in_file, 0, noise(seed, i));
        pc_put_double(tensor->dtype, converted, 0, pc_get_double(file_dtype, in_file, 0));
        if (value_at(l->adapter, tensor, i) != pc_get_double(tensor->dtype, converted, 0))
            return false;
    }
    return tensor != NULL;
}

/* ----------------------------------------------------------------------- tests */

TEST(names_with_and_without_prefix_in_any_dtype)
{
    static const pc_dtype dtypes[] = {PC_F32, PC_F64, PC_F16, PC_BF16};
    for (size_t to = 0; to < 4; to++)
        for (size_t from = 0; from < 4; from++) {
            model m;
            source s;
            model_init(&m, dtypes[to]);
            source_init(&s);
            put_q(&s, dtypes[from]);
            loaded l = load(&m, lora_q(), &s);
            CHECK_STATUS(l.status, PC_OK);
            CHECK_INT(l.report.missing.count, 0);
            CHECK_INT(l.report.unexpected.count, 0);
            CHECK(holds(&m, &l, "model.layers.0.q.lora_A.weight", dtypes[from], 500));
            CHECK(holds(&m, &l, "model.layers.1.q.lora_B.weight", dtypes[from], 503));
            unload(&l);
            model_free(&m);
        }
}

TEST(missing_is_initialised_and_unexpected_is_reported)
{
    model m;
    source s;
    model_init(&m, PC_F32);
    source_init(&s);
    put(&s, PC_F32, "base_model.model.model.layers.0.q.lora_A.weight", 2, 2, IN);
    put(&s, PC_F32, "base_model.model.model.layers.7.q.lora_A.weight", 2, 2, IN);
    put(&s, PC_F32, "model.layers.1.q.lora_A.weight", 2, 2, IN);
    put(&s, PC_F32, "model.layers.1.q.lora_B.weight", 2, OUT, 2);
    put(&s, PC_I64, "position_ids", 1, 4, 0);
    loaded l = load(&m, lora_q(), &s);
    CHECK_STATUS(l.status, PC_OK);
    REQUIRE(l.report.missing.count == 1 && l.report.unexpected.count == 2);
    CHECK(strcmp(l.report.missing.items[0].text, "model.layers.0.q.lora_B.weight") == 0);
    CHECK(strcmp(l.report.unexpected.items[0].text, "base_model.model.model.layers.7.q.lora_A.weight") == 0);
    CHECK(holds(&m, &l, "model.layers.0.q.lora_A.weight", PC_F32, 500));
    CHECK(holds(&m, &l, "model.layers.1.q.lora_A.weight", PC_F32, 502));
    unload(&l);
    model_free(&m);
}

TEST(shapes_and_dtypes_are_checked_before_anything_is_read)
{
    model m;
    source s;
    model_init(&m, PC_F32);
    source_init(&s);
    put_q(&s, PC_F32);
    s.entries[3].shape[1] = 3;
    loaded l = load(&m, lora_q(), &s);
    CHECK_STATUS(l.status, PC_ERR_VALUE);
    CHECK_CONTAINS(l.err.text, "size mismatch for model.layers.1.q.lora_B.weight: file has shape [5, 3], the adapter "
                               "needs [5, 2]");
    CHECK_INT(s.reads, 0);
    unload(&l);
    source_init(&s);
    put_q(&s, PC_F32);
    s.info[0].ndim = 1;
    l = load(&m, lora_q(), &s);
    CHECK_STATUS(l.status, PC_ERR_VALUE);
    unload(&l);
    source_init(&s);
    put_q(&s, PC_I32);
    l = load(&m, lora_q(), &s);
    CHECK_STATUS(l.status, PC_ERR_VALUE);
    CHECK_CONTAINS(l.err.text, "has dtype I32");
    unload(&l);
    source_init(&s);
    put_q(&s, PC_F32);
    s.fail_at = 3;
    l = load(&m, lora_q(), &s);
    CHECK_STATUS(l.status, PC_ERR_IO);
    unload(&l);
    model_free(&m);
}

TEST(a_saved_module_must_be_there)
{
    model m;
    source s;
    model_init(&m, PC_F32);
    source_init(&s);
    put_q(&s, PC_F32);
    pc_config *config = lora_q();
    config->modules_to_save = strings_of(&config->pool, "out");
    loaded l = load(&m, config, &s);
    CHECK_STATUS(l.status, PC_ERR_KEY);
    CHECK_CONTAINS(l.err.text, "head.out.weight");
    unload(&l);
    put(&s, PC_F32, "base_model.model.head.out.weight", 2, 3, OUT);
    put(&s, PC_F32, "base_model.model.head.out.bias", 1, 3, 0);
    config = lora_q();
    config->modules_to_save = strings_of(&config->pool, "out");
    l = load(&m, config, &s);
    CHECK_STATUS(l.status, PC_OK);
    CHECK(holds(&m, &l, "head.out.weight", PC_F32, 504) && holds(&m, &l, "head.out.bias", PC_F32, 505));
    unload(&l);
    model_free(&m);
}

TEST(biases_under_either_name_or_the_models_own)
{
    model m;
    source s;
    model_init(&m, PC_F32);
    source_init(&s);
    put_q(&s, PC_F32);
    put(&s, PC_F32, "model.layers.0.q.bias", 1, OUT, 0);
    put(&s, PC_F32, "base_model.model.model.layers.1.q.base_layer.bias", 1, OUT, 0);
    pc_config *config = lora_q();
    config->bias = PC_BIAS_ADAPTED;
    loaded l = load(&m, config, &s);
    CHECK_STATUS(l.status, PC_OK);
    CHECK_INT(l.report.missing.count + l.report.unexpected.count, 0);
    CHECK(holds(&m, &l, "model.layers.0.q.base_layer.bias", PC_F32, 504));
    CHECK(holds(&m, &l, "model.layers.1.q.base_layer.bias", PC_F32, 505));
    unload(&l);
    /* PEFT does not write them. */
    source_init(&s);
    put_q(&s, PC_F32);
    config = lora_q();
    config->bias = PC_BIAS_ADAPTED;
    l = load(&m, config, &s);
    CHECK_STATUS(l.status, PC_OK);
    CHECK_INT(l.report.missing.count, 0);
    const pc_tensor *bias = tensor_named(&m, l.adapter, "model.layers.0.q.base_layer.bias");
    REQUIRE(bias != NULL);
    CHECK(memcmp(pc_tensor_data(l.adapter, bias), module_of(&m, "model.layers.0.q")->bias, bias->nbytes) == 0);
    CHECK(holds(&m, &l, "model.layers.0.q.lora_A.weight", PC_F32, 500));
    unload(&l);
    model_free(&m);
}

TEST(doras_magnitude_under_either_name)
{
    for (int old = 0; old < 2; old++) {
        model m;
        source s;
        model_init(&m, PC_F32);
        source_init(&s);
        put_q(&s, PC_F32);
        put(&s, PC_F32,
            old ? "model.layers.0.q.lora_magnitude_vector" : "model.layers.0.q.lora_magnitude_vector.weight", 1, OUT, 0);
        put(&s, PC_F32, "model.layers.1.q.lora_magnitude_vector", 1, OUT, 0);
        pc_config *config = lora_q();
        set_bool(config, "use_dora", true);
        loaded l = load(&m, config, &s);
        CHECK_STATUS(l.status, PC_OK);
        CHECK_INT(l.report.missing.count + l.report.unexpected.count, 0);
        CHECK(holds(&m, &l, "model.layers.0.q.lora_magnitude_vector", PC_F32, 504));
        unload(&l);
        model_free(&m);
    }
}

/* The part of the base weight that PiSSA replaced is found again at load. */
TEST(pissa_is_decomposed_again)
{
    static const char *const kinds[] = {"pissa", "pissa_niter_4", "olora"};
    for (size_t i = 0; i < 3; i++) {
        model m;
        source s;
        model_init(&m, PC_F64);
        source_init(&s);
        put_q(&s, PC_F64);
        pc_config *config = lora_q();
        set_init(config, kinds[i]);
        pc_adapter *made = add_adapter(&m, "made", config, false);
        config = lora_q();
        set_init(config, kinds[i]);
        loaded l = load(&m, config, &s);
        CHECK_STATUS(l.status, PC_OK);
        CHECK(holds(&m, &l, "model.layers.0.q.lora_A.weight", PC_F64, 500));
        const pc_tensor *before = tensor_named(&m, made, "model.layers.0.q.lora_initial_A");
        const pc_tensor *after = tensor_named(&m, l.adapter, "model.layers.0.q.lora_initial_A");
        REQUIRE(before != NULL && after != NULL);
        CHECK(memcmp(pc_tensor_data(made, before), pc_tensor_data(l.adapter, after), before->nbytes) == 0);
        CHECK(!before->in_state_dict && !before->trainable);
        unload(&l);
        model_free(&m);
    }
}

TEST(tensors_are_aligned)
{
    model m;
    source s;
    model_init(&m, PC_BF16);
    source_init(&s);
    put_q(&s, PC_BF16);
    loaded l = load(&m, lora_q(), &s);
    CHECK_STATUS(l.status, PC_OK);
    for (size_t t = 0; t < l.adapter->tensor_count; t++)
        CHECK((uintptr_t)pc_tensor_data(l.adapter, &l.adapter->tensors[t]) % PC_ALIGNMENT == 0);
    unload(&l);
    model_free(&m);
}

/* ---------------------------------------------------- base weights in the file */

TEST(base_weights_that_a_file_brings_belong_to_the_adapter)
{
    model m;
    source s;
    model_init(&m, PC_F32);
    source_init(&s);
    put_q(&s, PC_F32);
    put(&s, PC_F16, "base_model.model.model.layers.0.q.base_layer.weight", 2, OUT, IN);
    put(&s, PC_F32, "model.layers.1.q.base_layer.bias", 1, OUT, 0);
    put(&s, PC_F32, "model.layers.1.k.base_layer.weight", 2, OUT, IN); /* not adapted: unexpected */
    loaded l = load(&m, lora_q(), &s);
    CHECK_STATUS(l.status, PC_OK);
    CHECK_INT(l.report.missing.count, 0);
    CHECK_INT(l.report.unexpected.count, 1);
    CHECK(holds(&m, &l, "model.layers.0.q.base_layer.weight", PC_F16, 504));
    CHECK(holds(&m, &l, "model.layers.1.q.base_layer.bias", PC_F32, 505));
    for (size_t t = 0; t < l.adapter->tensor_count; t++)
        CHECK(!pc_is_base_copy(&l.adapter->tensors[t]) || !l.adapter->tensors[t].trainable);

    /* They stand in for the module's own while the adapter is active. */
    pc_error err;
    CHECK_STATUS(pc_registry_insert(m.registry, pc_adapter_retain(l.adapter), &err), PC_OK);
    const char *name = "a";
    const size_t len = 1;
    CHECK_STATUS(pc_registry_activate(m.registry, &name, &len, 1, &err), PC_OK);
    pc_activation *activation = pc_registry_acquire(m.registry);
    pc_module effective = *module_of(&m, "model.layers.0.q");
    CHECK_STATUS(pc_effective_weights(activation, index_of(&m, "model.layers.0.q"), &effective, &err), PC_OK);
    CHECK(effective.weight != module_of(&m, "model.layers.0.q")->weight);
    CHECK(effective.bias == module_of(&m, "model.layers.0.q")->bias);
    pc_activation_release(activation);
    unload(&l);

    source_init(&s);
    put(&s, PC_F32, "model.layers.0.q.base_layer.weight", 2, OUT, IN + 1);
    pc_config *config = lora_q();
    pc_adapter *adapter = NULL;
    CHECK_STATUS(pc_adapter_build(m.registry, "b", 1, config, &s.base, &adapter, &err), PC_OK);
    pc_load_report report = {0};
    pc_pool_init(&report.pool);
    CHECK_STATUS(pc_adapter_load(NULL, m.registry, adapter, &s.base, 9, &report, &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "size mismatch for model.layers.0.q.base_layer.weight");
    pc_load_report_free(&report);
    pc_adapter_release(adapter);
    model_free(&m);
}

/* The adapter's own tensor with this name has the module's own values. */
static bool is_own_weight(const model *m, const loaded *l, const char *module, const char *key)
{
    const pc_tensor *tensor = tensor_named(m, l->adapter, key);
    return tensor != NULL && memcmp(pc_tensor_data(l->adapter, tensor), module_of(m, module)->weight, tensor->nbytes) == 0;
}

TEST(embeddings_that_the_targets_name_are_saved)
{
    static const struct {
        const char *targets;
        bool words, scores;
    } cases[] = {{"embed_tokens", true, false}, {"lm_head", false, true}, {"model.embed_tokens", false, false},
                 {"lm_head,model.embed_tokens", true, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        model m;
        source s;
        model_init(&m, PC_F32);
        model_add(&m, (pc_module){.name = "model.embed_tokens",
                                  .kind = PC_EMBEDDING,
                                  .in_features = VOCABULARY,
                                  .out_features = OUT,
                                  .input_embedding = true});
        add_linear(&m, "lm_head", OUT, VOCABULARY);
        module_of(&m, "lm_head")->output_embedding = true;
        source_init(&s);
        loaded l = load(&m, config_new("LORA", cases[i].targets), &s);
        CHECK_STATUS(l.status, PC_OK);
        CHECK(is_own_weight(&m, &l, "model.embed_tokens", "model.embed_tokens.base_layer.weight") == cases[i].words);
        CHECK(is_own_weight(&m, &l, "lm_head", "lm_head.base_layer.weight") == cases[i].scores);
        CHECK((tensor_named(&m, l.adapter, "lm_head.base_layer.bias") != NULL) == cases[i].scores);
        for (size_t k = 0; k < l.report.missing.count; k++) /* the model's own stand in: nothing is missing */
            CHECK(strstr(l.report.missing.items[k].text, "base_layer") == NULL);
        unload(&l);
        model_free(&m);
    }
}

#ifdef PC_TEST_HOOKS
TEST(every_failed_allocation_with_base_weights_is_clean)
{
    model m;
    source s;
    pc_error err;
    model_init(&m, PC_F32);
    source_init(&s);
    put_q(&s, PC_F32);
    put(&s, PC_F32, "model.layers.0.q.base_layer.weight", 2, OUT, IN);
    const long before = pc_test_live_allocations();
    FOR_EACH_ALLOCATION (n) {
        pc_adapter *adapter = NULL;
        pc_test_fail_allocation(0);
        pc_config *config = lora_q();
        set_init(config, "pissa");
        pc_test_fail_allocation(n);
        pc_load_report report = {0};
        pc_pool_init(&report.pool);
        pc_status status = pc_adapter_build(m.registry, "a", 1, config, &s.base, &adapter, &err);
        if (status != PC_OK)
            pc_config_free(config);
        else
            status = pc_adapter_load(NULL, m.registry, adapter, &s.base, 9, &report, &err);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
        pc_load_report_free(&report);
        pc_adapter_release(adapter);
        CHECK_INT(pc_test_live_allocations(), before);
    }
    model_free(&m);
}

TEST(every_failed_allocation_is_clean)
{
    model m;
    source s;
    pc_error err;
    model_init(&m, PC_BF16);
    source_init(&s);
    put_q(&s, PC_F32);
    put(&s, PC_F32, "extra", 1, 2, 0);
    s.base.count--;
    pc_adapter *adapter = NULL;
    pc_config *config = lora_q();
    config->bias = PC_BIAS_ADAPTED;
    set_bool(config, "use_dora", true);
    CHECK_STATUS(pc_adapter_build(m.registry, "a", 1, config, NULL, &adapter, &err), PC_OK);
    const long before = pc_test_live_allocations();
    FOR_EACH_ALLOCATION (n) {
        pc_load_report report = {0};
        pc_pool_init(&report.pool);
        pc_status status = pc_adapter_load(NULL, m.registry, adapter, &s.base, 9, &report, &err);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
        pc_load_report_free(&report);
        CHECK_INT(pc_test_live_allocations(), before);
    }
    pc_adapter_release(adapter);
    model_free(&m);
}
#endif

int main(void)
{
    pc_kernels_init();
    RUN(names_with_and_without_prefix_in_any_dtype);
    RUN(missing_is_initialised_and_unexpected_is_reported);
    RUN(shapes_and_dtypes_are_checked_before_anything_is_read);
    RUN(a_saved_module_must_be_there);
    RUN(biases_under_either_name_or_the_models_own);
    RUN(base_weights_that_a_file_brings_belong_to_the_adapter);
    RUN(embeddings_that_the_targets_name_are_saved);
    RUN(doras_magnitude_under_either_name);
    RUN(pissa_is_decomposed_again);
    RUN(tensors_are_aligned);
#ifdef PC_TEST_HOOKS
    RUN(every_failed_allocation_with_base_weights_is_clean);
    RUN(every_failed_allocation_is_clean);
#endif
    return check_done();
}
