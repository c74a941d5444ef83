/* Merged weights: copies of the base weights with adapters folded in.
 *
 * The base weights are never written, so that going back is exact.  All copies
 * live in one arena; they are computed in f32 (f64 for f64) and rounded to the
 * module's dtype once, after the last adapter. */
#include "support.h"

#include <math.h>
#include <string.h>

typedef struct merge_plan {
    size_t module_count;
    size_t *weight_at, *bias_at; /* offsets into the arena; SIZE_MAX: not touched */
    size_t bytes;
    int64_t largest; /* numbers in the largest weight or bias that is not stored in its compute dtype */
    pc_pool pool;
} merge_plan;

static bool changes_weight(pc_adapter *const *adapters, size_t count, int32_t module)
{
    for (size_t i = 0; i < count; i++) {
        const pc_slot *slot = pc_adapter_slot(adapters[i], module);
        if (slot != NULL && slot->adapts)
            return true;
    }
    return false;
}

/* The weight that the merged adapters start from: the last copy of their own, else the module's. */
static const void *starting_weight(pc_adapter *const *adapters, size_t count, int32_t index, const pc_module *module)
{
    for (size_t i = count; i-- > 0;) {
        const pc_slot *slot = pc_adapter_slot(adapters[i], index);
        const pc_tensor *weight =
            slot != NULL && !slot->subtracts ? pc_slot_tensor(adapters[i], slot, PC_ROLE_BASE_WEIGHT) : NULL;
        if (weight != NULL)
            return pc_tensor_data(adapters[i], weight);
    }
    return module->weight;
}

/* The bias that the merged adapters start from: the last trained copy, else the module's own. */
static const void *starting_bias(pc_adapter *const *adapters, size_t count, int32_t index, const pc_module *module,
                                 bool *trained)
{
    *trained = false;
    for (size_t i = count; i-- > 0;) {
        const pc_slot *slot = pc_adapter_slot(adapters[i], index);
        const pc_tensor *bias = slot != NULL ? pc_slot_tensor(adapters[i], slot, PC_ROLE_BASE_BIAS) : NULL;
        if (bias != NULL) {
            *trained = true;
            return pc_tensor_data(adapters[i], bias);
        }
    }
    return module->bias;
}

static bool reserve(merge_plan *plan, const pc_module *module, int64_t n, size_t *at)
{
    size_t bytes;
    *at = plan->bytes;
    if (module->dtype != pc_compute_dtype(module->dtype) && n > plan->largest)
        plan->largest = n;
    return n >= 0 && pc_mul_size((size_t)n, pc_dtype_size(module->dtype), &bytes) &&
           bytes <= PTRDIFF_MAX - (size_t)PC_ALIGNMENT && pc_add_size(plan->bytes, pc_align_up(bytes), &plan->bytes);
}

static pc_status make_plan(merge_plan *plan, const pc_module_table *modules, pc_adapter *const *adapters, size_t count,
                           pc_error *err)
{
    memset(plan, 0, sizeof *plan);
    pc_pool_init(&plan->pool);
    plan->module_count = modules->count;
    plan->weight_at = pc_pool_array(&plan->pool, modules->count, sizeof *plan->weight_at);
    plan->bias_at = pc_pool_array(&plan->pool, modules->count, sizeof *plan->bias_at);
    if (plan->weight_at == NULL || plan->bias_at == NULL)
        return pc_fail_nomem(err, "a merge");
    bool fits = true;
    for (size_t i = 0; i < modules->count; i++) {
        const pc_module *module = &modules->items[i];
        bool trained;
        plan->weight_at[i] = plan->bias_at[i] = SIZE_MAX;
        bool weight = changes_weight(adapters, count, (int32_t)i);
        (void)starting_bias(adapters, count, (int32_t)i, module, &trained);
        if (weight) {
            pc_status status = pc_need_weight(module, err);
            if (status != PC_OK)
                return status;
            fits = fits && reserve(plan, module, pc_module_weight_count(module), &plan->weight_at[i]);
        }
        /* A layer without a bias gets one here: lora_bias may bring it. */
        if (trained || (weight && module->kind != PC_EMBEDDING))
            fits = fits && reserve(plan, module, module->out_features, &plan->bias_at[i]);
    }
    return fits ? PC_OK : pc_fail(err, PC_ERR_NOMEM, "the merged weights do not fit into memory");
}

/* The first adapter to blame is the last one: the check runs after it. */
static pc_status check_finite(const pc_module *module, pc_dtype dtype, const void *values, int64_t n,
                              const pc_adapter *adapter, pc_error *err)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(dtype == PC_F64 ? ((const double *)values)[i] : (double)((const float *)values)[i]))
            return pc_fail(err, PC_ERR_VALUE,
                           "NaNs detected in the merged weights. The adapter %s seems to be broken (module %s)",
                           adapter->name, module->name);
    return PC_OK;
}

static bool all_zero(const void *values, size_t bytes)
{
    const unsigned char *byte = values;
    for (size_t i = 0; i < bytes; i++)
        if (byte[i] != 0)
            return false;
    return true;
}

typedef struct merge_job {
    pc_runtime *rt;
    const pc_module_table *modules;
    pc_adapter *const *adapters;
    size_t count;
    bool safe_merge;
    void *weight_scratch, *bias_scratch; /* for dtypes that are not computed in */
} merge_job;

static pc_status fold(const merge_job *job, size_t index, const pc_module *module, pc_dtype compute, void *weight,
                      void *bias, pc_error *err)
{
    pc_status status = PC_OK;
    for (size_t i = 0; i < job->count && status == PC_OK; i++) {
        const pc_adapter *adapter = job->adapters[i];
        const pc_slot *slot = pc_adapter_slot(adapter, (int32_t)index);
        if (slot == NULL || !slot->adapts)
            continue;
        status = adapter->method->merge(job->rt, adapter, slot, module, compute, weight, bias, err);
        if (status == PC_OK && job->safe_merge)
            status = check_finite(module, compute, weight, pc_module_weight_count(module), adapter, err);
        if (status == PC_OK && job->safe_merge && bias != NULL)
            status = check_finite(module, compute, bias, module->out_features, adapter, err);
    }
    return status;
}

static pc_status merge_module(const merge_job *job, const merge_plan *plan, size_t index, pc_merged *merged,
                              pc_error *err)
{
    pc_module start = job->modules->items[index];
    start.weight = starting_weight(job->adapters, job->count, (int32_t)index, &start);
    const pc_module *module = &start;
    const pc_dtype compute = pc_compute_dtype(module->dtype);
    const bool direct = compute == module->dtype, has_weight = plan->weight_at[index] != SIZE_MAX;
    const int64_t n = pc_module_weight_count(module), out = module->out_features;
    char *arena = pc_arena_data(merged->arena);
    bool trained;
    const void *base_bias = starting_bias(job->adapters, job->count, (int32_t)index, module, &trained);
    void *weight = NULL, *bias = NULL, *weight_to = NULL, *bias_to = NULL;
    if (has_weight) {
        weight_to = arena + plan->weight_at[index];
        weight = direct ? weight_to : job->weight_scratch;
        pc_convert(job->rt, compute, weight, module->dtype, module->weight, n);
    }
    if (plan->bias_at[index] != SIZE_MAX) {
        bias_to = arena + plan->bias_at[index];
        bias = direct ? bias_to : job->bias_scratch;
        if (base_bias != NULL)
            pc_convert(job->rt, compute, bias, module->dtype, base_bias, out);
        else
            memset(bias, 0, (size_t)out * pc_dtype_size(compute));
    }
    pc_status status = fold(job, index, module, compute, weight, bias, err);
    if (status != PC_OK)
        return status;
    if (weight != NULL && !direct)
        pc_convert(job->rt, module->dtype, weight_to, compute, weight, n);
    if (bias != NULL && !direct)
        pc_convert(job->rt, module->dtype, bias_to, compute, bias, out);
    merged->dtype[index] = module->dtype;
    merged->weight[index] = weight_to;
    if (bias_to != NULL && (base_bias != NULL || !all_zero(bias_to, (size_t)out * pc_dtype_size(module->dtype))))
        merged->bias[index] = bias_to;
    return PC_OK;
}

static pc_status new_merged(const merge_plan *plan, pc_adapter *const *adapters, size_t count, pc_merged **out,
                            pc_error *err)
{
    pc_merged *merged = pc_calloc(1, sizeof *merged);
    if (merged == NULL)
        return pc_fail_nomem(err, "a merge");
    atomic_init(&merged->references, 1);
    merged->module_count = plan->module_count;
    merged->weight = pc_calloc(plan->module_count, sizeof *merged->weight);
    merged->bias = pc_calloc(plan->module_count, sizeof *merged->bias);
    merged->dtype = pc_calloc(plan->module_count, sizeof *merged->dtype);
    merged->adapters = pc_calloc(count, sizeof(pc_adapter *));
    pc_status status = merged->weight != NULL && merged->bias != NULL && merged->dtype != NULL &&
                               merged->adapters != NULL
                           ? pc_arena_new(plan->bytes, &merged->arena, err)
                           : pc_fail_nomem(err, "a merge");
    if (status != PC_OK) {
        pc_merged_release(merged);
        return status;
    }
    for (size_t i = 0; i < count; i++)
        merged->adapters[merged->adapter_count++] = pc_adapter_retain(adapters[i]);
    *out = merged;
    return PC_OK;
}

static pc_status merge_all(merge_job *job, const merge_plan *plan, pc_merged *merged, pc_error *err)
{
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    pc_status status = PC_OK;
    if (plan->largest != 0) {
        status = pc_scratch(&scratch, PC_F32, plan->largest, 1, &job->weight_scratch, err);
        if (status == PC_OK)
            status = pc_scratch(&scratch, PC_F32, plan->largest, 1, &job->bias_scratch, err);
    }
    for (size_t i = 0; i < plan->module_count && status == PC_OK; i++)
        if (plan->weight_at[i] != SIZE_MAX || plan->bias_at[i] != SIZE_MAX)
            status = merge_module(job, plan, i, merged, err);
    pc_pool_free(&scratch);
    return status;
}

pc_status pc_merge(pc_runtime *rt, pc_registry *registry, pc_adapter *const *adapters, size_t count, bool safe_merge,
                   pc_merged **out, pc_error *err)
{
    const pc_module_table *modules = pc_registry_modules(registry);
    merge_job job = {
        .rt = rt, .modules = modules, .adapters = adapters, .count = count, .safe_merge = safe_merge};
    merge_plan plan;
    pc_merged *merged = NULL;
    pc_status status = make_plan(&plan, modules, adapters, count, err);
    if (status == PC_OK)
        status = new_merged(&plan, adapters, count, &merged, err);
    if (status == PC_OK)
        status = merge_all(&job, &plan, merged, err);
    pc_pool_free(&plan.pool);
    if (status != PC_OK) {
        pc_merged_release(merged);
        return status;
    }
    *out = merged;
    return PC_OK;
}
