/* From a config to an adapter: plan every slot, lay the tensors out in one
 * arena, and give them their first values. */
#include "support.h"

#include <stdatomic.h>
#include <string.h>

/* Slots and tensors while their number is not known yet. */
typedef struct draft {
    pc_slot *slots;
    pc_tensor *tensors;
    size_t slot_count, tensor_count, bytes;
} draft;

static bool make_room(draft *d, size_t slots)
{
    size_t bytes;
    if (pc_mul_size(slots, sizeof *d->slots, &bytes))
        d->slots = pc_scratch_take(bytes);
    if (pc_mul_size(slots, PC_PLAN_TENSORS * sizeof *d->tensors, &bytes))
        d->tensors = pc_scratch_take(bytes);
    return d->slots != NULL && d->tensors != NULL;
}

static pc_status check_name(const char *name, size_t len, pc_error *err)
{
    if (len == 0)
        return pc_fail(err, PC_ERR_VALUE, "an adapter needs a name");
    if (memchr(name, '\0', len) != NULL)
        return pc_fail(err, PC_ERR_VALUE, "an adapter name cannot contain a NUL character");
    if (memchr(name, '.', len) != NULL)
        return pc_fail(err, PC_ERR_VALUE,
                       "adapter name \"%.*s\" contains a dot, which separates the parts of parameter names; use "
                       "another character",
                       len < 256 ? (int)len : 256, name);
    return PC_OK;
}

/* The tensor's size, and what all take together; every product and sum is checked. */
static pc_status measure(draft *d, pc_tensor *tensor, const pc_module *module, pc_error *err)
{
    size_t count = pc_dtype_size(tensor->dtype);
    bool fits = true;
    for (int i = 0; i < tensor->ndim; i++)
        fits = fits && tensor->shape[i] >= 0 && pc_mul_size(count, (size_t)tensor->shape[i], &count);
    tensor->nbytes = count;
    fits = fits && count <= PTRDIFF_MAX - (size_t)PC_ALIGNMENT && pc_add_size(d->bytes, pc_align_up(count), &d->bytes) &&
           d->bytes <= PTRDIFF_MAX;
    return fits ? PC_OK
                : pc_fail(err, PC_ERR_VALUE, "the adapter's tensors for module %s do not fit into memory",
                          module->name);
}

static pc_status add_slot(draft *d, pc_slot_plan *plan, int32_t index, const pc_module *module, pc_error *err)
{
    plan->slot.module = index;
    plan->slot.first_tensor = (int32_t)d->tensor_count;
    plan->slot.tensor_count = plan->tensor_count;
    for (int i = 0; i < plan->tensor_count; i++) {
        pc_tensor *tensor = &d->tensors[d->tensor_count++];
        *tensor = plan->tensors[i];
        tensor->module = index;
        pc_status status = measure(d, tensor, module, err);
        if (status != PC_OK)
            return status;
    }
    d->slots[d->slot_count++] = plan->slot;
    return PC_OK;
}

static pc_status check_dtype(const pc_module *module, pc_error *err)
{
    if (pc_dtype_get(module->dtype)->is_float)
        return PC_OK;
    return pc_fail(err, PC_ERR_VALUE,
                   "the weight of module %s has dtype %s; adapters work on F64, F32, F16 and BF16 weights",
                   module->name, pc_dtype_get(module->dtype)->name);
}

static bool takes_bias(const pc_config *config, const pc_module *module, uint8_t match)
{
    if (!module->has_bias || module->alias_of >= 0 || match == 2)
        return false;
    return config->bias == PC_BIAS_ALL || (config->bias == PC_BIAS_ADAPTED && match == 1);
}

/* What the method adds, and the module's bias where the config trains it.  The
 * bias comes first: that is its place in PEFT's state dict. */
static pc_status plan_adapted(draft *d, const pc_method *method, const pc_config *config, const pc_base_copies *copies,
                              int32_t index, const pc_module *module, uint8_t match, pc_error *err)
{
    pc_slot_plan plan = {0};
    bool bias = takes_bias(config, module, match);
    if (match != 1 && !bias)
        return PC_OK;
    pc_status status = check_dtype(module, err);
    if (status != PC_OK && match == 1)
        /* An unknown kind of module has no dtype: the method's text says more. */
        return module->kind == PC_CONTAINER ? method->plan(config, module, &plan, err) : status;
    if (status != PC_OK)
        return PC_OK; /* bias="all" passes over biases that are not floating point */
    if (bias)
        pc_plan_tensor(&plan, PC_ROLE_BASE_BIAS, module->dtype, 1, module->out_features, 0, 0, 0, true, true);
    if (match == 1) {
        plan.slot.adapts = true;
        status = method->plan(config, module, &plan, err);
        if (status != PC_OK)
            return status;
        pc_base_copies_plan(copies, module, &plan);
    }
    return add_slot(d, &plan, index, module, err);
}

static pc_status plan_saved(draft *d, int32_t index, const pc_module *module, pc_error *err)
{
    pc_slot_plan plan = {0};
    int64_t shape[PC_TENSOR_DIMS];
    pc_status status = check_dtype(module, err);
    if (status != PC_OK)
        return status;
    int ndim = pc_module_weight_shape(module, shape);
    plan.slot.replaces = true;
    pc_plan_shaped(&plan, PC_ROLE_SAVED_WEIGHT, module->dtype, ndim, shape, true, true);
    if (module->has_bias)
        pc_plan_tensor(&plan, PC_ROLE_SAVED_BIAS, module->dtype, 1, module->out_features, 0, 0, 0, true, true);
    return add_slot(d, &plan, index, module, err);
}

/* Saved modules come last, as in PEFT's state dict; pc_registry_activate relies on it. */
static pc_status plan_all(draft *d, const pc_method *method, const pc_config *config, const pc_base_copies *copies,
                          const pc_module_table *modules, const uint8_t *match, pc_error *err)
{
    pc_status status = PC_OK;
    for (size_t i = 0; i < modules->count && status == PC_OK; i++)
        status = plan_adapted(d, method, config, copies, (int32_t)i, &modules->items[i], match[i], err);
    for (size_t i = 0; i < modules->count && status == PC_OK; i++)
        if (match[i] == 2 && !modules->items[i].opaque)
            status = plan_saved(d, (int32_t)i, &modules->items[i], err);
    return status;
}

pc_likeness pc_tensor_likeness(const pc_tensor *tensor)
{
    pc_likeness same = {.role = tensor->role, .dtype = (int32_t)tensor->dtype, .ndim = tensor->ndim};
    for (int dim = 0; dim < tensor->ndim; dim++)
        same.shape[dim] = tensor->shape[dim];
    return same;
}

/* Give each tensor its place: those that are alike lie side by side, in their order.  A host makes its own tensors of
 * all of them in one call then, and what stays zero (LoRA's B) shares no pages with what is written. */
static pc_status lay_out(const draft *d, pc_error *err)
{
    const size_t none = SIZE_MAX;
    pc_likeness *keys = pc_calloc(d->tensor_count, sizeof *keys);
    size_t *next = pc_calloc(d->tensor_count, sizeof *next); /* of the same group */
    size_t *last = pc_calloc(d->tensor_count, sizeof *last); /* by a group's first tensor */
    bool *begins = pc_calloc(d->tensor_count, sizeof *begins);
    pc_strmap groups; /* key → first tensor */
    pc_strmap_init(&groups);
    bool good = keys != NULL && next != NULL && last != NULL && begins != NULL;
    for (size_t i = 0; good && i < d->tensor_count; i++) {
        keys[i] = pc_tensor_likeness(&d->tensors[i]);
        size_t first;
        next[i] = none;
        if (pc_strmap_get(&groups, (const char *)&keys[i], sizeof *keys, &first)) {
            next[last[first]] = i;
            last[first] = i;
        } else {
            begins[i] = true;
            last[i] = i;
            good = pc_strmap_put(&groups, (const char *)&keys[i], sizeof *keys, i);
        }
    }
    size_t at = 0;
    for (size_t i = 0; good && i < d->tensor_count; i++)
        for (size_t t = begins[i] ? i : none; t != none; t = next[t]) {
            d->tensors[t].offset = at;
            at += pc_align_up(d->tensors[t].nbytes); /* the sum was checked */
        }
    pc_strmap_free(&groups);
    pc_free(begins);
    pc_free(last);
    pc_free(next);
    pc_free(keys);
    return good ? PC_OK : pc_fail_nomem(err, "an adapter's plan");
}

static bool fill_tables(pc_adapter *adapter, const draft *d, size_t module_count)
{
    adapter->slots = pc_pool_array(&adapter->pool, d->slot_count, sizeof *adapter->slots);
    adapter->tensors = pc_pool_array(&adapter->pool, d->tensor_count, sizeof *adapter->tensors);
    adapter->slot_of_module = pc_pool_array(&adapter->pool, module_count, sizeof *adapter->slot_of_module);
    if (adapter->slots == NULL || adapter->tensors == NULL || adapter->slot_of_module == NULL)
        return false;
    memcpy(adapter->slots, d->slots, d->slot_count * sizeof *d->slots);
    memcpy(adapter->tensors, d->tensors, d->tensor_count * sizeof *d->tensors);
    adapter->slot_count = d->slot_count;
    adapter->tensor_count = d->tensor_count;
    adapter->module_count = module_count;
    for (size_t i = 0; i < module_count; i++)
        adapter->slot_of_module[i] = -1;
    for (size_t i = 0; i < d->slot_count; i++) {
        adapter->slot_of_module[d->slots[i].module] = (int32_t)i;
        adapter->has_saved_modules = adapter->has_saved_modules || d->slots[i].replaces;
    }
    for (size_t i = 0; i < d->tensor_count; i++)
        adapter->has_base_copies = adapter->has_base_copies || d->tensors[i].role == PC_ROLE_BASE_BIAS ||
                                   d->tensors[i].role == PC_ROLE_BASE_WEIGHT;
    return true;
}

static pc_status finish(const draft *d, const pc_method *method, const char *name, size_t name_len, pc_config *config,
                        size_t module_count, pc_adapter **out, pc_error *err)
{
    pc_adapter *adapter = pc_calloc(1, sizeof *adapter);
    if (adapter == NULL)
        return pc_fail_nomem(err, "an adapter");
    atomic_init(&adapter->references, 1);
    pc_pool_init(&adapter->pool);
    adapter->method = method;
    adapter->name = pc_pool_strndup(&adapter->pool, name, name_len);
    adapter->name_len = name_len;
    pc_status status = adapter->name != NULL && fill_tables(adapter, d, module_count)
                           ? pc_arena_new(d->bytes, &adapter->arena, err)
                           : pc_fail_nomem(err, "an adapter's tables");
    if (status != PC_OK) {
        pc_adapter_release(adapter); /* has no config yet: the caller keeps it */
        return status;
    }
    adapter->config = config;
    *out = adapter;
    return PC_OK;
}

pc_status pc_adapter_build(pc_registry *registry, const char *name, size_t name_len, pc_config *config,
                           const pc_weights *source, pc_adapter **out, pc_error *err)
{
    const pc_module_table *modules = pc_registry_modules(registry);
    const pc_method *method = pc_method_find(config->schema->peft_type, strlen(config->schema->peft_type));
    if (method == NULL)
        return pc_fail(err, PC_ERR_UNSUPPORTED, "no method %s; known are %s", config->schema->peft_type,
                       pc_method_names());
    pc_status status = check_name(name, name_len, err);
    if (status != PC_OK)
        return status;
    if (pc_registry_find(registry, name, name_len) != NULL)
        return pc_fail(err, PC_ERR_VALUE, "Adapter with name %.*s already exists. Please use a different name.",
                       (int)(name_len < 256 ? name_len : 256), name);
    uint8_t *match = pc_malloc(modules->count);
    status = match != NULL ? pc_match_modules(config, modules, match, err) : pc_fail_nomem(err, "an adapter's plan");
    draft d = {0};
    pc_base_copies copies = {0};
    if (status == PC_OK)
        status = pc_base_copies_init(&copies, config, modules, source, err);
    if (status == PC_OK) {
        size_t slots = 0;
        for (size_t i = 0; i < modules->count; i++)
            slots += match[i] == 2 || match[i] == 1 || takes_bias(config, &modules->items[i], match[i]);
        status = make_room(&d, slots) ? plan_all(&d, method, config, &copies, modules, match, err)
                                      : pc_fail_nomem(err, "an adapter's plan");
    }
    if (status == PC_OK)
        status = lay_out(&d, err);
    if (status == PC_OK)
        status = finish(&d, method, name, name_len, config, modules->count, out, err);
    pc_base_copies_free(&copies);
    pc_scratch_leave(d.tensors);
    pc_scratch_leave(d.slots);
    pc_free(match);
    return status;
}

/* ---------------------------------------------------------------- first values */

/* Streams of one slot are neighbours; no method has more roles than this. */
#define STREAMS_PER_SLOT 256u

pc_rng pc_slot_rng(const pc_slot *slot, uint64_t seed)
{
    return (pc_rng){.seed = seed, .stream = (uint64_t)(uint32_t)slot->module * STREAMS_PER_SLOT};
}

static pc_status copy_from_model(const pc_adapter *adapter, const pc_tensor *tensor, const void *source,
                                 const pc_module *module, pc_error *err)
{
    if (source == NULL)
        return pc_fail(err, PC_ERR_VALUE, "the values of module %s are not in memory; load it before adding adapters",
                       module->name);
    memcpy(pc_tensor_data(adapter, tensor), source, tensor->nbytes);
    return PC_OK;
}

pc_status pc_init_generic(const pc_adapter *adapter, const pc_slot *slot, const pc_module *module, pc_error *err)
{
    pc_status status = PC_OK;
    for (int32_t i = 0; i < slot->tensor_count && status == PC_OK; i++) {
        const pc_tensor *tensor = &adapter->tensors[slot->first_tensor + i];
        if (tensor->role == PC_ROLE_SAVED_WEIGHT || tensor->role == PC_ROLE_BASE_WEIGHT)
            status = copy_from_model(adapter, tensor, module->weight, module, err);
        else if (tensor->role == PC_ROLE_BASE_BIAS || tensor->role == PC_ROLE_SAVED_BIAS)
            status = copy_from_model(adapter, tensor, module->bias, module, err);
    }
    return status;
}

typedef struct initialiser {
    pc_runtime *rt;
    pc_registry *registry;
    pc_adapter *adapter;
    uint64_t seed;
    atomic_flag recorded; /* the first failure writes the error */
    pc_status status;
    pc_error *err;
} initialiser;

static pc_status init_slot(const initialiser *in, pc_runtime *rt, size_t i, pc_error *err)
{
    const pc_slot *slot = &in->adapter->slots[i];
    const pc_module *module = &pc_registry_modules(in->registry)->items[slot->module];
    pc_status status = pc_init_generic(in->adapter, slot, module, err);
    if (status == PC_OK && slot->adapts)
        status = in->adapter->method->init(rt, in->adapter, slot, module, pc_slot_rng(slot, in->seed), false, err);
    return status;
}

static void init_slots(void *ctx, int64_t begin, int64_t end)
{
    initialiser *in = ctx;
    for (int64_t i = begin; i < end; i++) {
        pc_error error;
        pc_status status = init_slot(in, NULL, (size_t)i, &error);
        if (status == PC_OK)
            continue;
        if (!atomic_flag_test_and_set(&in->recorded)) {
            in->status = status;
            if (in->err != NULL)
                *in->err = error;
        }
        return;
    }
}

/* From so many slots on, threads take slots; below, each slot's own loops are shared out. */
#define MANY_SLOTS 16

pc_status pc_adapter_init(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, uint64_t seed, pc_error *err)
{
    initialiser in = {
        .rt = rt, .registry = registry, .adapter = adapter, .seed = seed, .recorded = ATOMIC_FLAG_INIT, .err = err};
    if (adapter->slot_count >= MANY_SLOTS) {
        pc_parallel_for(rt, (int64_t)adapter->slot_count, 4, init_slots, &in);
        return in.status;
    }
    pc_status status = PC_OK;
    for (size_t i = 0; i < adapter->slot_count && status == PC_OK; i++)
        status = init_slot(&in, rt, i, err);
    return status;
}

/* ------------------------------------------------------- in another thread */

typedef struct init_filling {
    pc_filling base;
    initialiser in;
} init_filling;

static pc_status init_finish(pc_filling *filling, bool wanted, pc_error *err)
{
    init_filling *f = (init_filling *)filling;
    pc_background_finish(filling->job, wanted);
    const pc_status status = f->in.status;
    if (wanted && status != PC_OK && err != NULL)
        *err = filling->err;
    pc_free(f);
    return wanted ? status : PC_OK;
}

pc_status pc_filling_finish(pc_filling *filling, bool wanted, pc_error *err)
{
    return filling == NULL ? PC_OK : filling->finish(filling, wanted, err);
}

bool pc_fills_in_background(const pc_runtime *rt, const pc_adapter *adapter)
{
    const size_t bytes = pc_arena_size(adapter->arena);
    return pc_runtime_threads(rt) > 1 && bytes >= PC_BACKGROUND_LEAST && bytes < PC_BACKGROUND_MOST;
}

pc_status pc_adapter_init_begin(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, uint64_t seed,
                                pc_filling **out, pc_error *err)
{
    *out = NULL;
    init_filling *f = NULL;
    if (adapter->slot_count >= MANY_SLOTS && pc_fills_in_background(rt, adapter))
        f = pc_calloc(1, sizeof *f);
    if (f != NULL) {
        f->in = (initialiser){
            .registry = registry, .adapter = adapter, .seed = seed, .recorded = ATOMIC_FLAG_INIT, .err = &f->base.err};
        f->base.finish = init_finish;
        f->base.job = pc_background_start((int64_t)adapter->slot_count, 4, init_slots, &f->in);
        if (f->base.job != NULL) {
            *out = &f->base;
            return PC_OK;
        }
        pc_free(f);
    }
    return pc_adapter_init(rt, registry, adapter, seed, err);
}
