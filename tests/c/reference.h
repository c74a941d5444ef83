/* What the active adapters compute, by plain loops over doubles.
 *
 * A module is seen as one matrix (out, columns) and a bias, whatever its kind:
 * Conv2d as (out, in·kh·kw) with the groups filled in by zeros, an embedding as
 * (dim, num).  Adapters change matrix and bias from the innermost outwards. */
#ifndef PEFTC_TESTS_REFERENCE_H
#define PEFTC_TESTS_REFERENCE_H

#include "model.h"

typedef struct dense {
    const pc_module *module;
    int64_t out, columns, kernel; /* columns = in · kernel */
    double *weight, *base, *bias, *base_bias;
} dense;

CHECK_UNUSED static double *zeros(int64_t n) { return calloc((size_t)n + 1, sizeof(double)); }

CHECK_UNUSED static double base_value(const pc_module *m, int64_t o, int64_t i, int64_t k, int64_t kernel)
{
    if (m->kind == PC_CONV1D || m->kind == PC_EMBEDDING)
        return pc_get_double(m->dtype, m->weight, i * m->out_features + o);
    if (m->kind == PC_LINEAR)
        return pc_get_double(m->dtype, m->weight, o * m->in_features + i);
    int64_t group_in = m->in_features / m->groups, group = o / (m->out_features / m->groups);
    if (i / group_in != group)
        return 0.0;
    return pc_get_double(m->dtype, m->weight, (o * group_in + i % group_in) * kernel + k);
}

CHECK_UNUSED static dense dense_of(const pc_module *m)
{
    dense d = {.module = m, .out = m->out_features, .kernel = 1};
    if (m->kind == PC_CONV2D)
        d.kernel = m->kernel[0] * m->kernel[1];
    d.columns = m->in_features * d.kernel;
    d.weight = zeros(d.out * d.columns);
    d.base = zeros(d.out * d.columns);
    d.bias = zeros(d.out);
    d.base_bias = zeros(d.out);
    for (int64_t o = 0; o < d.out; o++) {
        if (m->bias != NULL)
            d.bias[o] = d.base_bias[o] = pc_get_double(m->dtype, m->bias, o);
        for (int64_t c = 0; c < d.columns; c++)
            d.weight[o * d.columns + c] = d.base[o * d.columns + c] =
                base_value(m, o, c / d.kernel, c % d.kernel, d.kernel);
    }
    return d;
}

CHECK_UNUSED static void dense_free(dense *d)
{
    free(d->weight);
    free(d->base);
    free(d->bias);
    free(d->base_bias);
}

/* The tensor of a module with this ending, or NULL. */
CHECK_UNUSED static const pc_tensor *part(const model *m, const pc_adapter *adapter, const pc_module *module,
                                          const char *ending)
{
    char key[256];
    snprintf(key, sizeof key, "%s.%s", module->name, ending);
    return tensor_named(m, adapter, key);
}

/* to (out, columns) += scale · B·A, B's columns belonging to its group's share of the rank. */
CHECK_UNUSED static void add_low_rank(const dense *d, double *to, const pc_adapter *adapter, const pc_tensor *a,
                                      const pc_tensor *b, const pc_tensor *e, int64_t r, double scale)
{
    const int64_t groups = d->module->kind == PC_CONV2D ? d->module->groups : 1, share = r / groups;
    for (int64_t o = 0; o < d->out; o++)
        for (int64_t j = 0; j < share; j++) {
            int64_t k = o / (d->out / groups) * share + j;
            double factor = scale * value_at(adapter, b, o * share + j) * (e != NULL ? value_at(adapter, e, k) : 1.0);
            for (int64_t c = 0; c < d->columns; c++)
                to[o * d->columns + c] += factor * value_at(adapter, a, k * d->columns + c);
        }
}

CHECK_UNUSED static void apply_ia3(const model *m, dense *d, const pc_adapter *adapter, const pc_slot *slot)
{
    const pc_tensor *l = part(m, adapter, d->module, "ia3_l");
    for (int64_t o = 0; o < d->out; o++) {
        for (int64_t c = 0; c < d->columns; c++)
            d->weight[o * d->columns + c] *= value_at(adapter, l, slot->feedforward ? c / d->kernel : o);
        if (!slot->feedforward)
            d->bias[o] *= value_at(adapter, l, o);
    }
}

CHECK_UNUSED static void apply_dora(const model *m, dense *d, const pc_adapter *adapter, const double *delta)
{
    const pc_tensor *magnitude = part(m, adapter, d->module, "lora_magnitude_vector");
    for (int64_t o = 0; o < d->out; o++) {
        double squares = 0.0;
        for (int64_t c = 0; c < d->columns; c++) {
            double v = d->base[o * d->columns + c] + delta[o * d->columns + c];
            squares += v * v;
        }
        double f = value_at(adapter, magnitude, o) / sqrt(squares);
        for (int64_t c = 0; c < d->columns; c++)
            d->weight[o * d->columns + c] = f * (d->weight[o * d->columns + c] + delta[o * d->columns + c]);
        d->bias[o] = d->base_bias[o] + f * (d->bias[o] - d->base_bias[o]);
    }
}

CHECK_UNUSED static void apply_lora(const model *m, dense *d, const pc_adapter *adapter, const pc_slot *slot)
{
    const bool embedding = d->module->kind == PC_EMBEDDING;
    const pc_tensor *a = part(m, adapter, d->module, embedding ? "lora_embedding_A" : "lora_A.weight");
    const pc_tensor *b = part(m, adapter, d->module, embedding ? "lora_embedding_B" : "lora_B.weight");
    const pc_tensor *bias = part(m, adapter, d->module, "lora_B.bias");
    const pc_tensor *initial_a = part(m, adapter, d->module, "lora_initial_A");
    const pc_tensor *initial_b = part(m, adapter, d->module, "lora_initial_B");
    double *delta = zeros(d->out * d->columns);
    add_low_rank(d, delta, adapter, a, b, NULL, slot->rank, slot->scaling);
    if (initial_a != NULL)
        add_low_rank(d, delta, adapter, initial_a, initial_b, NULL, slot->rank, -slot->scaling);
    if (part(m, adapter, d->module, "lora_magnitude_vector") != NULL)
        apply_dora(m, d, adapter, delta);
    else
        for (int64_t i = 0; i < d->out * d->columns; i++)
            d->weight[i] += delta[i];
    for (int64_t o = 0; bias != NULL && o < d->out; o++)
        d->bias[o] += slot->scaling * value_at(adapter, bias, o);
    free(delta);
}

CHECK_UNUSED static void apply_adapter(const model *m, dense *d, const pc_adapter *adapter)
{
    const pc_slot *slot = pc_adapter_slot(adapter, index_of(m, d->module->name));
    if (slot == NULL || !slot->adapts)
        return;
    const char *type = adapter->method->schema.peft_type;
    if (strcmp(type, "IA3") == 0) {
        apply_ia3(m, d, adapter, slot);
    } else if (strcmp(type, "ADALORA") == 0) {
        double ranknum = value_at(adapter, part(m, adapter, d->module, "ranknum"), 0);
        add_low_rank(d, d->weight, adapter, part(m, adapter, d->module, "lora_A"),
                     part(m, adapter, d->module, "lora_B"), part(m, adapter, d->module, "lora_E"), slot->rank,
                     slot->scaling / (ranknum + 1e-5));
    } else {
        apply_lora(m, d, adapter, slot);
    }
}

/* y ← the dense module applied to the input of `call`; y holds doubles. */
CHECK_UNUSED static double *dense_run(const dense *d, const pc_call *call, const void *x)
{
    const pc_module *m = d->module;
    const int64_t in = m->in_features;
    const int64_t oh = m->kind == PC_CONV2D ? call->out_height : 1, ow = m->kind == PC_CONV2D ? call->out_width : 1;
    double *y = zeros(call->rows * d->out * oh * ow);
    for (int64_t row = 0; row < call->rows; row++)
        for (int64_t o = 0; o < d->out; o++)
            for (int64_t py = 0; py < oh; py++)
                for (int64_t px = 0; px < ow; px++) {
                    double sum = d->bias[o];
                    for (int64_t c = 0; c < d->columns; c++) {
                        const double w = d->weight[o * d->columns + c];
                        if (m->kind == PC_EMBEDDING) {
                            sum += ((const int64_t *)x)[row] == c ? w : 0.0;
                        } else if (m->kind != PC_CONV2D) {
                            sum += w * pc_get_double(call->compute, x, row * in + c);
                        } else {
                            int64_t k = c % d->kernel, ky = k / m->kernel[1], kx = k % m->kernel[1];
                            int64_t sy = py * m->stride[0] - m->padding[0] + ky * m->dilation[0];
                            int64_t sx = px * m->stride[1] - m->padding[1] + kx * m->dilation[1];
                            if (sy >= 0 && sy < call->height && sx >= 0 && sx < call->width)
                                sum += w * pc_get_double(call->compute, x,
                                                         ((row * in + c / d->kernel) * call->height + sy) * call->width +
                                                             sx);
                        }
                    }
                    y[((row * d->out + o) * oh + py) * ow + px] = sum;
                }
    return y;
}

/* Does the module, under what is active now, compute what the adapters (innermost first) should? */
CHECK_UNUSED static bool agrees(const model *m, const char *name, pc_adapter *const *adapters, size_t count,
                                double tolerance)
{
    pc_call call = call_of(m, name, 3);
    void *x = input_for(&call), *y = run(m, &call, x);
    dense d = dense_of(call.module);
    for (size_t i = 0; i < count; i++)
        apply_adapter(m, &d, adapters[i]);
    double *want = dense_run(&d, &call, x), worst = 0.0, scale = 1e-30;
    for (int64_t i = 0; i < call_outputs(&call); i++) {
        double gap = fabs(pc_get_double(call.compute, y, i) - want[i]);
        if (!(gap <= worst))
            worst = gap;
        scale = fabs(want[i]) > scale ? fabs(want[i]) : scale;
    }
    if (!(worst <= tolerance * scale))
        fprintf(stderr, "module %s, dtype %s: off by %g of %g\n", name, pc_dtype_get(m->dtype)->name, worst, scale);
    dense_free(&d);
    free(want);
    free(x);
    free(y);
    return worst <= tolerance * scale;
}

#endif
