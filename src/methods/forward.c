/* Running a module with everything that is active on it.
 *
 * The active adapters a1 … an wrap the base operation like layers of an onion,
 * a1 innermost:  x goes through before(an) … before(a1), the base operation,
 * then after(a1) … after(an).  Each `after` gets the x that its adapter saw. */
#include "support.h"

#include <string.h>


#define NESTED_ON_STACK 16

/* Does a merged weight stand for the adapters of this module? */
static bool is_merged(const pc_activation *activation, int32_t module)
{
    const pc_merged *merged = activation->merged;
    return merged != NULL && (size_t)module < merged->module_count && merged->weight[module] != NULL;
}

/* What stands in for the module's own weight and bias. */
typedef struct stand_in {
    const void *weight, *bias; /* NULL: its own */
    pc_dtype weight_dtype, bias_dtype;
} stand_in;

static void from_adapters(const pc_activation *activation, int32_t module_index, stand_in *s)
{
    for (size_t i = 0; i < activation->count; i++) {
        const pc_adapter *adapter = activation->adapters[i];
        if (!adapter->has_saved_modules && !adapter->has_base_copies)
            continue;
        const pc_slot *slot = pc_adapter_slot(adapter, module_index);
        if (slot == NULL)
            continue;
        const pc_tensor *tensor;
        if ((slot->replaces && (tensor = pc_slot_tensor(adapter, slot, PC_ROLE_SAVED_WEIGHT)) != NULL) ||
            (!slot->subtracts && (tensor = pc_slot_tensor(adapter, slot, PC_ROLE_BASE_WEIGHT)) != NULL)) {
            s->weight = pc_tensor_data(adapter, tensor);
            s->weight_dtype = tensor->dtype;
        }
        if ((slot->replaces && (tensor = pc_slot_tensor(adapter, slot, PC_ROLE_SAVED_BIAS)) != NULL) ||
            (tensor = pc_slot_tensor(adapter, slot, PC_ROLE_BASE_BIAS)) != NULL) {
            s->bias = pc_tensor_data(adapter, tensor);
            s->bias_dtype = tensor->dtype;
        }
    }
}

static void from_merged(const pc_merged *merged, int32_t module_index, stand_in *s)
{
    if (merged == NULL || (size_t)module_index >= merged->module_count)
        return;
    if (merged->weight[module_index] != NULL) {
        s->weight = merged->weight[module_index];
        s->weight_dtype = merged->dtype[module_index];
    }
    if (merged->bias[module_index] != NULL) {
        s->bias = merged->bias[module_index];
        s->bias_dtype = merged->dtype[module_index];
    }
}

pc_status pc_effective_weights(const pc_activation *activation, int32_t module_index, pc_module *module, pc_error *err)
{
    if (activation == NULL || !activation->enabled || module_index < 0)
        return PC_OK;
    stand_in s = {0};
    from_adapters(activation, module_index, &s);
    from_merged(activation->merged, module_index, &s);
    if (s.weight == NULL && s.bias == NULL)
        return PC_OK;
    if (s.weight == NULL) {
        s.weight = module->weight;
        s.weight_dtype = module->dtype;
    }
    if (s.bias == NULL) {
        s.bias = module->bias;
        s.bias_dtype = module->dtype;
    }
    if (s.bias != NULL && s.bias_dtype != s.weight_dtype)
        return pc_fail(err, PC_ERR_VALUE,
                       "module %s was converted while an adapter held its weight or its bias: one is %s now and the "
                       "other %s; convert it back, or unmerge or delete the adapter first",
                       module->name != NULL ? module->name : "?", pc_dtype_get(s.weight_dtype)->name,
                       pc_dtype_get(s.bias_dtype)->name);
    module->weight = s.weight;
    module->bias = s.bias;
    module->dtype = s.weight_dtype;
    return PC_OK;
}

pc_status pc_base_forward(const pc_call *call, const void *x, void *y, pc_pool *scratch, pc_error *err)
{
    const pc_module *m = call->module;
    (void)scratch;
    pc_status status = pc_need_weight(m, err);
    if (status != PC_OK)
        return status;
    switch (m->kind) {
    case PC_LINEAR:
        return pc_linear(call->rt, call->compute, call->rows, m->out_features, m->in_features, x, m->dtype, m->weight,
                         m->bias, PC_ACT_NONE, y, err);
    case PC_CONV1D:
        return pc_linear_t(call->rt, call->compute, call->rows, m->out_features, m->in_features, x, m->dtype,
                           m->weight, m->bias, PC_ACT_NONE, y, err);
    case PC_CONV2D: {
        pc_conv_shape shape = pc_call_conv(call);
        return pc_conv2d(call->rt, call->compute, &shape, x, m->dtype, m->weight, m->bias, y, err);
    }
    case PC_EMBEDDING:
        pc_gather_rows(call->rt, call->compute, call->rows, m->out_features, x, m->dtype, m->weight, y);
        return PC_OK;
    case PC_CONV_ALONG_1: /* of hosts that compute themselves */
    case PC_CONV_ALONG_3:
    case PC_ATTENTION:
    case PC_LAYERNORM:
    case PC_RMSNORM:
    case PC_CONTAINER:
        break;
    }
    return pc_fail(err, PC_ERR_RUNTIME, "module %s (%s) has no base operation that adapters can wrap",
                   m->name != NULL ? m->name : "?", pc_kind_name(m->kind));
}

size_t pc_list_nested(const pc_activation *activation, int32_t module, const pc_adapter **list)
{
    size_t count = 0;
    if (module < 0 || is_merged(activation, module))
        return 0;
    for (size_t i = 0; i < activation->count; i++) {
        const pc_slot *slot = pc_adapter_slot(activation->adapters[i], module);
        if (slot != NULL && slot->adapts)
            list[count++] = activation->adapters[i];
    }
    return count;
}

/* A copy of the running result, where the way back needs it. */
static pc_status keep_result(const pc_call *call, const pc_adapter *adapter, pc_kept *kept, size_t i, const void *y,
                             pc_error *err)
{
    const pc_slot *slot = pc_adapter_slot(adapter, call->module_index);
    if (kept == NULL || adapter->method->keeps_result == NULL || !adapter->method->keeps_result(adapter, slot))
        return PC_OK;
    const int64_t out = call->rows * call->module->out_features, pixels = pc_output_pixels(call);
    pc_status status = pc_scratch(&kept->pool, call->compute, out, pixels, &kept->results[i], err);
    if (status == PC_OK)
        memcpy(kept->results[i], y, (size_t)(out * pixels) * pc_dtype_size(call->compute));
    return status;
}

static pc_status run_nested(const pc_call *call, const pc_adapter *const *list, const void **seen, size_t count,
                            const void *x, void *y, pc_kept *kept, pc_pool *scratch, pc_error *err)
{
    pc_status status = PC_OK;
    for (size_t i = count; i-- > 0 && status == PC_OK;) {
        seen[i] = x;
        if (list[i]->method->before != NULL)
            status = list[i]->method->before(call, list[i], pc_adapter_slot(list[i], call->module_index), &x, scratch,
                                             err);
    }
    if (status == PC_OK)
        status = pc_base_forward(call, x, y, scratch, err);
    for (size_t i = 0; i < count && status == PC_OK; i++) {
        status = keep_result(call, list[i], kept, i, y, err);
        if (status == PC_OK && list[i]->method->after != NULL)
            status = list[i]->method->after(call, list[i], pc_adapter_slot(list[i], call->module_index), seen[i], y,
                                            scratch, err);
    }
    return status;
}

pc_status pc_forward(const pc_call *outer, const pc_activation *activation, const void *x, void *y, pc_error *err)
{
    return pc_forward_keeping(outer, activation, x, y, NULL, err);
}

pc_status pc_forward_keeping(const pc_call *outer, const pc_activation *activation, const void *x, void *y,
                             pc_kept *kept, pc_error *err)
{
    if (activation == NULL || !activation->enabled || (activation->count == 0 && activation->merged == NULL))
        return pc_base_forward(outer, x, y, NULL, err);
    pc_module module = *outer->module;
    pc_status status = pc_effective_weights(activation, outer->module_index, &module, err);
    if (status != PC_OK)
        return status;
    pc_call call = *outer;
    call.module = &module;

    const pc_adapter *list_stack[NESTED_ON_STACK], **list = list_stack;
    const void *seen_stack[NESTED_ON_STACK], **seen = seen_stack;
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    if (activation->count > NESTED_ON_STACK) {
        list = pc_pool_array(&scratch, activation->count, sizeof *list);
        seen = pc_pool_array(&scratch, activation->count, sizeof *seen);
    }
    status = list != NULL && seen != NULL ? PC_OK : pc_fail_nomem(err, "the list of active adapters");
    if (status == PC_OK) {
        size_t count = pc_list_nested(activation, outer->module_index, list);
        if (kept != NULL && count != 0) {
            kept->count = count;
            kept->results = pc_pool_array(&kept->pool, count, sizeof *kept->results);
        }
        if (kept != NULL && count != 0 && kept->results == NULL)
            status = pc_fail_nomem(err, "the list of kept results");
        for (size_t i = 0; kept != NULL && kept->results != NULL && i < count; i++)
            kept->results[i] = NULL;
        if (status == PC_OK)
            status = run_nested(&call, list, seen, count, x, y, kept, &scratch, err);
    }
    pc_pool_free(&scratch);
    return status;
}
