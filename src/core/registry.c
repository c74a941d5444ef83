/* Locking.  One mutex guards the adapter list, the name map and the pointer to
 * the current activation.  It is held for a pointer swap or a reference count,
 * never while memory is released or tensors are touched.  Activations,
 * adapters and merged weights are immutable once published and are kept alive
 * by their reference counts alone. */
#include "registry.h"

#include <pthread.h>
#include <string.h>

#include "memory.h"

struct pc_registry {
    pthread_mutex_t lock;
    pc_module_table modules;
    pc_adapter **adapters; /* in the order added */
    size_t count, capacity;
    pc_strmap by_name; /* → index into adapters */
    pc_activation *current;
    uint64_t last_id, last_version;
};

/* ------------------------------------------------------------------ lifetime */

pc_merged *pc_merged_retain(pc_merged *merged)
{
    atomic_fetch_add_explicit(&merged->references, 1, memory_order_relaxed);
    return merged;
}

void pc_merged_release(pc_merged *merged)
{
    if (merged == NULL || atomic_fetch_sub_explicit(&merged->references, 1, memory_order_acq_rel) != 1)
        return;
    for (size_t i = 0; i < merged->adapter_count; i++)
        pc_adapter_release(merged->adapters[i]);
    pc_arena_release(merged->arena);
    pc_free(merged->adapters);
    pc_free(merged->weight);
    pc_free(merged->bias);
    pc_free(merged->dtype);
    pc_free(merged);
}

pc_activation *pc_activation_retain(pc_activation *activation)
{
    atomic_fetch_add_explicit(&activation->references, 1, memory_order_relaxed);
    return activation;
}

void pc_activation_release(pc_activation *activation)
{
    if (activation == NULL || atomic_fetch_sub_explicit(&activation->references, 1, memory_order_acq_rel) != 1)
        return;
    for (size_t i = 0; i < activation->count; i++)
        pc_adapter_release(activation->adapters[i]);
    pc_merged_release(activation->merged);
    pc_free(activation);
}

/* An activation with room for `count` adapters and one reference. */
static pc_activation *new_activation(size_t count)
{
    size_t bytes;
    if (!pc_mul_size(count, sizeof(pc_adapter *), &bytes) || !pc_add_size(bytes, sizeof(pc_activation), &bytes))
        return NULL;
    pc_activation *activation = pc_malloc(bytes);
    if (activation == NULL)
        return NULL;
    atomic_init(&activation->references, 1);
    activation->version = 0;
    activation->enabled = true;
    activation->merged = NULL;
    activation->count = 0;
    return activation;
}

pc_status pc_registry_new(pc_registry **out, pc_error *err)
{
    pc_registry *registry = pc_calloc(1, sizeof *registry);
    pc_activation *none = new_activation(0);
    if (registry == NULL || none == NULL || pthread_mutex_init(&registry->lock, NULL) != 0) {
        pc_free(registry);
        pc_free(none);
        return pc_fail_nomem(err, "a registry");
    }
    pc_module_table_init(&registry->modules);
    pc_strmap_init(&registry->by_name);
    registry->current = none;
    *out = registry;
    return PC_OK;
}

void pc_registry_free(pc_registry *registry)
{
    if (registry == NULL)
        return;
    pc_activation_release(registry->current);
    for (size_t i = 0; i < registry->count; i++)
        pc_adapter_release(registry->adapters[i]);
    pc_free(registry->adapters);
    pc_strmap_free(&registry->by_name);
    pc_module_table_free(&registry->modules);
    pthread_mutex_destroy(&registry->lock);
    pc_free(registry);
}

pc_module_table *pc_registry_modules(pc_registry *registry) { return &registry->modules; }

/* --------------------------------------------------------------- adapter list */

/* The mutex is not part of what a const registry promises to keep. */
static pthread_mutex_t *lock_of(const pc_registry *registry)
{
    return (pthread_mutex_t *)(uintptr_t)&registry->lock;
}

size_t pc_registry_count(const pc_registry *registry)
{
    pthread_mutex_lock(lock_of(registry));
    size_t count = registry->count;
    pthread_mutex_unlock(lock_of(registry));
    return count;
}

pc_adapter *pc_registry_at(const pc_registry *registry, size_t i)
{
    pthread_mutex_lock(lock_of(registry));
    pc_adapter *adapter = i < registry->count ? registry->adapters[i] : NULL;
    pthread_mutex_unlock(lock_of(registry));
    return adapter;
}

static pc_adapter *find_locked(const pc_registry *registry, const char *name, size_t len)
{
    size_t index;
    return pc_strmap_get(&registry->by_name, name, len, &index) ? registry->adapters[index] : NULL;
}

pc_adapter *pc_registry_find(const pc_registry *registry, const char *name, size_t len)
{
    pthread_mutex_lock(lock_of(registry));
    pc_adapter *adapter = find_locked(registry, name, len);
    pthread_mutex_unlock(lock_of(registry));
    return adapter;
}

static pc_status insert_locked(pc_registry *registry, pc_adapter *adapter, pc_error *err)
{
    if (find_locked(registry, adapter->name, adapter->name_len) != NULL)
        return pc_fail(err, PC_ERR_VALUE, "Adapter with name %s already exists. Please use a different name.",
                       adapter->name);
    if (registry->count == registry->capacity) {
        size_t capacity = registry->capacity != 0 ? registry->capacity * 2 : 8, bytes;
        pc_adapter **adapters = pc_mul_size(capacity, sizeof *adapters, &bytes)
                                    ? pc_realloc(registry->adapters, bytes)
                                    : NULL;
        if (adapters == NULL)
            return pc_fail_nomem(err, "the list of adapters");
        registry->adapters = adapters;
        registry->capacity = capacity;
    }
    if (!pc_strmap_put(&registry->by_name, adapter->name, adapter->name_len, registry->count))
        return pc_fail_nomem(err, "the list of adapters");
    adapter->id = ++registry->last_id;
    registry->adapters[registry->count++] = adapter;
    return PC_OK;
}

pc_status pc_registry_insert(pc_registry *registry, pc_adapter *adapter, pc_error *err)
{
    pthread_mutex_lock(&registry->lock);
    pc_status status = insert_locked(registry, adapter, err);
    pthread_mutex_unlock(&registry->lock);
    return status;
}

/* ----------------------------------------------------------------- activation */

/* Publish `next`; returns the one it replaces, to be released without the lock. */
static pc_activation *swap_locked(pc_registry *registry, pc_activation *next)
{
    pc_activation *old = registry->current;
    next->version = ++registry->last_version;
    registry->current = next;
    return old;
}

pc_activation *pc_registry_acquire(pc_registry *registry)
{
    pthread_mutex_lock(&registry->lock);
    pc_activation *activation = pc_activation_retain(registry->current);
    pthread_mutex_unlock(&registry->lock);
    return activation;
}

/* Append `text` to a message under construction; silently full at the end. */
static void append(char *buffer, size_t size, size_t *used, const char *text)
{
    size_t len = strlen(text), room = size - 1 - *used;
    if (len > room)
        len = room;
    memcpy(buffer + *used, text, len);
    *used += len;
    buffer[*used] = '\0';
}

static pc_status unknown_name(const pc_registry *registry, const char *name, size_t len, pc_error *err)
{
    char names[PC_ERROR_TEXT / 2];
    size_t used = 0;
    append(names, sizeof names, &used, "[");
    for (size_t i = 0; i < registry->count; i++) {
        append(names, sizeof names, &used, i != 0 ? ", '" : "'");
        append(names, sizeof names, &used, registry->adapters[i]->name);
        append(names, sizeof names, &used, "'");
    }
    append(names, sizeof names, &used, "]");
    int shown = len < 256 ? (int)len : 256;
    return pc_fail(err, PC_ERR_VALUE,
                   "Adapter with name %.*s not found. Please pass the correct adapter name among %s", shown, name,
                   names);
}

/* Do two adapters replace the same module?  Saved modules are the last slots of an adapter. */
static bool replace_same(const pc_adapter *a, const pc_adapter *b)
{
    if (!a->has_saved_modules || !b->has_saved_modules)
        return false;
    for (size_t i = a->slot_count; i-- > 0 && a->slots[i].replaces;) {
        const pc_slot *other = pc_adapter_slot(b, a->slots[i].module);
        if (other != NULL && other->replaces)
            return true;
    }
    return false;
}

static pc_status add_to_activation(pc_activation *activation, pc_adapter *adapter, pc_error *err)
{
    for (size_t i = 0; i < activation->count; i++) {
        if (activation->adapters[i] == adapter)
            return PC_OK; /* named twice: counts once */
        if (replace_same(activation->adapters[i], adapter))
            return pc_fail(err, PC_ERR_VALUE,
                           "Attempted to set multiple (['%s', '%s']) adapters at once for modules_to_save.",
                           activation->adapters[i]->name, adapter->name);
    }
    activation->adapters[activation->count++] = pc_adapter_retain(adapter);
    return PC_OK;
}

pc_status pc_registry_activate(pc_registry *registry, const char *const *names, const size_t *lens, size_t count,
                               pc_error *err)
{
    pc_activation *next = new_activation(count);
    if (next == NULL)
        return pc_fail_nomem(err, "the list of active adapters");
    pc_status status = PC_OK;
    pthread_mutex_lock(&registry->lock);
    for (size_t i = 0; i < count && status == PC_OK; i++) {
        pc_adapter *adapter = find_locked(registry, names[i], lens[i]);
        status = adapter != NULL ? add_to_activation(next, adapter, err)
                                 : unknown_name(registry, names[i], lens[i], err);
    }
    pc_activation *unused = next;
    if (status == PC_OK) {
        next->enabled = registry->current->enabled;
        unused = swap_locked(registry, next);
    }
    pthread_mutex_unlock(&registry->lock);
    pc_activation_release(unused);
    return status;
}

/* A copy of the current activation without `dropped` (NULL drops none), with the given merged weights. */
static pc_activation *copy_current_locked(pc_registry *registry, const pc_adapter *dropped, bool enabled,
                                          pc_merged *merged)
{
    const pc_activation *now = registry->current;
    pc_activation *next = new_activation(now->count);
    if (next == NULL)
        return NULL;
    for (size_t i = 0; i < now->count; i++)
        if (now->adapters[i] != dropped)
            next->adapters[next->count++] = pc_adapter_retain(now->adapters[i]);
    next->enabled = enabled;
    next->merged = merged != NULL ? pc_merged_retain(merged) : NULL;
    return next;
}

pc_status pc_registry_set_enabled(pc_registry *registry, bool enabled, pc_error *err)
{
    pc_activation *old = NULL;
    pc_status status = PC_OK;
    pthread_mutex_lock(&registry->lock);
    if (registry->current->enabled != enabled) {
        pc_activation *next = copy_current_locked(registry, NULL, enabled, registry->current->merged);
        if (next != NULL)
            old = swap_locked(registry, next);
        else
            status = pc_fail_nomem(err, "the list of active adapters");
    }
    pthread_mutex_unlock(&registry->lock);
    pc_activation_release(old);
    return status;
}

pc_status pc_registry_set_merged(pc_registry *registry, pc_merged *merged, pc_error *err)
{
    pc_activation *old = NULL;
    pc_status status = PC_OK;
    pthread_mutex_lock(&registry->lock);
    pc_activation *next = copy_current_locked(registry, NULL, registry->current->enabled, merged);
    if (next != NULL)
        old = swap_locked(registry, next);
    else
        status = pc_fail_nomem(err, "the list of active adapters");
    pthread_mutex_unlock(&registry->lock);
    pc_activation_release(old);
    pc_merged_release(merged); /* the activation holds its own reference */
    return status;
}

/* ------------------------------------------------------------------- removing */

static bool is_active(const pc_activation *activation, const pc_adapter *adapter)
{
    for (size_t i = 0; i < activation->count; i++)
        if (activation->adapters[i] == adapter)
            return true;
    return false;
}

static bool is_merged(const pc_merged *merged, const pc_adapter *adapter)
{
    for (size_t i = 0; merged != NULL && i < merged->adapter_count; i++)
        if (merged->adapters[i] == adapter)
            return true;
    return false;
}

static void unlist_locked(pc_registry *registry, const pc_adapter *adapter)
{
    size_t at = 0;
    while (registry->adapters[at] != adapter)
        at++;
    pc_strmap_remove(&registry->by_name, adapter->name, adapter->name_len);
    registry->count--;
    for (size_t i = at; i < registry->count; i++) {
        registry->adapters[i] = registry->adapters[i + 1];
        /* Replaces a value in place, so it cannot fail. */
        (void)pc_strmap_put(&registry->by_name, registry->adapters[i]->name, registry->adapters[i]->name_len, i);
    }
}

pc_status pc_registry_remove(pc_registry *registry, const char *name, size_t len, pc_error *err)
{
    pc_activation *old = NULL;
    pc_status status = PC_OK;
    pthread_mutex_lock(&registry->lock);
    pc_adapter *adapter = find_locked(registry, name, len);
    if (adapter == NULL) {
        int shown = len < 256 ? (int)len : 256;
        status = pc_fail(err, PC_ERR_VALUE, "The following adapter(s) are not present and cannot be deleted: {'%.*s'}",
                         shown, name);
    } else {
        const pc_activation *now = registry->current;
        /* Weights that contain a deleted adapter would keep it in effect: go back to the base weights. */
        bool merged = is_merged(now->merged, adapter);
        if (merged || is_active(now, adapter)) {
            pc_activation *next = copy_current_locked(registry, adapter, now->enabled, merged ? NULL : now->merged);
            if (next != NULL)
                old = swap_locked(registry, next);
            else
                status = pc_fail_nomem(err, "the list of active adapters");
        }
        if (status == PC_OK)
            unlist_locked(registry, adapter);
    }
    pthread_mutex_unlock(&registry->lock);
    pc_activation_release(old);
    if (status == PC_OK)
        pc_adapter_release(adapter);
    return status;
}

/* ------------------------------------------------------------------ replacing */

/* The current activation with `incoming` where `old` is. */
static pc_status activation_with(pc_registry *registry, const pc_adapter *old, pc_adapter *incoming,
                                 pc_activation **out, pc_error *err)
{
    const pc_activation *now = registry->current;
    pc_activation *next = new_activation(now->count);
    if (next == NULL)
        return pc_fail_nomem(err, "the list of active adapters");
    pc_status status = PC_OK;
    for (size_t i = 0; i < now->count && status == PC_OK; i++)
        status = add_to_activation(next, now->adapters[i] == old ? incoming : now->adapters[i], err);
    next->enabled = now->enabled;
    if (now->merged != NULL && !is_merged(now->merged, old))
        next->merged = pc_merged_retain(now->merged);
    if (status == PC_OK)
        *out = next;
    else
        pc_activation_release(next);
    return status;
}

/* Give `incoming` the name and the place of `old`, which goes from the list. */
static void take_place_locked(pc_registry *registry, const pc_adapter *old, pc_adapter *incoming, char *name)
{
    unlist_locked(registry, incoming);
    size_t at = 0;
    while (registry->adapters[at] != old)
        at++;
    incoming->name_len = old->name_len;
    incoming->name = name;
    registry->adapters[at] = incoming;
    /* The map's key is the old adapter's text.  Two entries go and one comes, so this cannot fail. */
    pc_strmap_remove(&registry->by_name, old->name, old->name_len);
    (void)pc_strmap_put(&registry->by_name, incoming->name, incoming->name_len, at);
}

pc_status pc_registry_replace(pc_registry *registry, const char *name, size_t len, const char *incoming,
                              size_t incoming_len, pc_error *err)
{
    pc_activation *unused = NULL;
    pc_status status;
    pthread_mutex_lock(&registry->lock);
    pc_adapter *old = find_locked(registry, name, len);
    pc_adapter *new = find_locked(registry, incoming, incoming_len);
    char *copy = NULL;
    if (old == NULL || new == NULL)
        status = old == NULL ? unknown_name(registry, name, len, err)
                             : unknown_name(registry, incoming, incoming_len, err);
    else if (old == new || is_active(registry->current, new) || is_merged(registry->current->merged, new))
        status = pc_fail(err, PC_ERR_VALUE, "adapter %s is active and cannot take the place of another", new->name);
    else if ((copy = pc_pool_strndup(&new->pool, old->name, old->name_len)) == NULL)
        status = pc_fail_nomem(err, "the name of an adapter");
    else
        status = activation_with(registry, old, new, &unused, err);
    if (status == PC_OK) {
        unused = swap_locked(registry, unused);
        take_place_locked(registry, old, new, copy);
    }
    pthread_mutex_unlock(&registry->lock);
    pc_activation_release(unused);
    if (status == PC_OK)
        pc_adapter_release(old);
    return status;
}
