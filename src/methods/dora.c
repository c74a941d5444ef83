/* DoRA (Liu et al. 2024): the adapted weight's rows keep a learned length.
 *
 *     W' = m / ‖W + s·B·A‖ · (W + s·B·A)
 *
 * with one length per output feature.  The norm follows A and B, which a user
 * may change at any time through their arrays, so it is computed anew in every
 * call, in blocks that stay in the cache. */
#include "lora.h"

#include <math.h>
#include <string.h>

#define BLOCK_ROWS 64

/* Are the output features the columns of the module's weight? */
static bool outputs_are_columns(const pc_module *m) { return m->kind == PC_CONV1D || m->kind == PC_EMBEDDING; }

/* Add the squares of a block (rows, columns) to squares: per row (the first being `first`), or per column. */
static void add_squares(pc_dtype compute, const void *block, int64_t rows, int64_t columns, bool per_column,
                        int64_t first, double *squares)
{
    for (int64_t i = 0; i < rows; i++) {
        double sum = 0.0;
        for (int64_t j = 0; j < columns; j++) {
            double v = compute == PC_F64 ? ((const double *)block)[i * columns + j]
                                         : (double)((const float *)block)[i * columns + j];
            if (per_column)
                squares[j] += v * v;
            else
                sum += v * v;
        }
        if (!per_column)
            squares[first + i] += sum;
    }
}

/* block (rows, columns) of the weight += scale · the same block of B·A. */
static pc_status add_block(pc_runtime *rt, const pc_module *m, pc_dtype compute, const lora_factors *f, double scale,
                           int64_t first, int64_t rows, void *block, pc_error *err)
{
    if (f->a == NULL)
        return PC_OK;
    if (outputs_are_columns(m))
        return pc_gemm(rt, compute, true, true, rows, f->b_rows, f->r, scale, pc_at_const(compute, f->a, first),
                       f->a_columns, f->b, f->r, 1.0, block, f->b_rows, err);
    return pc_gemm(rt, compute, false, false, rows, f->a_columns, f->r, scale,
                   pc_at_const(compute, f->b, first * f->r), f->r, f->a, f->a_columns, 1.0, block, f->a_columns, err);
}

typedef struct weight_view {
    int64_t rows, columns;
} weight_view;

static weight_view view_of(const pc_module *m)
{
    const int64_t all = pc_module_weight_count(m);
    const int64_t rows = outputs_are_columns(m) ? m->in_features : m->out_features;
    return (weight_view){rows, rows != 0 ? all / rows : 0};
}

static pc_status sum_squares(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *m,
                             pc_dtype compute, double *squares, pc_pool *scratch, pc_error *err)
{
    const weight_view view = view_of(m);
    lora_factors now, initial;
    void *block;
    pc_status status = lora_get_factors(rt, adapter, slot, compute, false, scratch, &now, err);
    if (status == PC_OK)
        status = lora_get_factors(rt, adapter, slot, compute, true, scratch, &initial, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, compute, BLOCK_ROWS, view.columns, &block, err);
    for (int64_t first = 0; first < view.rows && status == PC_OK; first += BLOCK_ROWS) {
        int64_t rows = view.rows - first < BLOCK_ROWS ? view.rows - first : BLOCK_ROWS;
        pc_convert(rt, compute, block, m->dtype, pc_at_const(m->dtype, m->weight, first * view.columns),
                   rows * view.columns);
        status = add_block(rt, m, compute, &now, slot->scaling, first, rows, block, err);
        if (status == PC_OK)
            status = add_block(rt, m, compute, &initial, -slot->scaling, first, rows, block, err);
        if (status == PC_OK)
            add_squares(compute, block, rows, view.columns, outputs_are_columns(m), first, squares);
    }
    return status;
}

pc_status dora_norms(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                     pc_dtype compute, void *norms, pc_error *err)
{
    pc_status status = pc_need_weight(module, err);
    if (status != PC_OK)
        return status;
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    void *squares;
    status = pc_scratch(&scratch, PC_F64, module->out_features, 1, &squares, err);
    if (status == PC_OK) {
        memset(squares, 0, (size_t)module->out_features * sizeof(double));
        status = sum_squares(rt, adapter, slot, module, compute, squares, &scratch, err);
    }
    for (int64_t i = 0; status == PC_OK && i < module->out_features; i++)
        pc_put_double(compute, norms, i, sqrt(((double *)squares)[i]));
    pc_pool_free(&scratch);
    return status;
}

pc_status dora_factors(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, pc_pool *scratch,
                       void **factors, void **norms, pc_error *err)
{
    const pc_module *m = call->module;
    const pc_tensor *magnitude = pc_slot_tensor(adapter, slot, LORA_MAGNITUDE);
    void *lengths;
    pc_status status = pc_scratch(scratch, call->compute, m->out_features, 1, factors, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, call->compute, m->out_features, 1, &lengths, err);
    if (status == PC_OK)
        status = dora_norms(call->rt, adapter, slot, m, call->compute, lengths, err);
    for (int64_t i = 0; status == PC_OK && i < m->out_features; i++) {
        double length = pc_get_double(magnitude->dtype, pc_tensor_data(adapter, magnitude), i);
        pc_put_double(call->compute, *factors, i, length / pc_get_double(call->compute, lengths, i));
    }
    if (norms != NULL)
        *norms = lengths;
    return status;
}

bool dora_keeps_result(const pc_adapter *adapter, const pc_slot *slot)
{
    (void)slot;
    const lora_params *p = lora_params_of(adapter->config);
    return p->use_dora && adapter->trainable;
}

/* y += (f − 1) · W·d + f · s·B·A·d for the dropped-out input d: PEFT's form while dropout is on. */
static pc_status after_dropout(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot,
                               const void *dropped, void *y, pc_pool *scratch, pc_error *err)
{
    const int64_t n = call->rows * call->module->out_features * pc_output_pixels(call);
    pc_module without_bias = *call->module;
    without_bias.bias = NULL;
    pc_call base = *call;
    base.module = &without_bias;
    void *factors, *part;
    pc_status status = dora_factors(call, adapter, slot, scratch, &factors, NULL, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, call->compute, n, 1, &part, err);
    if (status == PC_OK)
        status = pc_base_forward(&base, dropped, part, scratch, err);
    if (status == PC_OK && pc_slot_tensor(adapter, slot, LORA_INITIAL_A) != NULL)
        status = lora_add_output(call, adapter, slot, true, dropped, -slot->scaling, part, scratch, err);
    if (status != PC_OK)
        return status;
    pc_add(call->rt, call->compute, n, part, -1.0, y);
    status = lora_add_output(call, adapter, slot, false, dropped, slot->scaling, part, scratch, err);
    if (status != PC_OK)
        return status;
    pc_scale_output(call, call->compute, factors, part);
    pc_add(call->rt, call->compute, n, part, 1.0, y);
    return PC_OK;
}

pc_status dora_after(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x,
                     const void *dropped, void *y, pc_pool *scratch, pc_error *err)
{
    if (dropped != x)
        return after_dropout(call, adapter, slot, dropped, y, scratch, err);
    const pc_module *m = call->module;
    void *factors;
    pc_status status = dora_factors(call, adapter, slot, scratch, &factors, NULL, err);
    if (status != PC_OK)
        return status;
    /* What is scaled is the running result without the base's bias. */
    if (m->bias != NULL)
        pc_add_output(call, m->dtype, m->bias, -1.0, y);
    status = lora_add_output(call, adapter, slot, false, x, slot->scaling, y, scratch, err);
    if (status != PC_OK)
        return status;
    pc_scale_output(call, call->compute, factors, y);
    if (m->bias != NULL)
        pc_add_output(call, m->dtype, m->bias, 1.0, y);
    return PC_OK;
}

/* As in the forward pass the length is that of the module's own weight with this adapter, whatever was folded into
 * `weight` before. */
pc_status dora_merge(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *m,
                     pc_dtype compute, void *weight, pc_error *err)
{
    const pc_tensor *magnitude = pc_slot_tensor(adapter, slot, LORA_MAGNITUDE);
    const weight_view view = view_of(m);
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    void *factors, *norms;
    pc_status status = pc_scratch(&scratch, PC_F64, m->out_features, 1, &factors, err);
    if (status == PC_OK)
        status = pc_scratch(&scratch, compute, m->out_features, 1, &norms, err);
    if (status == PC_OK)
        status = dora_norms(rt, adapter, slot, m, compute, norms, err);
    if (status == PC_OK) {
        double *factor = factors;
        for (int64_t i = 0; i < m->out_features; i++)
            factor[i] = pc_get_double(magnitude->dtype, pc_tensor_data(adapter, magnitude), i) /
                        pc_get_double(compute, norms, i);
        if (outputs_are_columns(m))
            pc_scale_columns(rt, compute, view.rows, view.columns, weight, PC_F64, factor, weight);
        else
            pc_scale_rows(rt, compute, view.rows, view.columns, weight, PC_F64, factor, weight);
    }
    pc_pool_free(&scratch);
    return status;
}
