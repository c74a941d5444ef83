/* Gradients of LoRA. */
#include "lora.h"

#include <string.h>

/* E (rows, r) the looked up columns of A:  dB += scale · dyᵀ · E,  dA[:, id] += scale · (dy · B) of the id's rows. */
static pc_status embedding_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, double scale,
                                const pc_way_back *way, const void *dy, pc_pool *scratch, pc_error *err)
{
    const pc_module *m = call->module;
    const pc_dtype compute = call->compute;
    const int64_t r = slot->rank, dim = m->out_features, num = m->in_features, rows = call->rows;
    const int64_t *ids = way->x;
    const pc_tensor *a, *b;
    const void *b_data;
    void *looked_up, *slopes, *db;
    lora_factor_tensors(adapter, slot, false, &a, &b);
    pc_status status = pc_scratch(scratch, compute, rows, r, &looked_up, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, compute, rows, r, &slopes, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, compute, dim, r, &db, err);
    if (status == PC_OK)
        status = pc_tensor_as(call->rt, compute, adapter, b, scratch, &b_data, err);
    if (status != PC_OK)
        return status;
    lora_look_up(call, adapter, a, r, ids, looked_up);
    status = pc_gemm(call->rt, compute, true, false, dim, r, rows, scale, dy, dim, looked_up, r, 0.0, db, r, err);
    if (status == PC_OK)
        status = pc_gemm(call->rt, compute, false, false, rows, r, dim, scale, dy, dim, b_data, r, 0.0, slopes, r, err);
    if (status != PC_OK)
        return status;
    pc_target_add(call->rt, pc_tensor_target(adapter, b), compute, db, dim * r, 1.0);
    const pc_target target = pc_tensor_target(adapter, a);
    for (int64_t i = 0; i < rows && target.sum != NULL; i++) {
        if (ids[i] == call->padding_idx)
            continue;
        for (int64_t k = 0; k < r; k++)
            pc_put_double(target.dtype, target.sum, k * num + ids[i],
                          pc_get_double(target.dtype, target.sum, k * num + ids[i]) +
                              pc_get_double(compute, slopes, i * r + k));
    }
    return PC_OK;
}

/* One of the two convolutions: dx of its input to `dx` (NULL: not wanted), dw to the tensor's target. */
static pc_status one_conv_back(const pc_call *call, const pc_adapter *adapter, const pc_conv_shape *shape,
                               const void *x, const pc_tensor *w, bool frozen, const void *dy, void *dx, double scale,
                               pc_pool *scratch, pc_error *err)
{
    const int64_t count = pc_tensor_count(w);
    void *dw = NULL;
    pc_status status = PC_OK;
    const pc_target target = frozen ? (pc_target){NULL, PC_F32} : pc_tensor_target(adapter, w);
    if (target.sum != NULL) {
        status = pc_scratch(scratch, call->compute, count, 1, &dw, err);
        if (status == PC_OK)
            memset(dw, 0, (size_t)count * pc_dtype_size(call->compute));
    }
    if (status == PC_OK)
        status = pc_conv2d_back(call->rt, call->compute, shape, x, w->dtype, pc_tensor_data(adapter, w), dy, false, dx,
                                dw, err);
    if (status == PC_OK && dw != NULL)
        pc_target_add(call->rt, target, call->compute, dw, count, scale);
    return status;
}

static pc_status conv_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, double dropout,
                           double scale, const pc_way_back *way, const void *dy, bool frozen, pc_pool *scratch,
                           pc_error *err)
{
    const pc_tensor *a = pc_slot_tensor(adapter, slot, LORA_A), *b = pc_slot_tensor(adapter, slot, LORA_B);
    const int64_t pixels = pc_output_pixels(call), inputs = pc_input_count(call);
    pc_conv_shape first, second;
    lora_conv_shapes(call, slot, &first, &second);
    const void *dropped = way->x;
    void *narrow = NULL, *dnarrow, *dx = NULL;
    pc_status status = pc_scratch(scratch, call->compute, call->rows * slot->rank, pixels, &dnarrow, err);
    if (status == PC_OK && way->dx != NULL)
        status = pc_scratch(scratch, call->compute, inputs, 1, &dx, err);
    if (status == PC_OK && !frozen) {
        status = pc_drop_input(call, adapter, dropout, way->x, scratch, &dropped, err);
        if (status == PC_OK)
            status = pc_scratch(scratch, call->compute, call->rows * slot->rank, pixels, &narrow, err);
        if (status == PC_OK)
            status = pc_conv2d(call->rt, call->compute, &first, dropped, a->dtype, pc_tensor_data(adapter, a), NULL,
                               narrow, err);
    }
    if (status == PC_OK)
        status = one_conv_back(call, adapter, &second, narrow, b, frozen, dy, dnarrow, scale, scratch, err);
    if (status == PC_OK)
        status = one_conv_back(call, adapter, &first, dropped, a, frozen, dnarrow, dx, scale, scratch, err);
    if (status != PC_OK || dx == NULL)
        return status;
    pc_drop_back(call, adapter, dropout, dx);
    pc_sum_add(call->rt, call->compute, way->dx, dx, inputs, scale);
    return PC_OK;
}

pc_status lora_output_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, bool initial,
                           bool dropped, double scale, const pc_way_back *way, const void *dy, pc_pool *scratch,
                           pc_error *err)
{
    const bool frozen = initial || !adapter->trainable;
    const double dropout = dropped ? lora_dropout(adapter, call->module) : 0.0;
    if (call->module->kind == PC_EMBEDDING)
        return frozen ? PC_OK : embedding_back(call, adapter, slot, scale, way, dy, scratch, err);
    if (call->module->kind == PC_CONV2D)
        return conv_back(call, adapter, slot, dropout, scale, way, dy, frozen, scratch, err);
    pc_lowrank_back what = {.scale = scale, .dropout = dropout, .frozen = frozen};
    lora_factor_tensors(adapter, slot, initial, &what.a, &what.b);
    return pc_lowrank_way_back(call, adapter, &what, way, dy, scratch, err);
}

pc_status lora_after_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const pc_way_back *way,
                          pc_pool *scratch, pc_error *err)
{
    pc_status status = PC_OK;
    if (lora_params_of(adapter->config)->use_dora)
        return dora_after_back(call, adapter, slot, way, scratch, err);
    const pc_tensor *bias = pc_slot_tensor(adapter, slot, LORA_B_BIAS);
    if (pc_gradient_wanted(adapter, bias)) {
        const int64_t n = call->module->out_features;
        void *sums;
        status = pc_scratch(scratch, call->compute, n, 1, &sums, err);
        if (status != PC_OK)
            return status;
        memset(sums, 0, (size_t)n * pc_dtype_size(call->compute));
        pc_sum_output(call, way->dy, NULL, slot->scaling, sums);
        pc_target_add(call->rt, pc_tensor_target(adapter, bias), call->compute, sums, n, 1.0);
    }
    status = lora_output_back(call, adapter, slot, false, true, slot->scaling, way, way->dy, scratch, err);
    if (status == PC_OK && pc_slot_tensor(adapter, slot, LORA_INITIAL_A) != NULL)
        status = lora_output_back(call, adapter, slot, true, false, -slot->scaling, way, way->dy, scratch, err);
    return status;
}
