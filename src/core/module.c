#include "module.h"

#include <string.h>

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
    pc_pool_init_scratch(&table->names);
}

void pc_module_table_free(pc_module_table *table)
{
    pc_strmap_free(&table->by_name);
    pc_pool_free(&table->names);
    pc_free(table->items);
    pc_module_table_init(table);
}

static pc_status grow(pc_module_table *table, size_t capacity, pc_error *err)
{
    size_t bytes;
    if (capacity > INT32_MAX) /* module indices are int32_t */
        return pc_fail(err, PC_ERR_VALUE, "a model with more than %d modules is not supported", INT32_MAX);
    pc_module *items = pc_mul_size(capacity, sizeof *items, &bytes) ? pc_realloc(table->items, bytes) : NULL;
    if (items == NULL)
        return pc_fail_nomem(err, "the module table");
    table->items = items;
    table->capacity = capacity;
    return PC_OK;
}

pc_status pc_module_table_reserve(pc_module_table *table, size_t more, pc_error *err)
{
    size_t count;
    if (!pc_add_size(table->count, more, &count))
        return pc_fail_nomem(err, "the module table");
    pc_status status = count > table->capacity ? grow(table, count, err) : PC_OK;
    if (status == PC_OK && !pc_strmap_reserve(&table->by_name, count))
        return pc_fail_nomem(err, "the module table");
    return status;
}

/* The class's name in the table's own memory: neighbours often have the same. */
static const char *keep_class_name(pc_module_table *table, const char *name)
{
    const pc_module *last = table->count != 0 ? &table->items[table->count - 1] : NULL;
    if (last != NULL && strcmp(last->class_name, name) == 0)
        return last->class_name;
    return pc_pool_strndup(&table->names, name, strlen(name));
}

pc_status pc_module_table_add(pc_module_table *table, const pc_module *module, size_t *index, pc_error *err)
{
    if (pc_module_table_find(table, module->name, module->name_len) != NULL)
        return pc_fail(err, PC_ERR_VALUE, "the model has two modules with the name \"%.*s\"", (int)module->name_len,
                       module->name);
    pc_status status = PC_OK;
    if (table->count == table->capacity)
        status = grow(table, table->capacity != 0 ? table->capacity * 2 : 64, err);
    if (status != PC_OK)
        return status;
    pc_module copy = *module;
    copy.name = pc_pool_strndup(&table->names, module->name, module->name_len);
    copy.class_name = keep_class_name(table, module->class_name != NULL ? module->class_name : pc_kind_name(module->kind));
    if (copy.name == NULL || copy.class_name == NULL ||
        !pc_strmap_put(&table->by_name, copy.name, copy.name_len, table->count))
        return pc_fail_nomem(err, "the module table");
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
