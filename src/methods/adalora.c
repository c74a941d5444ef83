/* AdaLora (Zhang et al. 2023): a low-rank update in the form of an SVD,
 *
 *     y += scaling / (ranknum + 1e-5) · B·diag(E)·A·x
 *
 * whose singular values are dropped during training.  A trained adapter's
 * rank_pattern says which are left in each module; its tensors have only those.
 * ranknum stays what it was before the dropping, so that the scale does too. */
#include "support.h"

#include <inttypes.h>
#include <stddef.h>
#include <string.h>

enum { ADALORA_A, ADALORA_B, ADALORA_E, ADALORA_RANKNUM };

typedef struct adalora_params {
    int64_t target_r, init_r, tinit, tfinal, total_step, delta_t;
    double alpha, dropout, beta1, beta2, orth_reg_weight;
    bool use_dora;
    pc_bool_or_text init;
    pc_masks rank_pattern;
} adalora_params;

#define FIELD(name, type, member) {name, type, offsetof(adalora_params, member)}

static const pc_field adalora_fields[] = {
    FIELD("target_r", PC_FIELD_INT, target_r),
    FIELD("init_r", PC_FIELD_INT, init_r),
    FIELD("tinit", PC_FIELD_INT, tinit),
    FIELD("tfinal", PC_FIELD_INT, tfinal),
    FIELD("deltaT", PC_FIELD_INT, delta_t),
    FIELD("total_step", PC_FIELD_OPTIONAL_INT, total_step),
    FIELD("beta1", PC_FIELD_DOUBLE, beta1),
    FIELD("beta2", PC_FIELD_DOUBLE, beta2),
    FIELD("orth_reg_weight", PC_FIELD_DOUBLE, orth_reg_weight),
    FIELD("lora_alpha", PC_FIELD_DOUBLE, alpha),
    FIELD("lora_dropout", PC_FIELD_DOUBLE, dropout),
    FIELD("use_dora", PC_FIELD_BOOL, use_dora),
    FIELD("init_lora_weights", PC_FIELD_BOOL_OR_TEXT, init),
    FIELD("rank_pattern", PC_FIELD_MASKS, rank_pattern),
    /* LoRA's fields that AdaLora inherits in PEFT and does not use */
    {"r", PC_FIELD_IGNORED, 0},
    {"alpha_pattern", PC_FIELD_IGNORED, 0},
    {"use_rslora", PC_FIELD_IGNORED, 0},
    {"use_qalora", PC_FIELD_IGNORED, 0},
    {"qalora_group_size", PC_FIELD_IGNORED, 0},
    {"lora_bias", PC_FIELD_IGNORED, 0},
    {"megatron_config", PC_FIELD_IGNORED, 0},
    {"megatron_core", PC_FIELD_IGNORED, 0},
    {"trainable_token_indices", PC_FIELD_IGNORED, 0},
    {"loftq_config", PC_FIELD_IGNORED, 0},
    {"eva_config", PC_FIELD_IGNORED, 0},
    {"corda_config", PC_FIELD_IGNORED, 0},
    {"layer_replication", PC_FIELD_IGNORED, 0},
    {"runtime_config", PC_FIELD_IGNORED, 0},
    {"target_parameters", PC_FIELD_IGNORED, 0},
};

static const adalora_params *adalora_params_of(const pc_config *config) { return config->params; }

static void adalora_defaults(void *params)
{
    adalora_params *p = params;
    p->target_r = 8;
    p->init_r = 12;
    p->delta_t = 1;
    p->total_step = INT64_MIN;
    p->beta1 = p->beta2 = 0.85;
    p->orth_reg_weight = 0.5;
    p->alpha = 8;
    p->init.flag = true;
}

static pc_status adalora_validate(const pc_config *config, pc_error *err)
{
    const adalora_params *p = adalora_params_of(config);
    if (p->use_dora)
        return pc_fail(err, PC_ERR_VALUE, "%s: ADALORA does not support DoRA.", config->label);
    if (p->init_r < 0 || p->init_r > INT32_MAX)
        return pc_fail(err, PC_ERR_VALUE,
                       "%s: `r` should be a positive integer or 0, but the value passed is %" PRId64 " (init_r)",
                       config->label, p->init_r);
    if (p->total_step <= 0)
        return pc_fail(err, PC_ERR_VALUE,
                       "%s: AdaLoRA does not work when `total_step` is None, supply a value > 0.", config->label);
    int64_t end;
    if (__builtin_sub_overflow(p->total_step, p->tfinal, &end) || p->tinit >= end)
        return pc_fail(err, PC_ERR_VALUE,
                       "%s: The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` "
                       "or increase `total_step`.",
                       config->label);
    pc_status status = pc_check_lora_numbers(config, p->alpha, p->dropout, err);
    if (status != PC_OK)
        return status;
    for (size_t i = 0; i < p->rank_pattern.count; i++) {
        const pc_mask *mask = &p->rank_pattern.items[i];
        if (mask->count > INT32_MAX || (mask->keep != NULL && mask->count != (size_t)p->init_r))
            return pc_fail(err, PC_ERR_VALUE, "%s: rank_pattern[\"%s\"] has %zu items for init_r=%" PRId64,
                           config->label, mask->name.text, mask->count, p->init_r);
    }
    return PC_OK;
}

/* A mask is named after its tensor: "<module>.lora_E", perhaps with PEFT's prefix or an adapter's name behind. */
static bool is_mask_of(const pc_mask *mask, const pc_module *m)
{
    static const char prefix[] = "base_model.model.", tensor[] = ".lora_E";
    const char *name = mask->name.text;
    size_t len = mask->name.len;
    if (len > sizeof prefix && memcmp(name, prefix, sizeof prefix - 1) == 0 &&
        memcmp(m->name, prefix, m->name_len < sizeof prefix - 1 ? m->name_len : sizeof prefix - 1) != 0) {
        name += sizeof prefix - 1;
        len -= sizeof prefix - 1;
    }
    const size_t tail = sizeof tensor - 1;
    return len >= m->name_len + tail && memcmp(name, m->name, m->name_len) == 0 &&
           memcmp(name + m->name_len, tensor, tail) == 0 &&
           (len == m->name_len + tail || name[m->name_len + tail] == '.');
}

static int64_t kept_rank(const adalora_params *p, const pc_module *m)
{
    for (size_t i = 0; i < p->rank_pattern.count; i++) {
        const pc_mask *mask = &p->rank_pattern.items[i];
        if (!is_mask_of(mask, m))
            continue;
        int64_t kept = mask->keep == NULL ? (int64_t)mask->count : 0;
        for (size_t k = 0; mask->keep != NULL && k < mask->count; k++)
            kept += mask->keep[k];
        return kept;
    }
    return p->init_r;
}

static pc_status adalora_plan(const pc_config *config, const pc_module *m, pc_slot_plan *plan, pc_error *err)
{
    const adalora_params *p = adalora_params_of(config);
    if (m->kind != PC_LINEAR && m->kind != PC_CONV1D)
        return pc_fail_kind(m, "Linear, Conv1D", err);
    const int64_t r = kept_rank(p, m);
    plan->slot.rank = r;
    plan->slot.alpha = p->alpha;
    plan->slot.scaling = p->alpha > 0 ? p->alpha : (double)r;
    pc_plan_tensor(plan, ADALORA_A, m->dtype, 2, r, m->in_features, 0, 0, true, true);
    pc_plan_tensor(plan, ADALORA_B, m->dtype, 2, m->out_features, r, 0, 0, true, true);
    pc_plan_tensor(plan, ADALORA_E, m->dtype, 2, r, 1, 0, 0, true, true);
    pc_plan_tensor(plan, ADALORA_RANKNUM, m->dtype, 1, 1, 0, 0, 0, false, false);
    return PC_OK;
}

static pc_status adalora_init(pc_runtime *rt, pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                              pc_rng rng, bool loading, pc_error *err)
{
    (void)module;
    (void)err;
    const adalora_params *p = adalora_params_of(adapter->config);
    const pc_tensor *ranknum = pc_slot_tensor(adapter, slot, ADALORA_RANKNUM);
    pc_put_double(ranknum->dtype, pc_tensor_data(adapter, ranknum), 0, slot->rank != 0 ? (double)p->init_r : 0.0);
    if (loading)
        return PC_OK;
    const bool standard = p->init.is_text ? p->init.text.len != 0 : p->init.flag;
    for (int role = ADALORA_A; role <= ADALORA_E; role++) {
        const pc_tensor *tensor = pc_slot_tensor(adapter, slot, role);
        pc_rng draw = {rng.seed, rng.stream + (uint64_t)role};
        double std = !standard ? 1.0 : role == ADALORA_E ? 0.0 : 0.02;
        pc_fill_normal(rt, draw, tensor->dtype, pc_tensor_data(adapter, tensor), pc_tensor_count(tensor), 0.0, std);
    }
    return PC_OK;
}

static double adalora_scale(const pc_adapter *adapter, const pc_slot *slot)
{
    const pc_tensor *ranknum = pc_slot_tensor(adapter, slot, ADALORA_RANKNUM);
    return slot->scaling / (pc_get_double(ranknum->dtype, pc_tensor_data(adapter, ranknum), 0) + 1e-5);
}

static pc_status adalora_after(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x,
                               void *y, pc_pool *scratch, pc_error *err)
{
    const double p = adalora_params_of(adapter->config)->dropout;
    const pc_module *m = call->module;
    if (slot->rank == 0)
        return PC_OK;
    pc_status status = pc_drop_input(call, adapter, p, x, scratch, &x, err);
    if (status != PC_OK)
        return status;
    const pc_tensor *a = pc_slot_tensor(adapter, slot, ADALORA_A), *b = pc_slot_tensor(adapter, slot, ADALORA_B);
    const pc_tensor *e = pc_slot_tensor(adapter, slot, ADALORA_E);
    return pc_lowrank_add(call->rt, call->compute, call->rows, m->out_features, m->in_features, slot->rank, x,
                          a->dtype, pc_tensor_data(adapter, a), pc_tensor_data(adapter, e), b->dtype,
                          pc_tensor_data(adapter, b), adalora_scale(adapter, slot), y, err);
}

static pc_status adalora_after_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot,
                                    const pc_way_back *way, pc_pool *scratch, pc_error *err)
{
    if (slot->rank == 0)
        return PC_OK;
    const pc_lowrank_back what = {.a = pc_slot_tensor(adapter, slot, ADALORA_A),
                                  .b = pc_slot_tensor(adapter, slot, ADALORA_B),
                                  .e = pc_slot_tensor(adapter, slot, ADALORA_E),
                                  .scale = adalora_scale(adapter, slot),
                                  .dropout = adalora_params_of(adapter->config)->dropout,
                                  .frozen = !adapter->trainable};
    return pc_lowrank_way_back(call, adapter, &what, way, way->dy, scratch, err);
}

static pc_status adalora_merge(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *m,
                               pc_dtype compute, void *weight, void *bias, pc_error *err)
{
    (void)bias;
    if (slot->rank == 0)
        return PC_OK;
    const pc_tensor *e = pc_slot_tensor(adapter, slot, ADALORA_E);
    const int64_t r = slot->rank, in = m->in_features, out = m->out_features;
    const double scale = adalora_scale(adapter, slot);
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    const void *a, *b;
    void *scaled;
    pc_status status =
        pc_tensor_as(rt, compute, adapter, pc_slot_tensor(adapter, slot, ADALORA_A), &scratch, &a, err);
    if (status == PC_OK)
        status = pc_tensor_as(rt, compute, adapter, pc_slot_tensor(adapter, slot, ADALORA_B), &scratch, &b, err);
    if (status == PC_OK)
        status = pc_scratch(&scratch, compute, r, in, &scaled, err);
    if (status == PC_OK) {
        pc_scale_rows(rt, compute, r, in, a, e->dtype, pc_tensor_data(adapter, e), scaled);
        status = m->kind == PC_CONV1D
                     ? pc_gemm(rt, compute, true, true, in, out, r, scale, scaled, in, b, r, 1.0, weight, out, err)
                     : pc_gemm(rt, compute, false, false, out, in, r, scale, b, r, scaled, in, 1.0, weight, in, err);
    }
    pc_pool_free(&scratch);
    return status;
}

static const pc_role_name adalora_roles[] = {
    {ADALORA_A, "lora_A", "", false},
    {ADALORA_B, "lora_B", "", false},
    {ADALORA_E, "lora_E", "", false},
    {ADALORA_RANKNUM, "ranknum", "", false},
};

const pc_method pc_method_adalora = {
    .schema = {.peft_type = "ADALORA",
               .fields = adalora_fields,
               .field_count = sizeof adalora_fields / sizeof *adalora_fields,
               .params_size = sizeof(adalora_params),
               .set_defaults = adalora_defaults,
               .validate = adalora_validate},
    .prefix = "lora_",
    .roles = adalora_roles,
    .role_count = sizeof adalora_roles / sizeof *adalora_roles,
    .plan = adalora_plan,
    .init = adalora_init,
    .after = adalora_after,
    .after_back = adalora_after_back,
    .merge = adalora_merge,
};
