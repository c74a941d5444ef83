/* The way back through a module's call: forward.c's onion from the outside in, then from the inside out.
 *
 * dy goes through after(an) … after(a1); what is left of it is the base operation's.  Its gradient with respect to the
 * input then goes through before(a1) … before(an), and what each adapter's `after` sent to the input that it saw joins
 * on the way. */
#include "support.h"

#include <string.h>

bool pc_learns(const pc_activation *activation, int32_t module_index, bool own_weight, bool *needs_x)
{
    bool learns = own_weight;
    *needs_x = own_weight;
    if (activation == NULL || !activation->enabled || module_index < 0)
        return learns;
    const pc_merged *m = activation->merged;
    const bool merged = m != NULL && (size_t)module_index < m->module_count && m->weight[module_index] != NULL;
    for (size_t i = 0; i < activation->count; i++) {
        const pc_adapter *adapter = activation->adapters[i];
        const pc_slot *slot = pc_adapter_slot(adapter, module_index);
        if (slot == NULL)
            continue;
        *needs_x = *needs_x || (slot->feedforward && adapter->method->before != NULL);
        if (!adapter->trainable)
            continue;
        for (int32_t t = 0; t < slot->tensor_count; t++) {
            const pc_tensor *tensor = &adapter->tensors[slot->first_tensor + t];
            if (!tensor->trainable || (merged && tensor->role < PC_ROLE_BASE_BIAS)) /* merged weights stand for those */
                continue;
            learns = true;
            if (tensor->role != PC_ROLE_BASE_BIAS && tensor->role != PC_ROLE_SAVED_BIAS)
                *needs_x = true;
        }
    }
    return learns;
}

/* The targets of the weight and the bias in effect: the same walk as pc_effective_weights, for gradients. */
static void effective_targets(const pc_activation *activation, int32_t module_index, pc_target *weight, pc_target *bias)
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
            (!slot->subtracts && (tensor = pc_slot_tensor(adapter, slot, PC_ROLE_BASE_WEIGHT)) != NULL))
            *weight = pc_tensor_target(adapter, tensor);
        if ((slot->replaces && (tensor = pc_slot_tensor(adapter, slot, PC_ROLE_SAVED_BIAS)) != NULL) ||
            (tensor = pc_slot_tensor(adapter, slot, PC_ROLE_BASE_BIAS)) != NULL)
            *bias = pc_tensor_target(adapter, tensor);
    }
    const pc_merged *merged = activation->merged;
    if (merged == NULL || (size_t)module_index >= merged->module_count)
        return;
    if (merged->weight[module_index] != NULL) /* folded in: what they were made from cannot be told apart */
        weight->sum = NULL;
    if (merged->bias[module_index] != NULL)
        bias->sum = NULL;
}

void pc_effective_targets(const pc_activation *activation, int32_t module_index, pc_target *weight, pc_target *bias)
{
    if (activation != NULL && activation->enabled && module_index >= 0)
        effective_targets(activation, module_index, weight, bias);
}

/* ------------------------------------------------------------- base operation */

/* A zeroed buffer to add a weight's gradient up in when the target has another dtype; else the target itself. */
static pc_status start_sum(const pc_call *call, pc_target target, int64_t n, pc_pool *scratch, void **sum, pc_error *err)
{
    *sum = target.sum;
    if (target.sum == NULL || target.dtype == call->compute)
        return PC_OK;
    pc_status status = pc_scratch(scratch, call->compute, n, 1, sum, err);
    if (status == PC_OK)
        memset(*sum, 0, (size_t)n * pc_dtype_size(call->compute));
    return status;
}

static void finish_sum(const pc_call *call, pc_target target, const void *sum, int64_t n)
{
    if (sum != target.sum)
        pc_target_add(call->rt, target, call->compute, sum, n, 1.0);
}

pc_status pc_base_backward(const pc_call *call, const void *x, const void *dy, pc_sum *dx, pc_target weight,
                           pc_target bias, pc_pool *scratch, pc_error *err)
{
    const pc_module *m = call->module;
    const pc_dtype compute = call->compute;
    const int64_t in = m->in_features, out = m->out_features, rows = call->rows, count = pc_module_weight_count(m);
    void *dw, *db;
    pc_status status = pc_need_weight(m, err);
    if (status == PC_OK)
        status = start_sum(call, weight, count, scratch, &dw, err);
    if (status == PC_OK)
        status = start_sum(call, bias, out, scratch, &db, err);
    if (status != PC_OK)
        return status;
    if (db != NULL && m->bias != NULL)
        pc_sum_output(call, dy, NULL, 1.0, db);
    switch (m->kind) {
    case PC_LINEAR:
    case PC_CONV1D: {
        const bool turned = m->kind == PC_CONV1D;
        if (dw != NULL)
            status = pc_linear_dw(call->rt, compute, turned, rows, out, in, dy, x, dw, err);
        if (status == PC_OK && dx != NULL)
            status = pc_linear_dx(call->rt, compute, turned, dx->filled, rows, out, in, dy, m->dtype, m->weight,
                                  dx->data, err);
        break;
    }
    case PC_CONV2D: {
        const pc_conv_shape shape = pc_call_conv(call);
        if (dw != NULL || dx != NULL)
            status = pc_conv2d_back(call->rt, compute, &shape, x, m->dtype, m->weight, dy, dx != NULL && dx->filled,
                                    dx != NULL ? dx->data : NULL, dw, err);
        break;
    }
    case PC_EMBEDDING:
        if (dw != NULL)
            pc_scatter_rows(compute, rows, out, x, call->padding_idx, dy, dw);
        break;
    case PC_CONV_ALONG_1: /* of hosts that compute themselves */
    case PC_CONV_ALONG_3:
    case PC_ATTENTION:
    case PC_LAYERNORM:
    case PC_RMSNORM:
    case PC_CONTAINER:
        return pc_fail(err, PC_ERR_RUNTIME, "module %s (%s) has no base operation that adapters can wrap",
                       m->name != NULL ? m->name : "?", pc_kind_name(m->kind));
    }
    if (status != PC_OK)
        return status;
    if (dx != NULL)
        dx->filled = true;
    finish_sum(call, weight, dw, count);
    finish_sum(call, bias, db, out);
    return PC_OK;
}

/* --------------------------------------------------------------- the adapters */

typedef struct nested {
    const pc_adapter **list;
    const void **seen; /* the input that each adapter saw */
    pc_sum *dx;        /* what its `after` sends there; all the same one when no `before` is on the way */
    size_t count;
    const void *x;      /* the base operation's input */
    bool changes_input; /* some `before` does something */
} nested;

static pc_status list_adapters(const pc_call *call, const pc_activation *activation, const void *x, nested *n,
                               pc_pool *scratch, pc_error *err)
{
    const size_t most = activation->count;
    n->list = pc_pool_array(scratch, most, sizeof *n->list);
    n->seen = pc_pool_array(scratch, most, sizeof *n->seen);
    n->dx = pc_pool_array(scratch, most, sizeof *n->dx);
    if (n->list == NULL || n->seen == NULL || n->dx == NULL)
        return pc_fail_nomem(err, "the list of active adapters");
    n->count = pc_list_nested(activation, call->module_index, n->list);
    n->x = x;
    pc_status status = PC_OK;
    for (size_t i = n->count; i-- > 0 && status == PC_OK && x != NULL;) {
        n->seen[i] = n->x;
        if (n->list[i]->method->before != NULL)
            status = n->list[i]->method->before(call, n->list[i], pc_adapter_slot(n->list[i], call->module_index), &n->x,
                                                scratch, err);
    }
    n->changes_input = n->x != x;
    for (size_t i = 0; i < n->count; i++)
        n->dx[i] = (pc_sum){0};
    return status;
}

static pc_status through_after(const pc_call *call, const nested *n, const pc_kept *kept, void *dy, pc_sum *dx,
                               pc_target bias, pc_pool *scratch, pc_error *err)
{
    pc_status status = PC_OK;
    const int64_t inputs = pc_input_count(call);
    for (size_t i = n->count; i-- > 0 && status == PC_OK;) {
        const pc_adapter *adapter = n->list[i];
        if (adapter->method->after_back == NULL)
            continue;
        pc_way_back way = {.x = n->seen[i], .dy = dy, .dx = dx, .bias = bias};
        if (kept->results != NULL && i < kept->count)
            way.kept = kept->results[i];
        if (dx != NULL && n->changes_input) {
            way.dx = &n->dx[i];
            status = pc_scratch(scratch, call->compute, inputs, 1, &n->dx[i].data, err);
        }
        if (status == PC_OK)
            status = adapter->method->after_back(call, adapter, pc_adapter_slot(adapter, call->module_index), &way,
                                                 scratch, err);
    }
    return status;
}

/* `inner` is the gradient of the base operation's input. */
static pc_status through_before(const pc_call *call, const nested *n, void *inner, pc_pool *scratch, pc_error *err)
{
    pc_status status = PC_OK;
    for (size_t i = 0; i < n->count && status == PC_OK; i++) {
        const pc_adapter *adapter = n->list[i];
        if (adapter->method->before_back != NULL)
            status = adapter->method->before_back(call, adapter, pc_adapter_slot(adapter, call->module_index),
                                                  n->seen[i], inner, scratch, err);
        if (status == PC_OK && n->dx[i].filled)
            pc_add(call->rt, call->compute, pc_input_count(call), n->dx[i].data, 1.0, inner);
    }
    return status;
}

/* An inner gradient is needed for the factors of `before` even when nobody asks for dx. */
static pc_status run_back(const pc_call *call, const nested *n, const pc_kept *kept, void *dy, pc_sum *dx,
                          pc_target weight, pc_target bias, pc_pool *scratch, pc_error *err)
{
    pc_status status = through_after(call, n, kept, dy, dx, bias, scratch, err);
    if (status != PC_OK)
        return status;
    if (!n->changes_input)
        return pc_base_backward(call, n->x, dy, dx, weight, bias, scratch, err);
    pc_sum inner = {0};
    status = pc_scratch(scratch, call->compute, pc_input_count(call), 1, &inner.data, err);
    if (status == PC_OK)
        status = pc_base_backward(call, n->x, dy, &inner, weight, bias, scratch, err);
    if (status == PC_OK)
        status = through_before(call, n, inner.data, scratch, err);
    if (status == PC_OK && dx != NULL)
        pc_sum_add(call->rt, call->compute, dx, inner.data, pc_input_count(call), 1.0);
    return status;
}

pc_status pc_backward(const pc_call *outer, const pc_activation *activation, const pc_kept *kept, const void *x,
                      void *dy, pc_sum *dx, pc_target weight, pc_target bias, pc_error *err)
{
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    pc_call call = *outer;
    pc_module module = *outer->module;
    nested n = {0};
    pc_status status = PC_OK;
    call.module = &module;
    n.x = x;
    if (activation != NULL && activation->enabled) {
        status = pc_effective_weights(activation, call.module_index, &module, err);
        pc_effective_targets(activation, call.module_index, &weight, &bias);
        if (status == PC_OK)
            status = list_adapters(&call, activation, x, &n, &scratch, err);
    }
    if (status == PC_OK)
        status = run_back(&call, &n, kept, dy, dx, weight, bias, &scratch, err);
    pc_pool_free(&scratch);
    return status;
}
