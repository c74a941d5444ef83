/* Which modules a config names, by PEFT's rules, and what it says when none. */
#include "model.h"

static pc_selector regex_of(const char *text)
{
    pc_error err;
    pc_selector selector = {.kind = PC_SELECT_REGEX, .text = {text, strlen(text)}};
    CHECK_STATUS(pc_pattern_compile(text, strlen(text), &selector.regex, &err), PC_OK);
    return selector;
}

/* The matched modules as "name name +saved", or the error's text. */
static const char *matches(const model *m, const pc_config *config)
{
    static char text[4096];
    const pc_module_table *modules = pc_registry_modules(m->registry);
    uint8_t match[MODEL_MODULES];
    pc_error err;
    text[0] = '\0';
    if (pc_match_modules(config, modules, match, &err) != PC_OK) {
        snprintf(text, sizeof text, "%s", err.text);
        return text;
    }
    for (size_t i = 0; i < modules->count; i++) {
        if (match[i] == 0)
            continue;
        size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "%s%s%s", used != 0 ? " " : "", match[i] == 2 ? "+" : "",
                 modules->items[i].name);
    }
    return text;
}

#define EXPECT(config, want)                                                     \
    do {                                                                         \
        const char *got_ = matches(&m, config);                                  \
        if (!check_that(strcmp(got_, want) == 0, __FILE__, __LINE__, #want))     \
            fprintf(stderr, "  got: %s\n", got_);                                \
    } while (0)

static void set_layers(pc_config *config, const int64_t *layers, size_t count, const char *patterns)
{
    config->has_layers_to_transform = true;
    config->layers_to_transform = (pc_ints){layers, count};
    config->layers_pattern = strings_of(&config->pool, patterns);
}

TEST(a_list_matches_whole_names_and_dotted_suffixes)
{
    model m;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "q");
    EXPECT(config, "model.layers.0.q model.layers.1.q");
    config->target_modules = list_of(config, "0.q,c1d");
    EXPECT(config, "model.layers.0.q c1d");
    config->target_modules = list_of(config, "1d,out");
    EXPECT(config, "head.out");
    config->target_modules = list_of(config, "a,b,c,d,e,f,g,h,i,j,l,m,n,o,p,r,s,t,q,emb,0.k");
    EXPECT(config, "emb model.layers.0.q model.layers.0.k model.layers.1.q");
    pc_config_free(config);
    model_free(&m);
}

TEST(a_regex_matches_the_whole_name)
{
    model m;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "");
    config->target_modules = regex_of(".*\\.1\\.[qk]");
    EXPECT(config, "model.layers.1.q model.layers.1.k");
    pc_pattern_free(config->target_modules.regex);
    config->target_modules = regex_of("layers");
    EXPECT(config, "Target modules layers not found in the base model. Please check the target modules and try again.");
    pc_config_free(config);
    model_free(&m);
}

TEST(exclude_wins_over_targets)
{
    model m;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "q,k");
    config->exclude_modules = list_of(config, "0.q,1.k");
    EXPECT(config, "model.layers.0.k model.layers.1.q");
    config->exclude_modules = regex_of(".*layers\\.0.*");
    EXPECT(config, "model.layers.1.q model.layers.1.k");
    pc_pattern_free(config->exclude_modules.regex);
    config->exclude_modules = regex_of(".*");
    CHECK_CONTAINS(matches(&m, config), "All modules were excluded. This is likely unintended.");
    pc_pattern_free(config->exclude_modules.regex);
    config->exclude_modules = list_of(config, "q,k");
    CHECK_CONTAINS(matches(&m, config), "No modules were targeted for adaptation.");
    pc_config_free(config);
    model_free(&m);
}

TEST(layers_to_transform_filters_suffix_matches)
{
    static const int64_t one[] = {1}, many[] = {0, 7};
    model m;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "q,k");
    set_layers(config, one, 1, "");
    EXPECT(config, "model.layers.1.q model.layers.1.k");
    set_layers(config, many, 2, "h,layers");
    EXPECT(config, "model.layers.0.q model.layers.0.k");
    set_layers(config, one, 1, "h");
    EXPECT(config, "Target modules {'q', 'k'} not found in the base model. Please check the target modules and try "
                   "again. Note: You specified 'layers_to_transform': [1]. You also specified 'layers_pattern': ['h'].");
    /* A full name is wanted whatever its layer. */
    config->target_modules = list_of(config, "model.layers.0.q,k");
    set_layers(config, one, 1, "layers");
    EXPECT(config, "model.layers.0.q model.layers.1.k");
    /* An empty list filters nothing. */
    set_layers(config, one, 0, "");
    EXPECT(config, "model.layers.0.q model.layers.0.k model.layers.1.k");
    pc_config_free(config);
    model_free(&m);
}

TEST(a_layer_number_needs_something_before_its_pattern)
{
    static const int64_t zero[] = {0};
    model m;
    pc_error err;
    memset(&m, 0, sizeof m);
    m.dtype = PC_F32;
    CHECK_STATUS(pc_registry_new(&m.registry, &err), PC_OK);
    add_container(&m, "");
    add_linear(&m, "layers.0.q", IN, OUT);
    add_linear(&m, "t.layers.0.q", IN, OUT);
    add_linear(&m, "t.layers.0.mlp.00.q", IN, OUT);
    add_linear(&m, "t.layers.1.mlp.0.q", IN, OUT);
    add_linear(&m, "t.layers.0.mlp.1.q", IN, OUT);
    add_linear(&m, "t.layers.0x.q", IN, OUT);
    add_linear(&m, "t.layers.99999999999999999999.q", IN, OUT);
    pc_config *config = config_new("LORA", "q");
    set_layers(config, zero, 1, "");
    EXPECT(config, "t.layers.0.q t.layers.0.mlp.00.q t.layers.1.mlp.0.q");
    set_layers(config, zero, 1, "layers");
    EXPECT(config, "t.layers.0.q t.layers.0.mlp.00.q t.layers.0.mlp.1.q");
    pc_config_free(config);
    model_free(&m);
}

TEST(all_linear_leaves_out_the_heads)
{
    model m;
    model_init(&m, PC_F32);
    add_linear(&m, "classifier", OUT, 2);
    pc_config *config = config_new("LORA", "");
    config->target_modules.kind = PC_SELECT_ALL_LINEAR;
#define LINEARS "model.layers.0.q model.layers.0.k model.layers.1.q model.layers.1.k c1d head.dense head.out"
    EXPECT(config, LINEARS " classifier");
    config->task_type = (pc_string){"SEQ_CLS", 7};
    EXPECT(config, LINEARS);
    module_of(&m, "head.out")->output_embedding = true;
    EXPECT(config, "model.layers.0.q model.layers.0.k model.layers.1.q model.layers.1.k c1d head.dense classifier");
    pc_config_free(config);
    model_free(&m);
}

TEST(modules_to_save_are_not_adapted)
{
    model m;
    model_init(&m, PC_F32);
    add_linear(&m, "subhead", OUT, 2);
    pc_config *config = config_new("LORA", "q,dense");
    config->modules_to_save = strings_of(&config->pool, "head,norm,score");
    EXPECT(config, "model.layers.0.q +model.layers.0.norm model.layers.1.q +head.dense +head.out");
    config->target_modules = list_of(config, "dense");
    CHECK_CONTAINS(matches(&m, config), "You may also have only targeted modules that are marked to be saved");
    pc_config_free(config);
    model_free(&m);
}

TEST(a_shared_module_counts_under_its_first_name)
{
    model m;
    model_init(&m, PC_F32);
    model_add(&m, (pc_module){.name = "again.q",
                              .kind = PC_LINEAR,
                              .in_features = IN,
                              .out_features = OUT,
                              .alias_of = index_of(&m, "model.layers.0.q")});
    pc_config *config = config_new("LORA", "q");
    EXPECT(config, "model.layers.0.q model.layers.1.q");
    pc_config_free(config);
    model_free(&m);
}

TEST(nothing_to_look_for)
{
    model m;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "");
    CHECK_CONTAINS(matches(&m, config), "No `target_modules` passed but also no `target_parameters` found.");
    config->target_modules.kind = PC_SELECT_NONE;
    EXPECT(config, "Please specify `target_modules` in `peft_config`");
    pc_config_free(config);
    model_free(&m);
}

/* ------------------------------------------------------------ refused modules */

static void expect_refused(pc_config *config, const char *text)
{
    model m;
    pc_error err;
    pc_adapter *adapter = NULL;
    model_init(&m, PC_F32);
    const long before = pc_test_live_allocations();
    pc_status status = config->schema->validate(config, &err);
    if (status == PC_OK)
        status = pc_adapter_build(m.registry, "a", 1, config, NULL, &adapter, &err);
    CHECK(status != PC_OK);
    if (status != PC_OK)
        CHECK_CONTAINS(err.text, text);
    else
        pc_adapter_release(adapter);
    CHECK_INT(pc_test_live_allocations(), before);
    if (status != PC_OK)
        pc_config_free(config);
    model_free(&m);
}

TEST(modules_and_values_that_cannot_work_are_named)
{
    expect_refused(config_new("LORA", "norm"), "Target module LayerNorm (model.layers.0.norm) is not supported.");
    expect_refused(config_new("LORA", "head"), "Target module Module (head) is not supported.");
    pc_config *config = config_new("IA3", "emb");
    *(pc_selector *)field_of(config, "feedforward_modules") = list_of(config, "");
    expect_refused(config, "Target module Embedding (emb) is not supported.");
    expect_refused(config_new("IA3", "q"), "Please specify `feedforward_modules`");
    config = config_new("IA3", "q");
    *(pc_selector *)field_of(config, "feedforward_modules") = list_of(config, "k");
    expect_refused(config, "`feedforward_modules` should be a subset of `target_modules`");
    config = config_new("ADALORA", "conv");
    set_int(config, "total_step", 5);
    expect_refused(config, "Target module Conv2d (conv) is not supported.");
    expect_refused(config_new("ADALORA", "q"), "AdaLoRA does not work when `total_step` is None");
    config = config_new("ADALORA", "q");
    set_int(config, "total_step", 5);
    set_int(config, "tinit", 3);
    set_int(config, "tfinal", 2);
    expect_refused(config, "don't allow for a budgeting phase");
    config = config_new("LORA", "grouped");
    set_int(config, "r", 3);
    expect_refused(config, "rank is divisible by groups");
    config = config_new("LORA", "conv");
    set_init(config, "pissa");
    expect_refused(config, "Unknown initialization init_lora_weights='pissa' for Conv2d");
    config = config_new("LORA", "emb");
    set_bool(config, "lora_bias", true);
    expect_refused(config, "lora_bias=True is not supported for Embedding");
    static const char *const inits[] = {"pissa_niter_", "pissa_niter_x", "pissa_niter_99999", "kaiming", ""};
    for (size_t i = 0; i < sizeof inits / sizeof *inits; i++) {
        config = config_new("LORA", "q");
        set_init(config, inits[i]);
        expect_refused(config, "Unknown initialization");
    }
    config = config_new("LORA", "q");
    set_init(config, "loftq");
    expect_refused(config, "loftq");
    config = config_new("LORA", "q");
    set_init(config, "orthogonal");
    set_int(config, "r", 3);
    expect_refused(config, "requires the LoRA rank to be even, got 3 instead.");
    static const int64_t ranks[] = {0, -1, INT64_MAX, INT64_MIN};
    for (size_t i = 0; i < 4; i++) {
        config = config_new("LORA", "q");
        set_int(config, "r", ranks[i]);
        expect_refused(config, "`r` should be a positive integer value but the value passed is");
    }
    config = config_new("LORA", "q");
    set_double(config, "lora_alpha", NAN);
    expect_refused(config, "lora_alpha");
    config = config_new("LORA", "q");
    set_double(config, "lora_dropout", NAN);
    expect_refused(config, "lora_dropout");
}

TEST(an_adapter_that_cannot_fit_is_refused)
{
    model m;
    pc_error err;
    pc_adapter *adapter = NULL;
    model_init(&m, PC_F64);
    module_of(&m, "model.layers.0.q")->in_features = INT64_MAX / 4;
    pc_config *config = config_new("LORA", "q");
    CHECK_STATUS(pc_adapter_build(m.registry, "a", 1, config, NULL, &adapter, &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "do not fit into memory");
    pc_config_free(config);
    model_free(&m);
}

TEST(names_of_adapters_are_checked)
{
    static const struct {
        const char *name;
        size_t len;
    } bad[] = {{"", 0}, {"a.b", 3}, {"a\0b", 3}};
    model m;
    pc_error err;
    pc_adapter *adapter = NULL;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "q");
    for (size_t i = 0; i < 3; i++)
        CHECK_STATUS(pc_adapter_build(m.registry, bad[i].name, bad[i].len, config, NULL, &adapter, &err), PC_ERR_VALUE);
    pc_config_free(config);
    add_adapter(&m, "a", config_new("LORA", "q"), false);
    config = config_new("LORA", "q");
    CHECK_STATUS(pc_adapter_build(m.registry, "a", 1, config, NULL, &adapter, &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "Adapter with name a already exists. Please use a different name.");
    pc_config_free(config);
    model_free(&m);
}

int main(void)
{
    RUN(a_list_matches_whole_names_and_dotted_suffixes);
    RUN(a_regex_matches_the_whole_name);
    RUN(exclude_wins_over_targets);
    RUN(layers_to_transform_filters_suffix_matches);
    RUN(a_layer_number_needs_something_before_its_pattern);
    RUN(all_linear_leaves_out_the_heads);
    RUN(modules_to_save_are_not_adapted);
    RUN(a_shared_module_counts_under_its_first_name);
    RUN(nothing_to_look_for);
    RUN(modules_and_values_that_cannot_work_are_named);
    RUN(an_adapter_that_cannot_fit_is_refused);
    RUN(names_of_adapters_are_checked);
    return check_done();
}
