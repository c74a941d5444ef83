/* The registry: one model's modules, its adapters, and which of them are active.
 *
 * What is active is one small immutable object, the activation.  Changing it
 * is swapping a pointer: the same cost for 1 adapter or 500, 10 modules or
 * 10,000.  A forward pass takes a reference at its start and uses that one to
 * its end, so it is entirely old or entirely new.
 *
 * Every function may be called from several threads at once, except where it
 * says otherwise.  The module table may only grow, and only while no other
 * thread uses the registry (the binding holds the GIL there).
 */
#ifndef PEFTC_CORE_REGISTRY_H
#define PEFTC_CORE_REGISTRY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adapter.h"
#include "module.h"
#include "status.h"

/* Base weights with the active adapters' deltas added in (merge_adapter). */
typedef struct pc_merged {
    atomic_size_t references;
    pc_arena *arena;
    size_t module_count;
    void **weight; /* by module index; NULL where the base weight stands */
    void **bias;
    pc_dtype *dtype; /* by module index: what weight and bias are stored in */
    pc_adapter **adapters; /* those merged, in order; retained */
    size_t adapter_count;
} pc_merged;

pc_merged *pc_merged_retain(pc_merged *merged);
void pc_merged_release(pc_merged *merged); /* NULL is allowed */

typedef struct pc_activation {
    atomic_size_t references;
    uint64_t version; /* grows with each swap */
    bool enabled;
    pc_merged *merged; /* NULL when nothing is merged */
    size_t count;
    pc_adapter *adapters[]; /* in the order they apply; retained */
} pc_activation;

typedef struct pc_registry pc_registry;

pc_status pc_registry_new(pc_registry **out, pc_error *err);
void pc_registry_free(pc_registry *registry); /* NULL is allowed */

pc_module_table *pc_registry_modules(pc_registry *registry);

/* Number of adapters; adapter i in the order added (borrowed), or NULL. */
size_t pc_registry_count(const pc_registry *registry);
pc_adapter *pc_registry_at(const pc_registry *registry, size_t i);
/* The adapter with this name (borrowed), or NULL. */
pc_adapter *pc_registry_find(const pc_registry *registry, const char *name, size_t len);

/* Take over one reference of `adapter` and list it (inactive); its name must be
 * new, else PC_ERR_VALUE and nothing changes (the caller keeps its reference). */
pc_status pc_registry_insert(pc_registry *registry, pc_adapter *adapter, pc_error *err);

/* Make exactly these adapters active, in this order.  Unknown names are
 * PC_ERR_VALUE; so are two adapters that both replace the same module
 * (modules_to_save).  Duplicate names count once, at their first place.
 * Merged weights stand for what was active when they were made: they go in the
 * same step.  All or nothing. */
pc_status pc_registry_activate(pc_registry *registry, const char *const *names, const size_t *lens, size_t count,
                               pc_error *err);

pc_status pc_registry_set_enabled(pc_registry *registry, bool enabled, pc_error *err);

/* Install (or with NULL remove) merged weights; takes over the reference. */
pc_status pc_registry_set_merged(pc_registry *registry, pc_merged *merged, pc_error *err);

/* Remove one adapter: from the list, and from the active ones if it is among
 * them.  Unknown is PC_ERR_VALUE.  Its memory goes when no forward pass and no
 * view uses it any more. */
pc_status pc_registry_remove(pc_registry *registry, const char *name, size_t len, pc_error *err);

/* Let the inactive adapter `incoming` take the place of `name`: its name, its
 * place in the list, and its place among the active ones.  Merged weights go if
 * `name` is merged.  Unknown names are PC_ERR_VALUE, and so is an `incoming`
 * that is active, or that replaces a module which another active adapter
 * replaces.  All or nothing. */
pc_status pc_registry_replace(pc_registry *registry, const char *name, size_t len, const char *incoming,
                              size_t incoming_len, pc_error *err);

/* The current activation with a new reference; never NULL. */
pc_activation *pc_registry_acquire(pc_registry *registry);
pc_activation *pc_activation_retain(pc_activation *activation);
void pc_activation_release(pc_activation *activation); /* NULL is allowed */

#endif
