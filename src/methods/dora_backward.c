/* Gradients of DoRA.  The norm counts as a constant, as in the paper (section 4.3) and in PEFT. */
#include "lora.h"

#include <string.h>

/* The gradient of the magnitudes: Σ dy ⊙ u / norm for the scaled part u of the result. */
static pc_status magnitude_gradient(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *u,
                                    const void *dy, const void *norms, pc_pool *scratch, pc_error *err)
{
    const pc_tensor *magnitude = pc_slot_tensor(adapter, slot, LORA_MAGNITUDE);
    const int64_t n = call->module->out_features;
    void *sums;
    if (!pc_gradient_wanted(adapter, magnitude))
        return PC_OK;
    pc_status status = pc_scratch(scratch, call->compute, n, 1, &sums, err);
    if (status != PC_OK)
        return status;
    memset(sums, 0, (size_t)n * pc_dtype_size(call->compute));
    pc_sum_output(call, dy, u, 1.0, sums);
    for (int64_t i = 0; i < n; i++)
        pc_put_double(call->compute, sums, i,
                      pc_get_double(call->compute, sums, i) / pc_get_double(call->compute, norms, i));
    pc_target_add(call->rt, pc_tensor_target(adapter, magnitude), call->compute, sums, n, 1.0);
    return PC_OK;
}

/* Without dropout: y = f ⊙ u + b with u = (kept − b) + s·B·A·x, less pissa's and olora's initial product. */
static pc_status plain_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot,
                            const pc_way_back *way, pc_pool *scratch, pc_error *err)
{
    const pc_module *m = call->module;
    const int64_t n = call->rows * m->out_features * pc_output_pixels(call);
    const bool initial = pc_slot_tensor(adapter, slot, LORA_INITIAL_A) != NULL;
    void *factors, *norms, *u, *bias;
    pc_status status = dora_factors(call, adapter, slot, scratch, &factors, &norms, err);
    if (status == PC_OK && way->kept != NULL) {
        status = pc_scratch(scratch, call->compute, n, 1, &u, err);
        if (status != PC_OK)
            return status;
        memcpy(u, way->kept, (size_t)n * pc_dtype_size(call->compute));
        if (m->bias != NULL)
            pc_add_output(call, m->dtype, m->bias, -1.0, u);
        if (initial)
            status = lora_add_output(call, adapter, slot, true, way->x, -slot->scaling, u, scratch, err);
        if (status == PC_OK)
            status = lora_add_output(call, adapter, slot, false, way->x, slot->scaling, u, scratch, err);
        if (status == PC_OK)
            status = magnitude_gradient(call, adapter, slot, u, way->dy, norms, scratch, err);
    }
    if (status == PC_OK)
        status = pc_scratch(scratch, call->compute, m->out_features, 1, &bias, err);
    if (status != PC_OK)
        return status;
    /* The bias is not scaled; what the base operation finds for it is, so the rest is added here. */
    const bool trains_bias = way->bias.sum != NULL && m->bias != NULL;
    memset(bias, 0, (size_t)m->out_features * pc_dtype_size(call->compute));
    if (trains_bias)
        pc_sum_output(call, way->dy, NULL, 1.0, bias);
    pc_scale_output(call, call->compute, factors, way->dy);
    if (trains_bias) {
        pc_sum_output(call, way->dy, NULL, -1.0, bias);
        pc_target_add(call->rt, way->bias, call->compute, bias, m->out_features, 1.0);
    }
    status = lora_output_back(call, adapter, slot, false, false, slot->scaling, way, way->dy, scratch, err);
    if (status == PC_OK && initial)
        status = lora_output_back(call, adapter, slot, true, false, -slot->scaling, way, way->dy, scratch, err);
    return status;
}

/* With dropout: y = kept − s·init(x) − v + f ⊙ (v + s·B·A·d) for the dropped-out input d, v = W·d − s·init(d). */
static pc_status dropped_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot,
                              const pc_way_back *way, pc_pool *scratch, pc_error *err)
{
    const int64_t n = call->rows * call->module->out_features * pc_output_pixels(call), inputs = pc_input_count(call);
    const bool initial = pc_slot_tensor(adapter, slot, LORA_INITIAL_A) != NULL;
    const double dropout = lora_dropout(adapter, call->module);
    const pc_target none = {NULL, PC_F32};
    pc_module without_bias = *call->module;
    without_bias.bias = NULL;
    pc_call base = *call;
    base.module = &without_bias;
    const void *dropped = NULL;
    void *factors, *norms, *u, *scaled;
    pc_status status = dora_factors(call, adapter, slot, scratch, &factors, &norms, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, call->compute, n, 1, &scaled, err);
    if (status == PC_OK && adapter->trainable) {
        status = pc_drop_input(call, adapter, dropout, way->x, scratch, &dropped, err);
        if (status == PC_OK)
            status = pc_scratch(scratch, call->compute, n, 1, &u, err);
        if (status == PC_OK)
            status = pc_base_forward(&base, dropped, u, scratch, err);
        if (status == PC_OK && initial)
            status = lora_add_output(call, adapter, slot, true, dropped, -slot->scaling, u, scratch, err);
        if (status == PC_OK)
            status = lora_add_output(call, adapter, slot, false, dropped, slot->scaling, u, scratch, err);
        if (status == PC_OK)
            status = magnitude_gradient(call, adapter, slot, u, way->dy, norms, scratch, err);
    }
    if (status != PC_OK)
        return status;
    memcpy(scaled, way->dy, (size_t)n * pc_dtype_size(call->compute));
    pc_scale_output(call, call->compute, factors, scaled); /* f ⊙ dy */
    status = lora_output_back(call, adapter, slot, false, true, slot->scaling, way, scaled, scratch, err);
    pc_add(call->rt, call->compute, n, way->dy, -1.0, scaled); /* (f − 1) ⊙ dy, the gradient of v */
    if (status == PC_OK && initial)
        status = lora_output_back(call, adapter, slot, true, true, -slot->scaling, way, scaled, scratch, err);
    if (status == PC_OK && initial)
        status = lora_output_back(call, adapter, slot, true, false, -slot->scaling, way, way->dy, scratch, err);
    if (status != PC_OK || way->dx == NULL)
        return status;
    pc_sum dd = {0};
    status = pc_scratch(scratch, call->compute, inputs, 1, &dd.data, err);
    if (status == PC_OK)
        status = pc_base_backward(&base, dropped, scaled, &dd, none, none, scratch, err);
    if (status != PC_OK)
        return status;
    pc_drop_back(call, adapter, dropout, dd.data);
    pc_sum_add(call->rt, call->compute, way->dx, dd.data, inputs, 1.0);
    return PC_OK;
}

pc_status dora_after_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const pc_way_back *way,
                          pc_pool *scratch, pc_error *err)
{
    if (call->training && lora_dropout(adapter, call->module) > 0.0)
        return dropped_back(call, adapter, slot, way, scratch, err);
    return plain_back(call, adapter, slot, way, scratch, err);
}
