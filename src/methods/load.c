/* From a file (or a dict of arrays) into an adapter's arena.
 *
 * Every name is looked up once, every tensor checked before the first byte is
 * read, and each is read straight to its place; only a tensor of another float
 * dtype goes through a scratch buffer. */
#include "support.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

typedef struct loader {
    pc_runtime *rt;
    pc_registry *registry;
    pc_adapter *adapter;
    pc_weights *source;
    pc_load_report *report;
    pc_strmap names;      /* name without prefix → index in source */
    int32_t *tensor_of;   /* by index in source: the adapter's tensor, or -1 */
    bool *found;          /* by tensor */
    pc_pool pool;
} loader;

void pc_load_report_free(pc_load_report *report) { pc_pool_free(&report->pool); }

static pc_status index_source(loader *l, pc_error *err)
{
    l->tensor_of = pc_pool_array(&l->pool, l->source->count, sizeof *l->tensor_of);
    l->found = pc_pool_array(&l->pool, l->adapter->tensor_count, sizeof *l->found);
    if (l->tensor_of == NULL || l->found == NULL)
        return pc_fail_nomem(err, "the index of a file's tensors");
    for (size_t i = 0; i < l->source->count; i++) {
        const char *name = l->source->tensors[i].name;
        size_t len = l->source->tensors[i].name_len;
        l->tensor_of[i] = -1;
        pc_strip_peft_prefix(&name, &len);
        if (!pc_strmap_put(&l->names, name, len, i))
            return pc_fail_nomem(err, "the index of a file's tensors");
    }
    return PC_OK;
}

/* Names that a file may use for a tensor besides the one that peftc writes. */
static bool find_variant(const loader *l, const pc_tensor *tensor, const pc_string *key, size_t *index)
{
    static const char base_layer[] = ".base_layer.bias", weight[] = ".weight";
    char name[1024];
    if (key->len + sizeof weight > sizeof name)
        return false;
    memcpy(name, key->text, key->len);
    if (tensor->role == PC_ROLE_BASE_BIAS) { /* "<module>.bias" */
        const size_t tail = sizeof base_layer - 1;
        if (key->len <= tail || memcmp(name + key->len - tail, base_layer, tail) != 0)
            return false;
        size_t stem = key->len - tail;
        memcpy(name + stem, ".bias", 5);
        return pc_strmap_get(&l->names, name, stem + 5, index);
    }
    /* A parameter that a file calls as the model does (DoRA's magnitude before and after PEFT 0.9). */
    memcpy(name + key->len, weight, sizeof weight - 1);
    return pc_strmap_get(&l->names, name, key->len + sizeof weight - 1, index);
}

static bool same_shape(const pc_tensor *tensor, const pc_tensor_info *info)
{
    bool same = tensor->ndim == info->ndim;
    for (int d = 0; same && d < tensor->ndim; d++)
        same = (uint64_t)tensor->shape[d] == info->shape[d];
    return same;
}

static void shape_text(char *out, size_t size, int ndim, const uint64_t *shape)
{
    size_t used = 0;
    out[0] = '\0';
    for (int d = 0; d < ndim && d < 8 && used + 24 < size; d++)
        used += (size_t)snprintf(out + used, size - used, d != 0 ? ", %" PRIu64 : "%" PRIu64, shape[d]);
    if (ndim > 8)
        snprintf(out + used, size - used, ", ...");
}

static pc_status check_tensor(const loader *l, const pc_tensor *tensor, const pc_tensor_info *info, pc_error *err)
{
    const int shown = info->name_len < 512 ? (int)info->name_len : 512;
    if (!same_shape(tensor, info)) {
        char theirs[256], ours[128];
        uint64_t shape[PC_TENSOR_DIMS];
        for (int d = 0; d < tensor->ndim; d++)
            shape[d] = (uint64_t)tensor->shape[d];
        shape_text(theirs, sizeof theirs, info->ndim, info->shape);
        shape_text(ours, sizeof ours, tensor->ndim, shape);
        return pc_fail(err, PC_ERR_VALUE,
                       "size mismatch for %.*s: %s has shape [%s], the adapter needs [%s]; the config does not belong "
                       "to these weights, or the base model has other dimensions",
                       shown, info->name, l->source->label, theirs, ours);
    }
    if (!pc_dtype_get(info->dtype)->is_float)
        return pc_fail(err, PC_ERR_VALUE, "%s: tensor %.*s has dtype %s; adapter weights are F64, F32, F16 or BF16",
                       l->source->label, shown, info->name, pc_dtype_get(info->dtype)->name);
    return PC_OK;
}

static pc_status find_tensor(loader *l, size_t t, pc_strings *missing, pc_string *missing_items, pc_error *err)
{
    const pc_tensor *tensor = &l->adapter->tensors[t];
    if (!tensor->in_state_dict)
        return PC_OK;
    pc_string key;
    size_t index;
    pc_status status = pc_tensor_name(l->registry, l->adapter, tensor, false, &l->pool, &key, err);
    if (status != PC_OK)
        return status;
    if (pc_strmap_get(&l->names, key.text, key.len, &index) || find_variant(l, tensor, &key, &index)) {
        l->tensor_of[index] = (int32_t)t;
        l->found[t] = true;
        return check_tensor(l, tensor, &l->source->tensors[index], err);
    }
    if (tensor->role == PC_ROLE_SAVED_WEIGHT || tensor->role == PC_ROLE_SAVED_BIAS)
        return pc_fail(err, PC_ERR_KEY, "%s: %s has no such tensor, and modules_to_save names its module", key.text,
                       l->source->label);
    /* PEFT does not write the biases of bias="lora_only", and base weights need not be there: the model's own stand in. */
    if (pc_is_base_copy(tensor) || (tensor->role == PC_ROLE_BASE_BIAS && l->adapter->config->bias == PC_BIAS_ADAPTED))
        return PC_OK;
    missing_items[missing->count++] = key;
    return PC_OK;
}

static pc_status copy_strings(pc_pool *pool, const pc_string *items, size_t count, pc_strings *out, pc_error *err)
{
    pc_string *copy = pc_pool_array(pool, count, sizeof *copy);
    if (copy == NULL)
        return pc_fail_nomem(err, "a load report");
    for (size_t i = 0; i < count; i++) {
        copy[i].len = items[i].len;
        copy[i].text = pc_pool_strndup(pool, items[i].text, items[i].len);
        if (copy[i].text == NULL)
            return pc_fail_nomem(err, "a load report");
    }
    *out = (pc_strings){copy, count};
    return PC_OK;
}

static pc_status match_names(loader *l, pc_error *err)
{
    pc_strings missing = {NULL, 0};
    pc_string *items = pc_pool_array(&l->pool, l->adapter->tensor_count, sizeof *items);
    if (items == NULL)
        return pc_fail_nomem(err, "a load report");
    for (size_t t = 0; t < l->adapter->tensor_count; t++) {
        pc_status status = find_tensor(l, t, &missing, items, err);
        if (status != PC_OK)
            return status;
    }
    pc_status status = copy_strings(&l->report->pool, items, missing.count, &l->report->missing, err);
    if (status != PC_OK)
        return status;
    size_t unexpected = 0;
    for (size_t i = 0; i < l->source->count; i++)
        unexpected += l->tensor_of[i] < 0;
    items = pc_pool_array(&l->pool, unexpected, sizeof *items);
    if (items == NULL)
        return pc_fail_nomem(err, "a load report");
    size_t n = 0;
    for (size_t i = 0; i < l->source->count; i++)
        if (l->tensor_of[i] < 0)
            items[n++] = (pc_string){l->source->tensors[i].name, l->source->tensors[i].name_len};
    return copy_strings(&l->report->pool, items, n, &l->report->unexpected, err);
}

/* What the file does not bring.  A slot that it fills completely draws no random number. */
static pc_status init_rest(loader *l, uint64_t seed, pc_error *err)
{
    const pc_module_table *modules = pc_registry_modules(l->registry);
    pc_status status = PC_OK;
    for (size_t i = 0; i < l->adapter->slot_count && status == PC_OK; i++) {
        const pc_slot *slot = &l->adapter->slots[i];
        const pc_module *module = &modules->items[slot->module];
        bool complete = true, generic = false;
        for (int32_t t = slot->first_tensor; t < slot->first_tensor + slot->tensor_count; t++) {
            const pc_tensor *tensor = &l->adapter->tensors[t];
            bool base = tensor->role == PC_ROLE_BASE_BIAS || tensor->role == PC_ROLE_BASE_WEIGHT;
            bool lacks = tensor->in_state_dict && !l->found[t];
            complete = complete && (!lacks || base);
            generic = generic || (lacks && base);
        }
        if (generic)
            status = pc_init_generic(l->adapter, slot, module, err);
        if (status == PC_OK && slot->adapts)
            status = l->adapter->method->init(l->rt, l->adapter, slot, module, pc_slot_rng(slot, seed), complete, err);
    }
    return status;
}

/* Tensors that go straight to their place, on every thread: first writes to a
 * new arena are page faults, which cost more than the copy and scale with threads. */
typedef struct straight {
    const loader *l;
    atomic_flag recorded; /* the first failure writes the error */
    pc_status status;
    pc_error *err;
} straight;

static bool goes_straight(const loader *l, size_t i)
{
    return l->tensor_of[i] >= 0 && l->source->tensors[i].dtype == l->adapter->tensors[l->tensor_of[i]].dtype;
}

static void read_straight(void *ctx, int64_t begin, int64_t end)
{
    straight *s = ctx;
    const loader *l = s->l;
    for (int64_t i = begin; i < end; i++) {
        if (!goes_straight(l, (size_t)i))
            continue;
        pc_error error;
        void *data = pc_tensor_data(l->adapter, &l->adapter->tensors[l->tensor_of[i]]);
        pc_status status = l->source->read(l->source, (size_t)i, data, &error);
        if (status == PC_OK)
            continue;
        if (!atomic_flag_test_and_set(&s->recorded)) {
            s->status = status;
            if (s->err != NULL)
                *s->err = error;
        }
        return;
    }
}

/* Tensors of another float dtype: one at a time through a scratch buffer. */
static pc_status read_converted(loader *l, pc_error *err)
{
    size_t largest = 0;
    for (size_t i = 0; i < l->source->count; i++)
        if (l->tensor_of[i] >= 0 && !goes_straight(l, i) && l->source->tensors[i].nbytes > largest)
            largest = (size_t)l->source->tensors[i].nbytes;
    if (largest == 0)
        return PC_OK;
    void *scratch = pc_block_alloc(largest);
    if (scratch == NULL)
        return pc_fail(err, PC_ERR_NOMEM, "out of memory while converting a tensor of %zu bytes", largest);
    pc_status status = PC_OK;
    for (size_t i = 0; i < l->source->count && status == PC_OK; i++) {
        if (l->tensor_of[i] < 0 || goes_straight(l, i))
            continue;
        const pc_tensor *tensor = &l->adapter->tensors[l->tensor_of[i]];
        status = l->source->read(l->source, i, scratch, err);
        if (status == PC_OK)
            pc_convert(l->rt, tensor->dtype, pc_tensor_data(l->adapter, tensor), l->source->tensors[i].dtype, scratch,
                       pc_tensor_count(tensor));
    }
    pc_block_free(scratch, largest);
    return status;
}

/* A file smaller than this is read before another thread has woken up. */
#define SHARED_READ_BYTES ((uint64_t)2 << 20)

/* Memory to read into is made ready in steps of this size, each in a call of its own: while the kernel is at one, another
 * thread that maps memory, as Python does for its objects, waits. */
#define POPULATE_BYTES ((size_t)64 << 10)
/* From here on the pages are huge ones, which are better made just before they are filled: they are in the cache then. */
#define POPULATE_MOST ((size_t)64 << 20)

static void populate(void *ctx, int64_t begin, int64_t end)
{
    const pc_arena *arena = ctx;
    for (int64_t step = begin; step < end; step++) {
        const size_t from = (size_t)step * POPULATE_BYTES, left = pc_arena_size(arena) - from;
        pc_block_populate((char *)pc_arena_data(arena) + from, left < POPULATE_BYTES ? left : POPULATE_BYTES);
    }
}

static pc_status read_tensors(loader *l, pc_error *err)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < l->source->count; i++)
        bytes += goes_straight(l, i) ? l->source->tensors[i].nbytes : 0;
    straight s = {.l = l, .status = PC_OK, .recorded = ATOMIC_FLAG_INIT, .err = err};
    bool shared = l->source->concurrent && bytes >= SHARED_READ_BYTES;
    pc_arena *arena = l->adapter->arena;
    if (bytes >= SHARED_READ_BYTES && pc_arena_size(arena) < POPULATE_MOST)
        pc_parallel_for(l->rt, (int64_t)((pc_arena_size(arena) + POPULATE_BYTES - 1) / POPULATE_BYTES), 16, populate, arena);
    pc_parallel_for(shared ? l->rt : NULL, (int64_t)l->source->count, 1, read_straight, &s);
    return s.status == PC_OK ? read_converted(l, err) : s.status;
}

/* All but the reading. */
static pc_status prepare(loader *l, uint64_t seed, pc_error *err)
{
    if (l->source->count > INT32_MAX)
        return pc_fail(err, PC_ERR_VALUE, "%s has too many tensors (%zu)", l->source->label, l->source->count);
    pc_status status = index_source(l, err);
    if (status == PC_OK)
        status = match_names(l, err);
    return status == PC_OK ? init_rest(l, seed, err) : status;
}

static void free_loader(loader *l)
{
    pc_strmap_free(&l->names);
    pc_pool_free(&l->pool);
}

pc_status pc_adapter_load(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, pc_weights *source, uint64_t seed,
                          pc_load_report *report, pc_error *err)
{
    loader l = {.rt = rt, .registry = registry, .adapter = adapter, .source = source, .report = report};
    pc_pool_init(&l.pool);
    pc_strmap_init(&l.names);
    pc_status status = prepare(&l, seed, err);
    if (status == PC_OK)
        status = read_tensors(&l, err);
    free_loader(&l);
    return status;
}

/* ------------------------------------------------------- in another thread */

typedef struct load_filling {
    pc_filling base;
    loader l;
    straight s;
} load_filling;

static pc_status load_finish(pc_filling *filling, bool wanted, pc_error *err)
{
    load_filling *f = (load_filling *)filling;
    pc_background_finish(filling->job, wanted);
    pc_status status = wanted ? f->s.status : PC_OK;
    if (status != PC_OK && err != NULL)
        *err = filling->err;
    if (wanted && status == PC_OK)
        status = read_converted(&f->l, err);
    free_loader(&f->l);
    pc_free(f);
    return status;
}

/* Memory is made ready, then tensors are read: ranges of one loop, so that both threads find something to do. */
static void populate_and_read(void *ctx, int64_t begin, int64_t end)
{
    const straight *s = ctx;
    pc_arena *arena = s->l->adapter->arena;
    const int64_t steps = (int64_t)((pc_arena_size(arena) + POPULATE_BYTES - 1) / POPULATE_BYTES);
    if (begin < steps)
        populate(arena, begin, end < steps ? end : steps);
    if (end > steps)
        read_straight(ctx, begin < steps ? 0 : begin - steps, end - steps);
}

pc_status pc_adapter_load_begin(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, pc_weights *source,
                                uint64_t seed, pc_load_report *report, pc_filling **out, pc_error *err)
{
    *out = NULL;
    load_filling *f = NULL;
    if (source->concurrent && pc_fills_in_background(rt, adapter))
        f = pc_calloc(1, sizeof *f);
    if (f == NULL)
        return pc_adapter_load(rt, registry, adapter, source, seed, report, err);
    f->l = (loader){.rt = rt, .registry = registry, .adapter = adapter, .source = source, .report = report};
    f->s = (straight){.l = &f->l, .status = PC_OK, .recorded = ATOMIC_FLAG_INIT, .err = &f->base.err};
    f->base.finish = load_finish;
    pc_pool_init(&f->l.pool);
    pc_strmap_init(&f->l.names);
    pc_status status = prepare(&f->l, seed, err);
    if (status == PC_OK) {
        const int64_t steps = (int64_t)((pc_arena_size(adapter->arena) + POPULATE_BYTES - 1) / POPULATE_BYTES);
        f->base.job = pc_background_start(steps + (int64_t)source->count, 8, populate_and_read, &f->s);
        if (f->base.job != NULL) {
            *out = &f->base;
            return PC_OK;
        }
        status = read_tensors(&f->l, err);
    }
    free_loader(&f->l);
    pc_free(f);
    return status;
}
