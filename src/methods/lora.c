/* LoRA (Hu et al. 2021): config, tensors, forward and merge.  Initial values
 * are in lora_init.c, DoRA's magnitudes in dora.c, gradients in lora_backward.c. */
#include "lora.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* ---------------------------------------------------------------------- config */

#define FIELD(name, type, member) {name, type, offsetof(lora_params, member)}

static const pc_field lora_fields[] = {
    FIELD("r", PC_FIELD_INT, r),
    FIELD("lora_alpha", PC_FIELD_DOUBLE, alpha),
    FIELD("lora_dropout", PC_FIELD_DOUBLE, dropout),
    FIELD("use_rslora", PC_FIELD_BOOL, use_rslora),
    FIELD("use_dora", PC_FIELD_BOOL, use_dora),
    FIELD("use_qalora", PC_FIELD_BOOL, use_qalora),
    FIELD("lora_bias", PC_FIELD_BOOL, lora_bias),
    FIELD("init_lora_weights", PC_FIELD_BOOL_OR_TEXT, init),
    FIELD("rank_pattern", PC_FIELD_NUMBERS, rank_pattern),
    FIELD("alpha_pattern", PC_FIELD_NUMBERS, alpha_pattern),
    FIELD("target_parameters", PC_FIELD_STRINGS, target_parameters),
    {"megatron_config", PC_FIELD_IGNORED, 0},
    {"megatron_core", PC_FIELD_IGNORED, 0},
    {"trainable_token_indices", PC_FIELD_IGNORED, 0},
    {"loftq_config", PC_FIELD_IGNORED, 0},
    {"eva_config", PC_FIELD_IGNORED, 0},
    {"corda_config", PC_FIELD_IGNORED, 0},
    {"qalora_group_size", PC_FIELD_IGNORED, 0},
    {"layer_replication", PC_FIELD_IGNORED, 0},
    {"runtime_config", PC_FIELD_IGNORED, 0},
};

static void lora_defaults(void *params)
{
    lora_params *p = params;
    p->r = 8;
    p->alpha = 8;
    p->init.flag = true;
}

lora_init lora_init_kind(const pc_bool_or_text *init, int *niter)
{
    static const char niter_prefix[] = "pissa_niter_";
    *niter = -1;
    if (!init->is_text)
        return init->flag ? LORA_INIT_DEFAULT : LORA_INIT_RANDOM;
    const char *text = init->text.text;
    if (strcasecmp(text, "gaussian") == 0)
        return LORA_INIT_GAUSSIAN;
    if (strcmp(text, "orthogonal") == 0)
        return LORA_INIT_ORTHOGONAL;
    if (strcasecmp(text, "olora") == 0)
        return LORA_INIT_OLORA;
    if (strcmp(text, "pissa") == 0)
        return LORA_INIT_PISSA;
    /* EVA changes A from data after the adapter is made; until then B is zero, as with the default. */
    if (strcmp(text, "eva") == 0)
        return LORA_INIT_DEFAULT;
    if (strncmp(text, niter_prefix, sizeof niter_prefix - 1) == 0) {
        const char *digits = text + sizeof niter_prefix - 1;
        size_t len = strlen(digits);
        if (len >= 1 && len <= 4 && strspn(digits, "0123456789") == len) {
            *niter = atoi(digits);
            return LORA_INIT_PISSA;
        }
    }
    return LORA_INIT_UNKNOWN;
}

static pc_status lora_validate_init(const pc_config *config, pc_error *err)
{
    const lora_params *p = lora_params_of(config);
    int niter;
    lora_init kind = lora_init_kind(&p->init, &niter);
    if (kind == LORA_INIT_UNKNOWN) {
        const char *text = p->init.text.text;
        if (strcmp(text, "loftq") == 0 || strcmp(text, "corda") == 0 || strcmp(text, "lora_ga") == 0)
            return pc_fail(err, PC_ERR_UNSUPPORTED,
                           "%s: init_lora_weights=\"%s\" changes the base weights from data that the config does not "
                           "hold; convert the adapter with PEFT's path_initial_model_for_weight_conversion first",
                           config->label, text);
        return pc_fail(err, PC_ERR_VALUE,
                       "%s: Unknown initialization init_lora_weights='%s'; known are true, false, gaussian, orthogonal, "
                       "olora, pissa, pissa_niter_[number of iters] and eva",
                       config->label, text);
    }
    if (lora_init_subtracts(kind) && !(p->alpha > 0))
        return pc_fail(err, PC_ERR_VALUE, "%s: init_lora_weights=\"%s\" needs lora_alpha > 0, got %g", config->label,
                       p->init.text.text, p->alpha);
    if (kind == LORA_INIT_ORTHOGONAL && p->r % 2 != 0)
        return pc_fail(err, PC_ERR_VALUE,
                       "Orthogonal initialization requires the LoRA rank to be even, got %" PRId64 " instead.", p->r);
    if (p->lora_bias && p->init.is_text)
        return pc_fail(err, PC_ERR_VALUE,
                       "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                       "init_lora_weights=%s instead.",
                       p->init.text.text);
    return PC_OK;
}

static pc_status lora_validate(const pc_config *config, pc_error *err)
{
    const lora_params *p = lora_params_of(config);
    if (p->r <= 0 || p->r > INT32_MAX)
        return pc_fail(err, PC_ERR_VALUE,
                       "%s: `r` should be a positive integer value but the value passed is %" PRId64, config->label,
                       p->r);
    pc_status status = pc_check_lora_numbers(config, p->alpha, p->dropout, err);
    if (status != PC_OK)
        return status;
    if (p->use_qalora)
        return pc_fail(err, PC_ERR_UNSUPPORTED, "%s: use_qalora needs a quantized model, which peftc does not run",
                       config->label);
    if (p->target_parameters.count != 0)
        return pc_fail(err, PC_ERR_UNSUPPORTED,
                       "%s: target_parameters is not supported; name the layers in target_modules instead",
                       config->label);
    if (p->lora_bias && p->use_dora)
        return pc_fail(err, PC_ERR_VALUE,
                       "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False");
    return lora_validate_init(config, err);
}

/* ------------------------------------------------------------------------ plan */

static const char lora_kinds[] = "Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention";

static pc_status lora_rank(const pc_config *config, const pc_module *module, pc_slot *slot, pc_error *err)
{
    const lora_params *p = lora_params_of(config);
    double rank;
    pc_status status =
        pc_pattern_value(&p->rank_pattern, module->name, module->name_len, (double)p->r, &rank, err);
    if (status == PC_OK)
        status = pc_pattern_value(&p->alpha_pattern, module->name, module->name_len, p->alpha, &slot->alpha, err);
    if (status != PC_OK)
        return status;
    if (!(rank >= 1.0 && rank <= (double)INT32_MAX) || rank != floor(rank))
        return pc_fail(err, PC_ERR_VALUE,
                       "%s: `r` should be a positive integer value but the value passed is %g (rank_pattern, module %s)",
                       config->label, rank, module->name);
    if (!isfinite(slot->alpha))
        return pc_fail(err, PC_ERR_VALUE, "%s: alpha_pattern gives module %s a value that is not finite",
                       config->label, module->name);
    slot->rank = (int64_t)rank;
    slot->scaling = slot->alpha / (p->use_rslora ? sqrt(rank) : rank);
    return PC_OK;
}

/* Combinations of values and a kind of module that cannot work. */
static pc_status lora_check_module(const pc_config *config, const pc_module *m, const pc_slot *slot, pc_error *err)
{
    const lora_params *p = lora_params_of(config);
    int niter;
    lora_init kind = lora_init_kind(&p->init, &niter);
    if (kind == LORA_INIT_ORTHOGONAL && slot->rank % 2 != 0)
        return pc_fail(err, PC_ERR_VALUE,
                       "Orthogonal initialization requires the LoRA rank to be even, got %" PRId64 " instead "
                       "(module %s).",
                       slot->rank, m->name);
    if (lora_init_subtracts(kind) && !(slot->scaling > 0))
        return pc_fail(err, PC_ERR_VALUE, "%s: init_lora_weights=\"%s\" needs alpha > 0, got %g for module %s",
                       config->label, p->init.text.text, slot->alpha, m->name);
    if (m->kind == PC_EMBEDDING && p->lora_bias)
        return pc_fail(err, PC_ERR_VALUE, "lora_bias=True is not supported for Embedding (module %s).", m->name);
    if (m->kind == PC_ATTENTION && p->use_dora)
        return pc_fail(err, PC_ERR_VALUE,
                       "MultiheadAttention does not support DoRA (yet), please set use_dora to False (module %s)", m->name);
    if (m->kind == PC_ATTENTION && p->lora_bias) /* ignored by PEFT 0.17, not by 0.21 */
        return pc_fail(err, PC_ERR_UNSUPPORTED, "peftc has no code for lora_bias=True on a MultiheadAttention (module %s)",
                       m->name);
    if (pc_kind_kernel_dims(m->kind) == 0 && m->kind != PC_ATTENTION)
        return PC_OK;
    if (m->groups < 1 || slot->rank % m->groups != 0)
        return pc_fail(err, PC_ERR_VALUE,
                       "Targeting a %s with groups=%" PRId64 " and rank %" PRId64 ". Currently, support is limited "
                       "to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                       "not target this specific layer (%s).",
                       pc_kind_name(m->kind), m->groups, slot->rank, m->name);
    if (m->groups > 1 && p->use_dora)
        return pc_fail(err, PC_ERR_UNSUPPORTED, "DoRA is not defined for a %s with groups > 1 (module %s)",
                       pc_kind_name(m->kind), m->name);
    if (p->init.is_text && kind != LORA_INIT_GAUSSIAN)
        return pc_fail(err, PC_ERR_VALUE,
                       "Unknown initialization init_lora_weights='%s' for %s (module %s); it takes true, false and "
                       "gaussian",
                       p->init.text.text, pc_kind_name(m->kind), m->name);
    return PC_OK;
}

/* A sees every input channel, also under groups > 1: that is the shape of PEFT's files. */
static void plan_convolution(const lora_params *p, const pc_module *m, pc_slot_plan *plan)
{
    const int ndim = 2 + pc_kind_kernel_dims(m->kind);
    int64_t shape[PC_TENSOR_DIMS] = {plan->slot.rank, m->in_features, m->kernel[0], m->kernel[1], m->kernel[2]};
    pc_plan_shaped(plan, LORA_A, m->dtype, ndim, shape, true, true);
    int64_t point[PC_TENSOR_DIMS] = {m->out_features, plan->slot.rank / m->groups, 1, 1, 1};
    pc_plan_shaped(plan, LORA_B, m->dtype, ndim, point, true, true);
    int64_t per_output[PC_TENSOR_DIMS] = {1, m->out_features, 1, 1, 1};
    if (p->use_dora)
        pc_plan_shaped(plan, LORA_MAGNITUDE, m->dtype, ndim, per_output, true, true);
}

static pc_status lora_plan(const pc_config *config, const pc_module *m, pc_slot_plan *plan, pc_error *err)
{
    const lora_params *p = lora_params_of(config);
    const bool convolution = pc_kind_kernel_dims(m->kind) != 0;
    if (m->kind != PC_LINEAR && m->kind != PC_CONV1D && !convolution && m->kind != PC_EMBEDDING &&
        m->kind != PC_ATTENTION)
        return pc_fail_kind(m, lora_kinds, err);
    pc_status status = lora_rank(config, m, &plan->slot, err);
    if (status == PC_OK)
        status = lora_check_module(config, m, &plan->slot, err);
    if (status != PC_OK)
        return status;
    const int64_t r = plan->slot.rank, in = m->in_features, out = m->out_features;
    const pc_dtype dtype = m->dtype;
    int niter;
    if (m->kind == PC_EMBEDDING) {
        pc_plan_tensor(plan, LORA_EMBEDDING_A, dtype, 2, r, in, 0, 0, true, true);
        pc_plan_tensor(plan, LORA_EMBEDDING_B, dtype, 2, out, r, 0, 0, true, true);
    } else if (convolution) {
        plan_convolution(p, m, plan);
    } else {
        pc_plan_tensor(plan, LORA_A, dtype, 2, r, in, 0, 0, true, true);
        pc_plan_tensor(plan, LORA_B, dtype, 2, out, r, 0, 0, true, true);
    }
    if (m->kind == PC_ATTENTION) {
        pc_plan_tensor(plan, LORA_OUT_A, dtype, 2, r, in, 0, 0, true, true);
        pc_plan_tensor(plan, LORA_OUT_B, dtype, 2, in, r, 0, 0, true, true);
        return PC_OK;
    }
    if (p->lora_bias)
        pc_plan_tensor(plan, LORA_B_BIAS, dtype, 1, out, 0, 0, 0, true, true);
    if (p->use_dora && !convolution)
        pc_plan_tensor(plan, LORA_MAGNITUDE, dtype, 1, out, 0, 0, 0, true, true);
    if (m->kind != PC_EMBEDDING && lora_init_subtracts(lora_init_kind(&p->init, &niter))) {
        plan->slot.subtracts = true;
        pc_plan_tensor(plan, LORA_INITIAL_A, dtype, 2, r, in, 0, 0, false, false);
        pc_plan_tensor(plan, LORA_INITIAL_B, dtype, 2, out, r, 0, 0, false, false);
    }
    return PC_OK;
}

static const pc_role_name lora_roles[] = {
    {LORA_A, "lora_A", ".weight", false},
    {LORA_B, "lora_B", ".weight", false},
    {LORA_B_BIAS, "lora_B", ".bias", false},
    {LORA_EMBEDDING_A, "lora_embedding_A", "", false},
    {LORA_EMBEDDING_B, "lora_embedding_B", "", false},
    {LORA_MAGNITUDE, "lora_magnitude_vector", ".weight", true},
    {LORA_INITIAL_A, "lora_initial_A", "", false},
    {LORA_INITIAL_B, "lora_initial_B", "", false},
    {LORA_OUT_A, "base_layer.out_proj.lora_A", ".weight", false},
    {LORA_OUT_B, "base_layer.out_proj.lora_B", ".weight", false},
};

/* --------------------------------------------------------------------- factors */

void lora_factor_tensors(const pc_adapter *adapter, const pc_slot *slot, bool initial, const pc_tensor **a,
                         const pc_tensor **b)
{
    *a = pc_slot_tensor(adapter, slot, initial ? LORA_INITIAL_A : LORA_A);
    *b = pc_slot_tensor(adapter, slot, initial ? LORA_INITIAL_B : LORA_B);
    if (*a == NULL && !initial) {
        *a = pc_slot_tensor(adapter, slot, LORA_EMBEDDING_A);
        *b = pc_slot_tensor(adapter, slot, LORA_EMBEDDING_B);
    }
}

pc_status lora_get_factors(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, pc_dtype compute,
                           bool initial, pc_pool *scratch, lora_factors *out, pc_error *err)
{
    const pc_tensor *a, *b;
    *out = (lora_factors){.r = slot->rank};
    lora_factor_tensors(adapter, slot, initial, &a, &b);
    if (a == NULL)
        return PC_OK;
    out->a_columns = pc_tensor_count(a) / slot->rank;
    out->b_rows = b->shape[0];
    pc_status status = pc_tensor_as(rt, compute, adapter, a, scratch, &out->a, err);
    if (status == PC_OK)
        status = pc_tensor_as(rt, compute, adapter, b, scratch, &out->b, err);
    return status;
}

pc_status lora_add_product(pc_runtime *rt, const pc_module *module, pc_dtype compute, const lora_factors *f,
                           double scale, void *weight, pc_error *err)
{
    /* Conv1D (in, out) and Embedding (num, dim) hold the transposed product. */
    if (module->kind == PC_CONV1D || module->kind == PC_EMBEDDING)
        return pc_gemm(rt, compute, true, true, f->a_columns, f->b_rows, f->r, scale, f->a, f->a_columns, f->b, f->r,
                       1.0, weight, f->b_rows, err);
    return pc_gemm(rt, compute, false, false, f->b_rows, f->a_columns, f->r, scale, f->b, f->r, f->a, f->a_columns,
                   1.0, weight, f->a_columns, err);
}

pc_status lora_add_delta(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                         pc_dtype compute, void *weight, pc_error *err)
{
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    lora_factors now, initial;
    pc_status status = lora_get_factors(rt, adapter, slot, compute, false, &scratch, &now, err);
    if (status == PC_OK)
        status = lora_get_factors(rt, adapter, slot, compute, true, &scratch, &initial, err);
    if (status == PC_OK)
        status = lora_add_product(rt, module, compute, &now, slot->scaling, weight, err);
    if (status == PC_OK && initial.a != NULL)
        status = lora_add_product(rt, module, compute, &initial, -slot->scaling, weight, err);
    pc_pool_free(&scratch);
    return status;
}

/* --------------------------------------------------------------------- forward */

void lora_look_up(const pc_call *call, const pc_adapter *adapter, const pc_tensor *a, int64_t r, const int64_t *ids,
                  void *out)
{
    const int64_t num = call->module->in_features;
    const void *data = pc_tensor_data(adapter, a);
    for (int64_t i = 0; i < call->rows; i++)
        for (int64_t k = 0; k < r; k++)
            pc_put_double(call->compute, out, i * r + k, pc_get_double(a->dtype, data, k * num + ids[i]));
}

/* y (rows, dim) += scale · A[:, ids]ᵀ · Bᵀ */
static pc_status embedding_output(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot,
                                  const int64_t *ids, double scale, void *y, pc_pool *scratch, pc_error *err)
{
    const pc_module *m = call->module;
    const pc_tensor *a, *b;
    lora_factor_tensors(adapter, slot, false, &a, &b);
    const int64_t r = slot->rank, dim = m->out_features;
    void *looked_up;
    const void *b_data;
    pc_status status = pc_scratch(scratch, call->compute, call->rows, r, &looked_up, err);
    if (status == PC_OK)
        status = pc_tensor_as(call->rt, call->compute, adapter, b, scratch, &b_data, err);
    if (status != PC_OK)
        return status;
    lora_look_up(call, adapter, a, r, ids, looked_up);
    return pc_gemm(call->rt, call->compute, false, true, call->rows, dim, r, scale, looked_up, r, b_data, r, 1.0, y,
                   dim, err);
}

void lora_conv_shapes(const pc_call *call, const pc_slot *slot, pc_conv_shape *first, pc_conv_shape *second)
{
    *first = pc_call_conv(call);
    *second = *first;
    first->out_channels = slot->rank;
    first->groups = 1;
    second->in_channels = slot->rank;
    second->height = call->out_height;
    second->width = call->out_width;
    for (int d = 0; d < 2; d++) {
        second->kernel[d] = second->stride[d] = second->dilation[d] = 1;
        second->padding[d] = 0;
    }
}

static pc_status conv_output(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x,
                             double scale, void *y, pc_pool *scratch, pc_error *err)
{
    const pc_tensor *a = pc_slot_tensor(adapter, slot, LORA_A), *b = pc_slot_tensor(adapter, slot, LORA_B);
    const int64_t pixels = pc_output_pixels(call);
    pc_conv_shape first, second;
    lora_conv_shapes(call, slot, &first, &second);
    void *narrow, *wide;
    pc_status status = pc_scratch(scratch, call->compute, call->rows * slot->rank, pixels, &narrow, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, call->compute, call->rows * call->module->out_features, pixels, &wide, err);
    if (status == PC_OK)
        status = pc_conv2d(call->rt, call->compute, &first, x, a->dtype, pc_tensor_data(adapter, a), NULL, narrow, err);
    if (status == PC_OK)
        status = pc_conv2d(call->rt, call->compute, &second, narrow, b->dtype, pc_tensor_data(adapter, b), NULL, wide,
                           err);
    if (status == PC_OK)
        pc_add(call->rt, call->compute, call->rows * call->module->out_features * pixels, wide, scale, y);
    return status;
}

pc_status lora_add_output(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, bool initial,
                          const void *x, double scale, void *y, pc_pool *scratch, pc_error *err)
{
    const pc_module *m = call->module;
    if (m->kind == PC_EMBEDDING)
        return embedding_output(call, adapter, slot, x, scale, y, scratch, err);
    if (m->kind == PC_CONV2D)
        return conv_output(call, adapter, slot, x, scale, y, scratch, err);
    const pc_tensor *a, *b;
    lora_factor_tensors(adapter, slot, initial, &a, &b);
    return pc_lowrank_add(call->rt, call->compute, call->rows, m->out_features, m->in_features, slot->rank, x,
                          a->dtype, pc_tensor_data(adapter, a), NULL, b->dtype, pc_tensor_data(adapter, b), scale, y,
                          err);
}

static pc_status lora_after(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x, void *y,
                            pc_pool *scratch, pc_error *err)
{
    const lora_params *p = lora_params_of(adapter->config);
    const void *dropped;
    pc_status status = pc_drop_input(call, adapter, lora_dropout(adapter, call->module), x, scratch, &dropped, err);
    if (status != PC_OK)
        return status;
    if (pc_slot_tensor(adapter, slot, LORA_INITIAL_A) != NULL)
        status = lora_add_output(call, adapter, slot, true, x, -slot->scaling, y, scratch, err);
    if (status != PC_OK)
        return status;
    if (p->use_dora)
        return dora_after(call, adapter, slot, x, dropped, y, scratch, err);
    status = lora_add_output(call, adapter, slot, false, dropped, slot->scaling, y, scratch, err);
    const pc_tensor *bias = pc_slot_tensor(adapter, slot, LORA_B_BIAS);
    if (status == PC_OK && bias != NULL)
        pc_add_output(call, bias->dtype, pc_tensor_data(adapter, bias), slot->scaling, y);
    return status;
}

/* ----------------------------------------------------------------------- merge */

static pc_status lora_merge(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                            pc_dtype compute, void *weight, void *bias, pc_error *err)
{
    if (module->kind == PC_CONV2D && module->groups > 1)
        return pc_fail(err, PC_ERR_UNSUPPORTED,
                       "Merging is not supported for _ConvNd layers with groups > 1! (module %s)", module->name);
    pc_status status = lora_add_delta(rt, adapter, slot, module, compute, weight, err);
    if (status == PC_OK && lora_params_of(adapter->config)->use_dora)
        status = dora_merge(rt, adapter, slot, module, compute, weight, err);
    const pc_tensor *lora_bias = pc_slot_tensor(adapter, slot, LORA_B_BIAS);
    if (status == PC_OK && lora_bias != NULL && bias != NULL)
        pc_add_row(rt, compute, 1, module->out_features, lora_bias->dtype, pc_tensor_data(adapter, lora_bias),
                   slot->scaling, bias);
    return status;
}

const pc_method pc_method_lora = {
    .schema = {.peft_type = "LORA",
               .fields = lora_fields,
               .field_count = sizeof lora_fields / sizeof *lora_fields,
               .params_size = sizeof(lora_params),
               .set_defaults = lora_defaults,
               .validate = lora_validate},
    .prefix = "lora_",
    .roles = lora_roles,
    .role_count = sizeof lora_roles / sizeof *lora_roles,
    .plan = lora_plan,
    .init = lora_init_slot,
    .after = lora_after,
    .keeps_result = dora_keeps_result,
    .after_back = lora_after_back,
    .merge = lora_merge,
};
