/* What tensors are called, in files and in the model.
 *
 *     <module>.lora_A.weight                    in a state dict
 *     <module>.lora_A.<adapter>.weight          in the model
 *     <module>.base_layer.bias                  bias of an adapted module, both
 *     <module>.base_layer.weight                its weight, both
 *     <module>.bias                             bias of another module, both
 *     <root>.<rest>.weight                      modules_to_save, in a state dict
 *     <root>.modules_to_save.<adapter>.<rest>.weight   in the model
 *
 * where <root> is the module that modules_to_save names and <rest> the way from
 * it to the layer (nothing when it is the layer itself). */
#include "support.h"

#include <string.h>

typedef struct piece {
    const char *text;
    size_t len;
} piece;

#define MOST_PIECES 8

static piece text_piece(const char *text) { return (piece){text, strlen(text)}; }

static pc_status join(const piece *pieces, size_t count, pc_pool *pool, pc_string *out, pc_error *err)
{
    size_t len = 0;
    bool fits = true;
    for (size_t i = 0; i < count; i++)
        fits = fits && pc_add_size(len, pieces[i].len, &len);
    char *text = fits && len < SIZE_MAX ? pc_pool_alloc(pool, len + 1) : NULL;
    if (text == NULL)
        return pc_fail_nomem(err, "a tensor's name");
    char *at = text;
    for (size_t i = 0; i < count; i++) {
        memcpy(at, pieces[i].text, pieces[i].len);
        at += pieces[i].len;
    }
    *out = (pc_string){text, len};
    return PC_OK;
}

void pc_strip_peft_prefix(const char **name, size_t *len)
{
    static const char peft_prefix[] = "base_model.model.";
    const size_t prefix = sizeof peft_prefix - 1;
    if (*len > prefix && memcmp(*name, peft_prefix, prefix) == 0) {
        *name += prefix;
        *len -= prefix;
    }
}

static const pc_role_name *role_name(const pc_method *method, int role)
{
    for (size_t i = 0; i < method->role_count; i++)
        if (method->roles[i].role == role)
            return &method->roles[i];
    return NULL;
}

static size_t saved_name(const pc_adapter *adapter, const pc_module *module, bool with_adapter_name, piece *pieces)
{
    size_t root = pc_saved_root(adapter->config, module->name, module->name_len), n = 0;
    pieces[n++] = (piece){module->name, with_adapter_name ? root : module->name_len};
    if (with_adapter_name) {
        pieces[n++] = text_piece(".modules_to_save.");
        pieces[n++] = (piece){adapter->name, adapter->name_len};
        pieces[n++] = (piece){module->name + root, module->name_len - root};
    }
    return n;
}

pc_status pc_tensor_name(const pc_registry *registry, const pc_adapter *adapter, const pc_tensor *tensor,
                         bool with_adapter_name, pc_pool *pool, pc_string *out, pc_error *err)
{
    /* The table may be read through a const registry; there is one accessor. */
    const pc_module *module = &pc_registry_modules((pc_registry *)(uintptr_t)registry)->items[tensor->module];
    piece pieces[MOST_PIECES];
    size_t n = 0;
    if (tensor->role == PC_ROLE_SAVED_WEIGHT || tensor->role == PC_ROLE_SAVED_BIAS) {
        n = saved_name(adapter, module, with_adapter_name, pieces);
        pieces[n++] = text_piece(tensor->role == PC_ROLE_SAVED_WEIGHT ? ".weight" : ".bias");
        return join(pieces, n, pool, out, err);
    }
    pieces[n++] = (piece){module->name, module->name_len};
    if (tensor->role == PC_ROLE_BASE_BIAS) {
        const pc_slot *slot = pc_adapter_slot(adapter, tensor->module);
        pieces[n++] = text_piece(slot != NULL && slot->adapts ? ".base_layer.bias" : ".bias");
        return join(pieces, n, pool, out, err);
    }
    if (tensor->role == PC_ROLE_BASE_WEIGHT) {
        pieces[n++] = text_piece(".base_layer.weight");
        return join(pieces, n, pool, out, err);
    }
    const pc_role_name *name = role_name(adapter->method, tensor->role);
    if (name == NULL)
        return pc_fail(err, PC_ERR_RUNTIME, "method %s has a tensor without a name (role %d)",
                       adapter->method->schema.peft_type, tensor->role);
    pieces[n++] = text_piece(".");
    pieces[n++] = text_piece(name->parameter);
    if (with_adapter_name) {
        pieces[n++] = text_piece(".");
        pieces[n++] = (piece){adapter->name, adapter->name_len};
    }
    if (with_adapter_name || !name->plain_in_file)
        pieces[n++] = text_piece(name->suffix);
    return join(pieces, n, pool, out, err);
}
