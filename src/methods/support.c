#include "support.h"

#include <math.h>

void pc_plan_shaped(pc_slot_plan *plan, int role, pc_dtype dtype, int ndim, const int64_t *shape, bool in_state_dict,
                    bool trainable)
{
    pc_tensor tensor = {
        .role = role, .dtype = dtype, .ndim = ndim, .in_state_dict = in_state_dict, .trainable = trainable};
    for (int d = 0; d < ndim; d++)
        tensor.shape[d] = shape[d];
    plan->tensors[plan->tensor_count++] = tensor;
}

void pc_plan_tensor(pc_slot_plan *plan, int role, pc_dtype dtype, int ndim, int64_t d0, int64_t d1, int64_t d2,
                    int64_t d3, bool in_state_dict, bool trainable)
{
    pc_plan_shaped(plan, role, dtype, ndim, (const int64_t[]){d0, d1, d2, d3}, in_state_dict, trainable);
}

pc_status pc_fail_kind(const pc_module *module, const char *kinds, pc_error *err)
{
    return pc_fail(err, PC_ERR_VALUE,
                   "Target module %s (%s) is not supported. Currently, only the following modules are supported: %s.",
                   module->class_name, module->name, kinds);
}

pc_status pc_need_weight(const pc_module *module, pc_error *err)
{
    if (module->weight != NULL)
        return PC_OK;
    return pc_fail(err, PC_ERR_VALUE, "the weight of module %s is not in memory; load it before adapting the module",
                   module->name);
}

pc_status pc_scratch(pc_pool *scratch, pc_dtype dtype, int64_t a, int64_t b, void **out, pc_error *err)
{
    size_t n, bytes;
    *out = pc_mul_size((size_t)a, (size_t)b, &n) && pc_mul_size(n, pc_dtype_size(dtype), &bytes)
               ? pc_pool_alloc(scratch, bytes)
               : NULL;
    return *out != NULL ? PC_OK : pc_fail_nomem(err, "intermediate results");
}

pc_status pc_as_compute(pc_runtime *rt, pc_dtype compute, pc_dtype dtype, const void *src, int64_t n, pc_pool *scratch,
                        const void **out, pc_error *err)
{
    *out = src;
    if (dtype == compute)
        return PC_OK;
    void *copy;
    pc_status status = pc_scratch(scratch, compute, n, 1, &copy, err);
    if (status != PC_OK)
        return status;
    pc_convert(rt, compute, copy, dtype, src, n);
    *out = copy;
    return PC_OK;
}

pc_status pc_tensor_as(pc_runtime *rt, pc_dtype compute, const pc_adapter *adapter, const pc_tensor *tensor,
                       pc_pool *scratch, const void **out, pc_error *err)
{
    return pc_as_compute(rt, compute, tensor->dtype, pc_tensor_data(adapter, tensor), pc_tensor_count(tensor), scratch,
                         out, err);
}

pc_status pc_check_lora_numbers(const pc_config *config, double alpha, double dropout, pc_error *err)
{
    if (!isfinite(alpha))
        return pc_fail(err, PC_ERR_VALUE, "%s: lora_alpha must be a finite number, got %g", config->label, alpha);
    if (!(dropout <= 1.0))
        return pc_fail(err, PC_ERR_VALUE, "%s: lora_dropout must be between 0 and 1, got %g", config->label, dropout);
    return PC_OK;
}

/* Each adapter of a layer draws on its own. */
static uint64_t stream_of(const pc_call *call, const pc_adapter *adapter)
{
    return call->rng.stream ^ (adapter->id << 40);
}

pc_status pc_drop_input(const pc_call *call, const pc_adapter *adapter, double p, const void *x, pc_pool *scratch,
                        const void **out, pc_error *err)
{
    *out = x;
    if (!call->training || !(p > 0.0))
        return PC_OK;
    return pc_drop_both(call, adapter, p, x, NULL, scratch, out, err);
}

pc_status pc_drop_both(const pc_call *call, const pc_adapter *adapter, double p, const void *x, void *dx,
                       pc_pool *scratch, const void **out, pc_error *err)
{
    const int64_t n = pc_input_count(call);
    const uint64_t stream = stream_of(call, adapter);
    void *dropped;
    *out = x;
    if (!call->training || !(p > 0.0))
        return PC_OK;
    if (x == NULL) {
        pc_drop_back(call, adapter, p, dx);
        return PC_OK;
    }
    pc_status status = pc_scratch(scratch, call->compute, n, 1, &dropped, err);
    if (status != PC_OK)
        return status;
    pc_dropout_two(call->rt, call->compute, n, x, dropped, dx, dx, p, call->rng.seed, stream);
    *out = dropped;
    return PC_OK;
}

void pc_drop_back(const pc_call *call, const pc_adapter *adapter, double p, void *dx)
{
    if (call->training && p > 0.0 && dx != NULL)
        pc_dropout(call->rt, call->compute, pc_input_count(call), dx, p, call->rng.seed, stream_of(call, adapter), dx);
}

pc_conv_shape pc_call_conv(const pc_call *call)
{
    const pc_module *m = call->module;
    return (pc_conv_shape){.batch = call->rows,
                           .in_channels = m->in_features,
                           .height = call->height,
                           .width = call->width,
                           .out_channels = m->out_features,
                           .kernel = {m->kernel[0], m->kernel[1]},
                           .stride = {m->stride[0], m->stride[1]},
                           .padding = {m->padding[0], m->padding[1]},
                           .dilation = {m->dilation[0], m->dilation[1]},
                           .groups = m->groups,
                           .out_height = call->out_height,
                           .out_width = call->out_width};
}

int64_t pc_input_count(const pc_call *call)
{
    int64_t count = call->rows * call->module->in_features;
    return call->module->kind == PC_CONV2D ? count * call->height * call->width : count;
}

int64_t pc_output_pixels(const pc_call *call)
{
    return call->module->kind == PC_CONV2D ? call->out_height * call->out_width : 1;
}

void pc_scale_output(const pc_call *call, pc_dtype dtype, const void *factors, void *y)
{
    const int64_t out = call->module->out_features, pixels = pc_output_pixels(call);
    if (call->module->kind != PC_CONV2D) {
        pc_scale_columns(call->rt, call->compute, call->rows, out, y, dtype, factors, y);
        return;
    }
    for (int64_t i = 0; i < call->rows; i++) {
        void *image = pc_at(call->compute, y, i * out * pixels);
        pc_scale_rows(call->rt, call->compute, out, pixels, image, dtype, factors, image);
    }
}

void pc_add_output(const pc_call *call, pc_dtype dtype, const void *values, double scale, void *y)
{
    const int64_t out = call->module->out_features, pixels = pc_output_pixels(call);
    if (call->module->kind != PC_CONV2D) {
        pc_add_row(call->rt, call->compute, call->rows, out, dtype, values, scale, y);
        return;
    }
    for (int64_t i = 0; i < call->rows * out; i++) {
        const double add = scale * pc_get_double(dtype, values, i % out);
        if (call->compute == PC_F64) {
            double *image = (double *)y + i * pixels;
            for (int64_t j = 0; j < pixels; j++)
                image[j] += add;
        } else {
            float *image = (float *)y + i * pixels;
            for (int64_t j = 0; j < pixels; j++)
                image[j] += (float)add;
        }
    }
}
