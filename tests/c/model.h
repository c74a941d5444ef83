/* What the engine's tests share: a small model, configs made by hand, and
 * plain loops to compare with. */
#ifndef PEFTC_TESTS_MODEL_H
#define PEFTC_TESTS_MODEL_H

#include "check.h"

#include "../../src/kernels/kernels.h"
#include "../../src/methods/methods.h"

/* -------------------------------------------------------------------- numbers */

/* A short deterministic sequence in [-1, 1), the same on every machine. */
CHECK_UNUSED static double noise(uint64_t seed, int64_t i)
{
    uint64_t z = (seed + 1) * 0x9E3779B97F4A7C15u + (uint64_t)i * 0xD1B54A32D192ED03u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1.0;
}

CHECK_UNUSED static void fill_noise(pc_dtype dtype, void *to, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        pc_put_double(dtype, to, i, noise(seed, i));
}

/* ---------------------------------------------------------------------- model */

#define MODEL_MODULES 32

typedef struct model {
    pc_registry *registry;
    void *owned[2 * MODEL_MODULES];
    size_t owned_count;
    pc_dtype dtype;
} model;

CHECK_UNUSED static void *own_noise(model *m, int64_t n)
{
    void *values = malloc((size_t)n * pc_dtype_size(m->dtype) + 1);
    fill_noise(m->dtype, values, n, m->owned_count + 17);
    m->owned[m->owned_count++] = values;
    return values;
}

CHECK_UNUSED static pc_module *model_add(model *m, pc_module module)
{
    pc_error err;
    module.name_len = strlen(module.name);
    module.class_name = NULL;
    module.dtype = m->dtype;
    if (module.alias_of == 0)
        module.alias_of = -1;
    if (module.groups == 0)
        module.groups = 1;
    module.has_weight = module.kind != PC_CONTAINER;
    if (module.has_weight)
        module.weight = own_noise(m, pc_module_weight_count(&module));
    if (module.has_bias)
        module.bias = own_noise(m, module.out_features);
    size_t index = 0;
    CHECK_STATUS(pc_module_table_add(pc_registry_modules(m->registry), &module, &index, &err), PC_OK);
    return &pc_registry_modules(m->registry)->items[index];
}

CHECK_UNUSED static void add_linear(model *m, const char *name, int64_t in, int64_t out)
{
    model_add(m, (pc_module){.name = name, .kind = PC_LINEAR, .in_features = in, .out_features = out, .has_bias = true});
}

CHECK_UNUSED static void add_container(model *m, const char *name)
{
    model_add(m, (pc_module){.name = name, .kind = PC_CONTAINER});
}

#define IN 6
#define OUT 5
#define VOCABULARY 9

/* "", emb, layers.{0,1}.{q,k,norm}, c1d, conv, conv.grouped, head, head.dense, head.out */
CHECK_UNUSED static void model_init(model *m, pc_dtype dtype)
{
    pc_error err;
    memset(m, 0, sizeof *m);
    m->dtype = dtype;
    CHECK_STATUS(pc_registry_new(&m->registry, &err), PC_OK);
    add_container(m, "");
    model_add(m, (pc_module){.name = "emb", .kind = PC_EMBEDDING, .in_features = VOCABULARY, .out_features = OUT});
    add_container(m, "model.layers.0");
    add_linear(m, "model.layers.0.q", IN, OUT);
    add_linear(m, "model.layers.0.k", IN, OUT);
    model_add(m, (pc_module){.name = "model.layers.0.norm", .kind = PC_LAYERNORM, .out_features = OUT, .has_bias = true});
    add_linear(m, "model.layers.1.q", IN, OUT);
    add_linear(m, "model.layers.1.k", IN, OUT);
    model_add(m, (pc_module){
                     .name = "c1d", .kind = PC_CONV1D, .in_features = IN, .out_features = OUT, .has_bias = true});
    model_add(m, (pc_module){.name = "conv",
                             .kind = PC_CONV2D,
                             .in_features = 4,
                             .out_features = 6,
                             .kernel = {3, 2},
                             .stride = {1, 2},
                             .padding = {1, 1},
                             .dilation = {2, 1},
                             .has_bias = true});
    model_add(m, (pc_module){.name = "grouped",
                             .kind = PC_CONV2D,
                             .in_features = 4,
                             .out_features = 6,
                             .kernel = {3, 2},
                             .stride = {1, 2},
                             .padding = {1, 1},
                             .dilation = {2, 1},
                             .groups = 2,
                             .has_bias = true});
    add_container(m, "head");
    add_linear(m, "head.dense", OUT, OUT);
    add_linear(m, "head.out", OUT, 3);
}

CHECK_UNUSED static void model_free(model *m)
{
    pc_registry_free(m->registry);
    for (size_t i = 0; i < m->owned_count; i++)
        free(m->owned[i]);
}

CHECK_UNUSED static pc_module *module_of(const model *m, const char *name)
{
    return pc_module_table_find(pc_registry_modules(m->registry), name, strlen(name));
}

CHECK_UNUSED static int32_t index_of(const model *m, const char *name)
{
    return (int32_t)(module_of(m, name) - pc_registry_modules(m->registry)->items);
}

/* --------------------------------------------------------------------- configs */

/* A list from "a,b,c" in the config's pool. */
CHECK_UNUSED static pc_strings strings_of(pc_pool *pool, const char *text)
{
    size_t count = *text != '\0';
    for (const char *c = text; *c != '\0'; c++)
        count += *c == ',';
    pc_string *items = pc_pool_array(pool, count, sizeof *items);
    for (size_t i = 0; items != NULL && i < count; i++) {
        size_t len = strcspn(text, ",");
        items[i] = (pc_string){pc_pool_strndup(pool, text, len), len};
        text += len + 1;
    }
    return (pc_strings){items, count};
}

CHECK_UNUSED static pc_selector list_of(pc_config *config, const char *text)
{
    return (pc_selector){.kind = PC_SELECT_LIST, .names = strings_of(&config->pool, text)};
}

/* A config with the method's defaults that targets "a,b". */
CHECK_UNUSED static pc_config *config_new(const char *peft_type, const char *targets)
{
    const pc_method *method = pc_method_find(peft_type, strlen(peft_type));
    pc_config *config = pc_calloc(1, sizeof *config);
    config->schema = &method->schema;
    config->label = "config";
    pc_pool_init(&config->pool);
    config->params = pc_pool_alloc(&config->pool, method->schema.params_size);
    method->schema.set_defaults(config->params);
    config->target_modules = list_of(config, targets);
    return config;
}

/* One field of the method's own, by its name in the file. */
CHECK_UNUSED static void *field_of(const pc_config *config, const char *name)
{
    for (size_t i = 0; i < config->schema->field_count; i++)
        if (strcmp(config->schema->fields[i].name, name) == 0)
            return (char *)config->params + config->schema->fields[i].offset;
    fprintf(stderr, "no field %s\n", name);
    abort();
}

CHECK_UNUSED static void set_int(pc_config *config, const char *name, int64_t value)
{
    *(int64_t *)field_of(config, name) = value;
}

CHECK_UNUSED static void set_double(pc_config *config, const char *name, double value)
{
    *(double *)field_of(config, name) = value;
}

CHECK_UNUSED static void set_bool(pc_config *config, const char *name, bool value)
{
    *(bool *)field_of(config, name) = value;
}

CHECK_UNUSED static void set_init(pc_config *config, const char *text)
{
    pc_bool_or_text *init = field_of(config, "init_lora_weights");
    init->is_text = strcmp(text, "true") != 0 && strcmp(text, "false") != 0;
    init->flag = strcmp(text, "true") == 0;
    init->text = (pc_string){pc_pool_strndup(&config->pool, text, strlen(text)), strlen(text)};
}

/* -------------------------------------------------------------------- adapters */

/* Build, initialise and list an adapter whose tensors then get noise, so that nothing is zero by luck. */
CHECK_UNUSED static pc_adapter *add_adapter(model *m, const char *name, pc_config *config, bool randomise)
{
    pc_error err;
    pc_adapter *adapter = NULL;
    err.text[0] = '\0';
    pc_status status = config->schema->validate(config, &err);
    if (status == PC_OK)
        status = pc_adapter_build(m->registry, name, strlen(name), config, NULL, &adapter, &err);
    if (status != PC_OK) {
        fprintf(stderr, "%s\n", err.text);
        check_status(status, PC_OK, __FILE__, __LINE__, "add_adapter");
        pc_config_free(config);
        return NULL;
    }
    status = pc_adapter_init(NULL, m->registry, adapter, 3, &err);
    if (status != PC_OK)
        fprintf(stderr, "%s\n", err.text);
    CHECK_STATUS(status, PC_OK);
    for (size_t t = 0; randomise && t < adapter->tensor_count; t++)
        if (adapter->tensors[t].in_state_dict)
            fill_noise(adapter->tensors[t].dtype, pc_tensor_data(adapter, &adapter->tensors[t]),
                       pc_tensor_count(&adapter->tensors[t]), 1000 + t + strlen(name) * 77);
    CHECK_STATUS(pc_registry_insert(m->registry, adapter, &err), PC_OK);
    return adapter;
}

/* Make "a,b" active. */
CHECK_UNUSED static pc_status activate(model *m, const char *text, pc_error *err)
{
    const char *names[8];
    size_t lens[8], count = 0;
    while (*text != '\0') {
        names[count] = text;
        lens[count] = strcspn(text, ",");
        text += lens[count] + (text[lens[count]] == ',');
        count++;
    }
    return pc_registry_activate(m->registry, names, lens, count, err);
}

/* The tensor that the state dict calls `key`, as doubles through pc_get_double. */
CHECK_UNUSED static const pc_tensor *tensor_named(const model *m, const pc_adapter *adapter, const char *key)
{
    pc_pool pool;
    pc_error err;
    const pc_tensor *found = NULL;
    pc_pool_init(&pool);
    for (size_t t = 0; t < adapter->tensor_count && found == NULL; t++) {
        pc_string name;
        CHECK_STATUS(pc_tensor_name(m->registry, adapter, &adapter->tensors[t], false, &pool, &name, &err), PC_OK);
        if (strcmp(name.text, key) == 0)
            found = &adapter->tensors[t];
    }
    pc_pool_free(&pool);
    return found;
}

CHECK_UNUSED static double value_at(const pc_adapter *adapter, const pc_tensor *tensor, int64_t i)
{
    return pc_get_double(tensor->dtype, pc_tensor_data(adapter, tensor), i);
}

/* --------------------------------------------------------------------- forward */

CHECK_UNUSED static pc_call call_of(const model *m, const char *name, int64_t rows)
{
    pc_call call = {.module = module_of(m, name),
                    .module_index = index_of(m, name),
                    .compute = pc_compute_dtype(m->dtype),
                    .rows = rows};
    if (call.module->kind == PC_CONV2D) {
        call.height = 7;
        call.width = 6;
        pc_conv_shape shape = {.batch = rows, .in_channels = 4, .height = 7, .width = 6, .out_channels = 6, .groups = 1};
        memcpy(shape.kernel, call.module->kernel, sizeof shape.kernel);
        memcpy(shape.stride, call.module->stride, sizeof shape.stride);
        memcpy(shape.padding, call.module->padding, sizeof shape.padding);
        memcpy(shape.dilation, call.module->dilation, sizeof shape.dilation);
        pc_error err;
        CHECK_STATUS(pc_conv_output(&shape, &err), PC_OK);
        call.out_height = shape.out_height;
        call.out_width = shape.out_width;
    }
    return call;
}

CHECK_UNUSED static int64_t call_inputs(const pc_call *call)
{
    int64_t n = call->rows * (call->module->kind == PC_EMBEDDING ? 1 : call->module->in_features);
    return call->module->kind == PC_CONV2D ? n * call->height * call->width : n;
}

CHECK_UNUSED static int64_t call_outputs(const pc_call *call)
{
    int64_t n = call->rows * call->module->out_features;
    return call->module->kind == PC_CONV2D ? n * call->out_height * call->out_width : n;
}

/* An input for a call: noise, or ids for an embedding. malloc'ed. */
CHECK_UNUSED static void *input_for(const pc_call *call)
{
    int64_t n = call_inputs(call);
    if (call->module->kind == PC_EMBEDDING) {
        int64_t *ids = malloc((size_t)n * sizeof *ids);
        for (int64_t i = 0; i < n; i++)
            ids[i] = (i * 5 + 2) % call->module->in_features;
        return ids;
    }
    void *x = malloc((size_t)n * pc_dtype_size(call->compute));
    fill_noise(call->compute, x, n, 5);
    return x;
}

/* Run a module under what is active now; malloc'ed result. */
CHECK_UNUSED static void *run(const model *m, const pc_call *call, const void *x)
{
    pc_error err;
    int64_t n = call_outputs(call);
    void *y = malloc((size_t)n * pc_dtype_size(call->compute));
    for (int64_t i = 0; i < n; i++) /* y must be written in full */
        pc_put_double(call->compute, y, i, NAN);
    pc_activation *activation = pc_registry_acquire(m->registry);
    pc_status status = pc_forward(call, activation, x, y, &err);
    if (status != PC_OK)
        fprintf(stderr, "%s\n", err.text);
    CHECK_STATUS(status, PC_OK);
    pc_activation_release(activation);
    return y;
}

/* Largest difference relative to the largest value. */
CHECK_UNUSED static double difference(pc_dtype dtype, const void *a, const void *b, int64_t n)
{
    double worst = 0.0, scale = 1e-30;
    for (int64_t i = 0; i < n; i++) {
        double x = pc_get_double(dtype, a, i), y = pc_get_double(dtype, b, i), d = fabs(x - y);
        if (!(d <= worst))
            worst = d; /* NaN wins */
        if (fabs(y) > scale)
            scale = fabs(y);
    }
    return worst / scale;
}

#endif
