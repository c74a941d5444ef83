/* Base weights that travel with an adapter.
 *
 * Embeddings may have been resized or trained before they were adapted, so PEFT
 * saves the base weights of the input and output embeddings with an adapter
 * whose target_modules names embed_tokens or lm_head, and loads what it finds
 * in a file.  Here they belong to the adapter: they stand in for the module's
 * own while it is active, and the base model keeps its own. */
#include "support.h"

#include <string.h>

static bool ends_in(const char *name, size_t len, const char *tail)
{
    const size_t n = strlen(tail);
    return len >= n && memcmp(name + len - n, tail, n) == 0;
}

static bool is_embedding_name(const char *name, size_t len)
{
    return (len == strlen("embed_tokens") && ends_in(name, len, "embed_tokens")) ||
           (len == strlen("lm_head") && ends_in(name, len, "lm_head"));
}

/* PEFT's rule: a list has one of the two names as it is, a pattern matches a module of that name anywhere. */
static pc_status names_embeddings(const pc_selector *targets, const pc_module_table *modules, bool *found,
                                  pc_error *err)
{
    *found = false;
    for (size_t i = 0; targets->kind == PC_SELECT_LIST && i < targets->names.count; i++)
        *found = *found || is_embedding_name(targets->names.items[i].text, targets->names.items[i].len);
    pc_status status = PC_OK;
    for (size_t i = 0; targets->kind == PC_SELECT_REGEX && i < modules->count && !*found && status == PC_OK; i++) {
        const pc_module *module = &modules->items[i];
        const char *dot = strrchr(module->name, '.');
        const char *last = dot != NULL ? dot + 1 : module->name;
        if (is_embedding_name(last, strlen(last)))
            status = pc_selector_matches(targets, module->name, module->name_len, found, err);
    }
    return status;
}

static const char weight_tail[] = ".base_layer.weight", bias_tail[] = ".base_layer.bias";

pc_status pc_base_copies_init(pc_base_copies *copies, const pc_config *config, const pc_module_table *modules,
                              const pc_weights *source, pc_error *err)
{
    pc_strmap_init(&copies->in_source);
    for (size_t i = 0; source != NULL && i < source->count; i++) {
        const char *name = source->tensors[i].name;
        size_t len = source->tensors[i].name_len;
        pc_strip_peft_prefix(&name, &len);
        if ((ends_in(name, len, weight_tail) || ends_in(name, len, bias_tail)) &&
            !pc_strmap_put(&copies->in_source, name, len, i))
            return pc_fail_nomem(err, "the index of a file's tensors");
    }
    return names_embeddings(&config->target_modules, modules, &copies->embeddings, err);
}

void pc_base_copies_free(pc_base_copies *copies) { pc_strmap_free(&copies->in_source); }

static bool brings(const pc_base_copies *copies, const pc_module *module, const char *tail)
{
    char name[1024];
    size_t unused;
    const size_t tail_len = strlen(tail);
    if (module->name_len + tail_len > sizeof name)
        return false;
    memcpy(name, module->name, module->name_len);
    memcpy(name + module->name_len, tail, tail_len);
    return pc_strmap_get(&copies->in_source, name, module->name_len + tail_len, &unused);
}

void pc_base_copies_plan(const pc_base_copies *copies, const pc_module *module, pc_slot_plan *plan)
{
    if (module->opaque)
        return; /* the host's own parameters: it saves and loads them itself */
    const bool embedding = copies->embeddings && (module->input_embedding || module->output_embedding) &&
                           (module->kind == PC_LINEAR || module->kind == PC_EMBEDDING);
    bool has_bias = false;
    for (int i = 0; i < plan->tensor_count; i++)
        has_bias = has_bias || plan->tensors[i].role == PC_ROLE_BASE_BIAS;
    if (embedding || brings(copies, module, weight_tail)) {
        int64_t shape[PC_TENSOR_DIMS];
        int ndim = pc_module_weight_shape(module, shape);
        pc_plan_shaped(plan, PC_ROLE_BASE_WEIGHT, module->dtype, ndim, shape, true, false);
    }
    if (module->has_bias && !has_bias && (embedding || brings(copies, module, bias_tail)))
        pc_plan_tensor(plan, PC_ROLE_BASE_BIAS, module->dtype, 1, module->out_features, 0, 0, 0, true, false);
}

bool pc_is_base_copy(const pc_tensor *tensor)
{
    return tensor->role == PC_ROLE_BASE_WEIGHT || (tensor->role == PC_ROLE_BASE_BIAS && !tensor->trainable);
}
