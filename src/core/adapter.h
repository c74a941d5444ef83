/* An adapter: its config, what it does to which module, and its tensors. */
#ifndef PEFTC_CORE_ADAPTER_H
#define PEFTC_CORE_ADAPTER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arena.h"
#include "config.h"
#include "dtype.h"
#include "memory.h"
#include "module.h"

struct pc_method; /* src/methods/methods.h */

/* What a tensor is for.  A method numbers its own roles from 0; these are common to all. */
enum {
    PC_ROLE_BASE_BIAS = 100, /* the module's bias while the adapter is active (bias=…) */
    PC_ROLE_BASE_WEIGHT,     /* likewise its weight, where the adapter's file has that too (base_copies.c) */
    PC_ROLE_SAVED_WEIGHT,    /* modules_to_save: replaces the module's weight */
    PC_ROLE_SAVED_BIAS       /* modules_to_save: replaces the module's bias */
};

typedef struct pc_tensor {
    int role;
    pc_dtype dtype;
    int ndim;
    int64_t shape[PC_TENSOR_DIMS];
    size_t offset; /* into the arena */
    size_t nbytes;
    bool in_state_dict;
    bool trainable; /* receives gradients when the adapter is trainable and active */
    int32_t module; /* index into the module table */
} pc_tensor;

/* What the adapter does to one module: at most one slot per module. */
typedef struct pc_slot {
    int32_t module;
    int32_t first_tensor; /* the slot's tensors are contiguous in pc_adapter.tensors */
    int32_t tensor_count;
    bool adapts;   /* the method applies here; else the slot only carries a bias or a saved module */
    bool replaces; /* modules_to_save */
    bool feedforward; /* IA3: scale the input, not the output */
    bool subtracts; /* the method takes something out of the base weight; in a PC_ROLE_BASE_WEIGHT it is out already */
    int64_t rank;
    double alpha;
    double scaling;
} pc_slot;

typedef struct pc_adapter {
    atomic_size_t references;
    uint64_t id; /* unique in its registry */
    char *name;  /* owned by pool */
    size_t name_len;
    const struct pc_method *method;
    pc_config *config; /* owned */
    pc_arena *arena;
    pc_slot *slots;
    size_t slot_count;
    pc_tensor *tensors;
    size_t tensor_count;
    int32_t *slot_of_module; /* module index → slot index or -1 */
    size_t module_count;     /* length of slot_of_module; later modules have no slot */
    bool has_saved_modules;
    bool has_base_copies; /* any tensor of PC_ROLE_BASE_* */
    bool trainable;
    struct pc_gradients *gradients; /* gradients.h; NULL until the adapter is first trained */
    pc_pool pool; /* slots, tensors, slot_of_module, name */
} pc_adapter;

/* The slot for a module, or NULL. */
static inline const pc_slot *pc_adapter_slot(const pc_adapter *adapter, int32_t module)
{
    if ((size_t)module >= adapter->module_count)
        return NULL;
    int32_t slot = adapter->slot_of_module[module];
    return slot >= 0 ? &adapter->slots[slot] : NULL;
}

/* The slot's tensor with this role, or NULL. */
const pc_tensor *pc_slot_tensor(const pc_adapter *adapter, const pc_slot *slot, int role);

static inline void *pc_tensor_data(const pc_adapter *adapter, const pc_tensor *tensor)
{
    return (char *)pc_arena_data(adapter->arena) + tensor->offset;
}

/* Elements of a tensor. */
int64_t pc_tensor_count(const pc_tensor *tensor);

pc_adapter *pc_adapter_retain(pc_adapter *adapter);
void pc_adapter_release(pc_adapter *adapter); /* the last one frees it; NULL is allowed */

#endif
