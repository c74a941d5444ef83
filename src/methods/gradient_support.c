/* What the methods' ways back share. */
#include "support.h"

#include <string.h>

#include "../kernels/lowrank.h"

void pc_sum_output(const pc_call *call, const void *a, const void *b, double scale, void *sums)
{
    const int64_t out = call->module->out_features, pixels = pc_output_pixels(call);
    if (call->module->kind != PC_CONV2D) {
        pc_sum_rows(call->rt, call->compute, call->rows, out, a, b, scale, sums);
        return;
    }
    for (int64_t i = 0; i < call->rows; i++) {
        const int64_t at = i * out * pixels;
        pc_sum_columns(call->rt, call->compute, out, pixels, pc_at_const(call->compute, a, at),
                       b != NULL ? pc_at_const(call->compute, b, at) : NULL, scale, sums);
    }
}

void pc_target_add(pc_runtime *rt, pc_target target, pc_dtype compute, const void *values, int64_t n, double scale)
{
    if (target.sum == NULL)
        return;
    if (target.dtype == compute) {
        pc_add(rt, compute, n, values, scale, target.sum);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        pc_put_double(target.dtype, target.sum, i,
                      pc_get_double(target.dtype, target.sum, i) + scale * pc_get_double(compute, values, i));
}

pc_target pc_tensor_target(const pc_adapter *adapter, const pc_tensor *tensor)
{
    if (tensor == NULL)
        return (pc_target){NULL, PC_F32};
    return (pc_target){pc_gradient_sum(adapter, tensor), pc_gradient_dtype(tensor)};
}

void pc_sum_add(pc_runtime *rt, pc_dtype compute, pc_sum *dx, const void *values, int64_t n, double scale)
{
    if (!dx->filled)
        memset(dx->data, 0, (size_t)n * pc_dtype_size(compute));
    dx->filled = true;
    pc_add(rt, compute, n, values, scale, dx->data);
}

/* Gradients of the factors: dA (r,k), dB (n,r), dE (r). */
static pc_status factor_gradients(const pc_call *call, const pc_adapter *adapter, const pc_lowrank_back *what,
                                  const pc_lowrank_term *term, const void *dropped, const void *dy, pc_pool *scratch,
                                  pc_error *err)
{
    const pc_module *m = call->module;
    const int64_t n = m->out_features, k = m->in_features;
    const pc_tensor *tensors[3] = {what->a, what->b, what->e};
    void *made[3] = {NULL, NULL, NULL};
    pc_status status = PC_OK;
    bool any = false;
    for (int i = 0; i < 3 && status == PC_OK; i++) {
        if (!pc_gradient_wanted(adapter, tensors[i]))
            continue;
        any = true;
        status = pc_scratch(scratch, call->compute, pc_tensor_count(tensors[i]), 1, &made[i], err);
    }
    if (status != PC_OK || !any)
        return status;
    status = pc_lowrank_backward(call->rt, call->compute, call->rows, n, k, dy, n, dropped, k, term, NULL, NULL, 0, NULL, k, made[0],
                                 made[1], made[2], err);
    for (int i = 0; i < 3 && status == PC_OK; i++)
        if (made[i] != NULL)
            pc_target_add(call->rt, pc_tensor_target(adapter, tensors[i]), call->compute, made[i],
                          pc_tensor_count(tensors[i]), 1.0);
    return status;
}

/* scale · (dy · B ⊙ e) · A: added to way->dx, or when dropout is still to come put into *part, which is way->dx's own
 * memory if that is empty. */
static pc_status input_gradient(const pc_call *call, const pc_lowrank_back *what, const pc_lowrank_term *term,
                                const pc_way_back *way, const void *dy, bool drops, pc_pool *scratch, void **part,
                                pc_error *err)
{
    const int64_t rows = call->rows, n = call->module->out_features, k = call->module->in_features;
    void *u, *to = way->dx->data;
    pc_status status = pc_scratch(scratch, call->compute, rows, term->r, &u, err);
    if (status == PC_OK && drops && way->dx->filled)
        status = pc_scratch(scratch, call->compute, rows, k, &to, err);
    if (status == PC_OK)
        status = pc_gemm(call->rt, call->compute, false, false, rows, term->r, n, what->scale, dy, n, term->b, term->r,
                         0.0, u, term->r, err);
    if (status != PC_OK)
        return status;
    if (term->e != NULL)
        pc_scale_columns(call->rt, call->compute, rows, term->r, u, call->compute, term->e, u);
    if (drops)
        *part = to;
    return pc_gemm(call->rt, call->compute, false, false, rows, k, term->r, 1.0, u, term->r, term->a, k,
                   !drops && way->dx->filled ? 1.0 : 0.0, to, k, err);
}

pc_status pc_lowrank_way_back(const pc_call *call, const pc_adapter *adapter, const pc_lowrank_back *what,
                              const pc_way_back *way, const void *dy, pc_pool *scratch, pc_error *err)
{
    const pc_module *m = call->module;
    const pc_dtype compute = call->compute;
    const int64_t rows = call->rows, n = m->out_features, k = m->in_features;
    const void *dropped;
    pc_lowrank_term term = {.r = pc_tensor_count(what->a) / (k != 0 ? k : 1), .scale = what->scale};
    if (rows == 0 || n == 0 || k == 0 || term.r == 0)
        return PC_OK;
    pc_status status = pc_tensor_as(call->rt, compute, adapter, what->a, scratch, &term.a, err);
    if (status == PC_OK)
        status = pc_tensor_as(call->rt, compute, adapter, what->b, scratch, &term.b, err);
    if (status == PC_OK && what->e != NULL)
        status = pc_tensor_as(call->rt, compute, adapter, what->e, scratch, &term.e, err);
    const bool drops = call->training && what->dropout > 0.0;
    void *part = NULL; /* the gradient of the dropped-out input */
    if (status == PC_OK && way->dx != NULL)
        status = input_gradient(call, what, &term, way, dy, drops, scratch, &part, err);
    if (status == PC_OK && (drops || !what->frozen))
        status = pc_drop_both(call, adapter, what->dropout, what->frozen ? NULL : way->x, part, scratch, &dropped, err);
    if (status == PC_OK && part != NULL && part != way->dx->data)
        pc_add(call->rt, compute, rows * k, part, 1.0, way->dx->data);
    if (status == PC_OK && way->dx != NULL)
        way->dx->filled = true;
    if (status == PC_OK && !what->frozen)
        status = factor_gradients(call, adapter, what, &term, dropped, dy, scratch, err);
    return status;
}
