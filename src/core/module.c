#include "module.h"

#include <string.h>

#include "memory.h"

const char *pc_kind_name(pc_kind kind)
{
    static const char *const names[] = {
        [PC_CONTAINER] = "Module",      [PC_LINEAR] = "Linear",           [PC_CONV1D] = "Conv1D",
        [PC_CONV2D] = "Conv2d",         [PC_CONV_ALONG_1] = "Conv1d",     [PC_CONV_ALONG_3] = "Conv3d",
        [PC_EMBEDDING] = "Embedding",   [PC_LAYERNORM] = "LayerNorm",     [PC_RMSNORM] = "RMSNorm",
        [PC_ATTENTION] = "MultiheadAttention",
    };
    size_t i = (size_t)kind;
    return i < sizeof names / sizeof *names ? names[i] : "Module";
}

int pc_kind_kernel_dims(pc_kind kind)
{
    return kind == PC_CONV_ALONG_1 ? 1 : kind == PC_CONV2D ? 2 : kind == PC_CONV_ALONG_3 ? 3 : 0;
}

int pc_module_weight_shape(const pc_module *module, int64_t shape[PC_TENSOR_DIMS])
{
    if (!module->has_weight)
        return 0;
    switch (module->kind) {
    case PC_LINEAR:
    case PC_ATTENTION:
        shape[0] = module->out_features;
        shape[1] = module->in_features;
        return 2;
    case PC_CONV1D:
    case PC_EMBEDDING: /* (num, dim), and in is num */
        shape[0] = module->in_features;
        shape[1] = module->out_features;
        return 2;
    case PC_CONV2D:
    case PC_CONV_ALONG_1:
    case PC_CONV_ALONG_3:
        shape[0] = module->out_features;
        shape[1] = module->groups > 0 ? module->in_features / module->groups : module->in_features;
        for (int d = 0; d < pc_kind_kernel_dims(module->kind); d++)
            shape[2 + d] = module->kernel[d];
        return 2 + pc_kind_kernel_dims(module->kind);
    case PC_LAYERNORM:
    case PC_RMSNORM:
        shape[0] = module->out_features;
        return 1;
    case PC_CONTAINER:
        break;
    }
    return 0;
}

int64_t pc_module_weight_count(const pc_module *module)
{
    int64_t shape[PC_TENSOR_DIMS], count = 1;
    int ndim = pc_module_weight_shape(module, shape);
    for (int d = 0; d < ndim; d++)
        count *= shape[d];
    return ndim != 0 ? count : 0;
}

void pc_module_table_init(pc_module_table *table)
{
    memset(table, 0, sizeof *table);
    pc_strmap_init(&table->by_name);
}

static void free_names(pc_module *module)
{
    pc_free((void *)(uintptr_t)module->name);
    pc_free((void *)(uintptr_t)module->class_name);
}

void pc_module_table_free(pc_module_table *table)
{
    pc_strmap_free(&table->by_name);
    for (size_t i = 0; i < table->count; i++)
        free_names(&table->items[i]);
    pc_free(table->items);
    pc_module_table_init(table);
}

static pc_status reserve(pc_module_table *table, pc_error *err)
{
    if (table->count < table->capacity)
        return PC_OK;
    size_t capacity = table->capacity != 0 ? table->capacity * 2 : 64, bytes;
    if (capacity > INT32_MAX) /* module indices are int32_t */
        return pc_fail(err, PC_ERR_VALUE, "a model with more than %zu modules is not supported", table->count);
    pc_module *items = pc_mul_size(capacity, sizeof *items, &bytes) ? pc_realloc(table->items, bytes) : NULL;
    if (items == NULL)
        return pc_fail_nomem(err, "the module table");
    table->items = items;
    table->capacity = capacity;
    return PC_OK;
}

pc_status pc_module_table_add(pc_module_table *table, const pc_module *module, size_t *index, pc_error *err)
{
    if (pc_module_table_find(table, module->name, module->name_len) != NULL)
        return pc_fail(err, PC_ERR_VALUE, "the model has two modules with the name \"%.*s\"", (int)module->name_len,
                       module->name);
    pc_status status = reserve(table, err);
    if (status != PC_OK)
        return status;
    pc_module copy = *module;
    const char *class_name = module->class_name != NULL ? module->class_name : pc_kind_name(module->kind);
    copy.name = pc_strndup(module->name, module->name_len);
    copy.class_name = pc_strndup(class_name, strlen(class_name));
    if (copy.name == NULL || copy.class_name == NULL ||
        !pc_strmap_put(&table->by_name, copy.name, copy.name_len, table->count)) {
        free_names(&copy);
        return pc_fail_nomem(err, "the module table");
    }
    if (index != NULL)
        *index = table->count;
    table->items[table->count++] = copy;
    return PC_OK;
}

pc_module *pc_module_table_find(const pc_module_table *table, const char *name, size_t len)
{
    size_t index;
    return pc_strmap_get(&table->by_name, name, len, &index) ? &table->items[index] : NULL;
}
