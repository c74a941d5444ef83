/* IA3 (Liu et al. 2022): one learned factor per feature, on the output of a
 * layer or, for feed-forward layers, on its input. */
#include "support.h"

#include <stddef.h>
#include <string.h>

enum { IA3_L };

typedef struct ia3_params {
    pc_selector feedforward_modules;
    bool init_ia3_weights;
} ia3_params;

#define FIELD(name, type) {#name, type, offsetof(ia3_params, name)}

static const pc_field ia3_fields[] = {
    FIELD(feedforward_modules, PC_FIELD_SELECTOR),
    FIELD(init_ia3_weights, PC_FIELD_BOOL),
};

/* Fields of LoRA's config that IA3's does not have. */
static const char *const ia3_lacks[] = {"bias", "layers_to_transform", "layers_pattern", NULL};

static const ia3_params *ia3_params_of(const pc_config *config) { return config->params; }

static void ia3_defaults(void *params) { ((ia3_params *)params)->init_ia3_weights = true; }

static bool contains(const pc_strings *strings, const pc_string *wanted)
{
    for (size_t i = 0; i < strings->count; i++)
        if (strings->items[i].len == wanted->len &&
            memcmp(strings->items[i].text, wanted->text, wanted->len) == 0)
            return true;
    return false;
}

static pc_status ia3_validate(const pc_config *config, pc_error *err)
{
    const pc_selector *feedforward = &ia3_params_of(config)->feedforward_modules;
    if (feedforward->kind != PC_SELECT_LIST || config->target_modules.kind != PC_SELECT_LIST)
        return PC_OK;
    for (size_t i = 0; i < feedforward->names.count; i++)
        if (!contains(&config->target_modules.names, &feedforward->names.items[i]))
            return pc_fail(err, PC_ERR_VALUE,
                           "%s: `feedforward_modules` should be a subset of `target_modules`; '%s' is not a target",
                           config->label, feedforward->names.items[i].text);
    return PC_OK;
}

static pc_status ia3_plan(const pc_config *config, const pc_module *m, pc_slot_plan *plan, pc_error *err)
{
    const pc_selector *feedforward = &ia3_params_of(config)->feedforward_modules;
    if (m->kind != PC_LINEAR && m->kind != PC_CONV1D && m->kind != PC_CONV2D)
        return pc_fail_kind(m, "Linear, Conv2d, Conv1D", err);
    if (feedforward->kind == PC_SELECT_NONE)
        return pc_fail(err, PC_ERR_VALUE, "Please specify `feedforward_modules` in `peft_config`");
    pc_status status = pc_selector_matches(feedforward, m->name, m->name_len, &plan->slot.feedforward, err);
    if (status != PC_OK)
        return status;
    const int64_t n = plan->slot.feedforward ? m->in_features : m->out_features;
    if (m->kind == PC_CONV2D)
        pc_plan_tensor(plan, IA3_L, m->dtype, 4, 1, n, 1, 1, true, true);
    else if (plan->slot.feedforward)
        pc_plan_tensor(plan, IA3_L, m->dtype, 2, 1, n, 0, 0, true, true);
    else
        pc_plan_tensor(plan, IA3_L, m->dtype, 2, n, 1, 0, 0, true, true);
    return PC_OK;
}

static pc_status ia3_init(pc_runtime *rt, pc_adapter *adapter, const pc_slot *slot, const pc_module *module, pc_rng rng,
                          bool loading, pc_error *err)
{
    (void)module;
    (void)err;
    if (loading)
        return PC_OK;
    const pc_tensor *l = pc_slot_tensor(adapter, slot, IA3_L);
    const bool ones = ia3_params_of(adapter->config)->init_ia3_weights;
    /* A normal distribution of no width is a constant. */
    pc_fill_normal(rt, rng, l->dtype, pc_tensor_data(adapter, l), pc_tensor_count(l), ones ? 1.0 : 0.0,
                   ones ? 0.0 : 1.0);
    return PC_OK;
}

static void scale_input(const pc_call *call, const pc_tensor *l, const void *factors, const void *x, void *scaled)
{
    const pc_module *m = call->module;
    if (m->kind != PC_CONV2D) {
        pc_scale_columns(call->rt, call->compute, call->rows, m->in_features, x, l->dtype, factors, scaled);
        return;
    }
    const int64_t pixels = call->height * call->width, image = m->in_features * pixels;
    for (int64_t i = 0; i < call->rows; i++)
        pc_scale_rows(call->rt, call->compute, m->in_features, pixels, pc_at_const(call->compute, x, i * image),
                      l->dtype, factors, pc_at(call->compute, scaled, i * image));
}

static pc_status ia3_before(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void **x,
                            pc_pool *scratch, pc_error *err)
{
    if (!slot->feedforward)
        return PC_OK;
    const pc_tensor *l = pc_slot_tensor(adapter, slot, IA3_L);
    const void *factors = pc_tensor_data(adapter, l);
    void *scaled;
    pc_status status = pc_scratch(scratch, call->compute, pc_input_count(call), 1, &scaled, err);
    if (status != PC_OK)
        return status;
    scale_input(call, l, factors, *x, scaled);
    *x = scaled;
    return PC_OK;
}

static pc_status ia3_after(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x, void *y,
                           pc_pool *scratch, pc_error *err)
{
    (void)x;
    (void)scratch;
    (void)err;
    if (slot->feedforward)
        return PC_OK;
    const pc_tensor *l = pc_slot_tensor(adapter, slot, IA3_L);
    pc_scale_output(call, l->dtype, pc_tensor_data(adapter, l), y);
    return PC_OK;
}

/* Per input feature (Conv2d: channel): target += Σ a ⊙ b. */
static void sum_input(const pc_call *call, const void *a, const void *b, void *sums)
{
    const pc_module *m = call->module;
    if (m->kind != PC_CONV2D) {
        pc_sum_rows(call->rt, call->compute, call->rows, m->in_features, a, b, 1.0, sums);
        return;
    }
    const int64_t pixels = call->height * call->width, image = m->in_features * pixels;
    for (int64_t i = 0; i < call->rows; i++)
        pc_sum_columns(call->rt, call->compute, m->in_features, pixels, pc_at_const(call->compute, a, i * image),
                       pc_at_const(call->compute, b, i * image), 1.0, sums);
}

/* The gradient of the factors: Σ of values ⊙ their gradients, per feature. */
static pc_status factor_gradient(const pc_call *call, const pc_adapter *adapter, const pc_tensor *l, bool input,
                                 const void *values, const void *gradients, pc_pool *scratch, pc_error *err)
{
    const int64_t n = pc_tensor_count(l);
    void *sums;
    if (!pc_gradient_wanted(adapter, l))
        return PC_OK;
    pc_status status = pc_scratch(scratch, call->compute, n, 1, &sums, err);
    if (status != PC_OK)
        return status;
    memset(sums, 0, (size_t)n * pc_dtype_size(call->compute));
    if (input)
        sum_input(call, values, gradients, sums);
    else
        pc_sum_output(call, values, gradients, 1.0, sums);
    pc_target_add(call->rt, pc_tensor_target(adapter, l), call->compute, sums, n, 1.0);
    return PC_OK;
}

static bool ia3_keeps_result(const pc_adapter *adapter, const pc_slot *slot)
{
    return !slot->feedforward && adapter->trainable;
}

static pc_status ia3_after_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot,
                                const pc_way_back *way, pc_pool *scratch, pc_error *err)
{
    if (slot->feedforward)
        return PC_OK;
    const pc_tensor *l = pc_slot_tensor(adapter, slot, IA3_L);
    pc_status status = PC_OK;
    if (way->kept != NULL)
        status = factor_gradient(call, adapter, l, false, way->kept, way->dy, scratch, err);
    if (status == PC_OK)
        pc_scale_output(call, l->dtype, pc_tensor_data(adapter, l), way->dy);
    return status;
}

static pc_status ia3_before_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x,
                                 void *dx, pc_pool *scratch, pc_error *err)
{
    if (!slot->feedforward)
        return PC_OK;
    const pc_tensor *l = pc_slot_tensor(adapter, slot, IA3_L);
    pc_status status = factor_gradient(call, adapter, l, true, x, dx, scratch, err);
    if (status == PC_OK)
        scale_input(call, l, pc_tensor_data(adapter, l), dx, dx);
    return status;
}

static pc_status ia3_merge(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *m,
                           pc_dtype compute, void *weight, void *bias, pc_error *err)
{
    const pc_tensor *l = pc_slot_tensor(adapter, slot, IA3_L);
    const void *factors = pc_tensor_data(adapter, l);
    const int64_t in = m->in_features, out = m->out_features;
    (void)err;
    if (m->kind == PC_CONV2D) {
        const int64_t kernel = m->kernel[0] * m->kernel[1], group_in = in / m->groups;
        if (!slot->feedforward)
            pc_scale_rows(rt, compute, out, group_in * kernel, weight, l->dtype, factors, weight);
        /* An output channel sees the input channels of its own group. */
        for (int64_t o = 0; slot->feedforward && o < out; o++) {
            void *row = pc_at(compute, weight, o * group_in * kernel);
            const int64_t group = o / (out / m->groups);
            pc_scale_rows(rt, compute, group_in, kernel, row, l->dtype,
                          pc_at_const(l->dtype, factors, group * group_in), row);
        }
    } else if ((m->kind == PC_LINEAR) == slot->feedforward) {
        pc_scale_columns(rt, compute, m->kind == PC_LINEAR ? out : in, m->kind == PC_LINEAR ? in : out, weight,
                         l->dtype, factors, weight);
    } else {
        pc_scale_rows(rt, compute, m->kind == PC_LINEAR ? out : in, m->kind == PC_LINEAR ? in : out, weight, l->dtype,
                      factors, weight);
    }
    if (!slot->feedforward && bias != NULL)
        pc_scale_columns(rt, compute, 1, out, bias, l->dtype, factors, bias);
    return PC_OK;
}

static const pc_role_name ia3_roles[] = {{IA3_L, "ia3_l", "", false}};

const pc_method pc_method_ia3 = {
    .schema = {.peft_type = "IA3",
               .fields = ia3_fields,
               .field_count = sizeof ia3_fields / sizeof *ia3_fields,
               .params_size = sizeof(ia3_params),
               .set_defaults = ia3_defaults,
               .validate = ia3_validate,
               .lacks = ia3_lacks},
    .prefix = "ia3_",
    .roles = ia3_roles,
    .role_count = 1,
    .plan = ia3_plan,
    .init = ia3_init,
    .before = ia3_before,
    .after = ia3_after,
    .keeps_result = ia3_keeps_result,
    .after_back = ia3_after_back,
    .before_back = ia3_before_back,
    .merge = ia3_merge,
};
