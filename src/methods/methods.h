/* PEFT methods: what an adapter method must provide, and what the engine
 * offers on top of all of them.
 *
 * Adding a method = one file here with a pc_method, one row in methods.c, and
 * one dataclass in peftc/config.py.
 */
#ifndef PEFTC_METHODS_METHODS_H
#define PEFTC_METHODS_METHODS_H

#include "../core/adapter.h"
#include "../core/config.h"
#include "../core/module.h"
#include "../core/parallel.h"
#include "../core/registry.h"
#include "../core/rng.h"
#include "../core/weights.h"

/* One forward call of one module.  Linear-like modules see x as (rows, in);
 * Conv2d as (rows, in, height, width); Embedding as rows int64 ids, already
 * checked against the table. */
typedef struct pc_call {
    pc_runtime *rt;
    const pc_module *module; /* weight and bias are those in effect for this call */
    int32_t module_index;
    pc_dtype compute; /* PC_F32 or PC_F64: the dtype of x and y */
    int64_t rows;
    int64_t height, width, out_height, out_width; /* Conv2d only */
    bool training;
    pc_rng rng; /* for dropout; stream differs from call to call */
    int64_t padding_idx; /* Embedding: ids that get no gradient; else -1 */
} pc_call;

/* A gradient that several parts add up: the first one writes it. */
typedef struct pc_sum {
    void *data;
    bool filled;
} pc_sum;

/* Where the gradient of a weight goes: added up in f32 or f64; sum is NULL when it is not wanted. */
typedef struct pc_target {
    void *sum;
    pc_dtype dtype;
} pc_target;

/* The way back through what one adapter did to one module's call.  Gradients are of the call's compute dtype. */
typedef struct pc_way_back {
    const void *x;    /* the input that the adapter saw */
    const void *kept; /* the running result before `after`, when the method keeps it */
    void *dy;         /* in: of the result after `after`; out: of the result before it */
    pc_sum *dx;       /* of x, what reaches it beside the base operation; NULL when not wanted */
    pc_target bias;   /* of the bias in effect */
} pc_way_back;

/* How a tensor is called: PEFT's name inside the module, without the adapter's. */
typedef struct pc_role_name {
    int role;
    const char *parameter; /* "lora_A" */
    const char *suffix;    /* ".weight" when the parameter sits in a submodule, else "" */
    bool plain_in_file;    /* the file key omits the suffix (DoRA's magnitude) */
} pc_role_name;

/* A method fills this when it plans one module. */
#define PC_PLAN_TENSORS 8
typedef struct pc_slot_plan {
    pc_slot slot;
    pc_tensor tensors[PC_PLAN_TENSORS]; /* role, dtype, ndim, shape, flags */
    int tensor_count;
} pc_slot_plan;

/* Append a tensor to a plan; dims not used are 0. */
void pc_plan_tensor(pc_slot_plan *plan, int role, pc_dtype dtype, int ndim, int64_t d0, int64_t d1, int64_t d2,
                    int64_t d3, bool in_state_dict, bool trainable);
/* The same for any number of dimensions. */
void pc_plan_shaped(pc_slot_plan *plan, int role, pc_dtype dtype, int ndim, const int64_t *shape, bool in_state_dict,
                    bool trainable);

typedef struct pc_method {
    pc_schema schema;
    const char *prefix; /* of its parameters: "lora_", "ia3_" */
    const pc_role_name *roles;
    size_t role_count;

    /* Which tensors does the adapter need for this module?  PC_ERR_VALUE with
     * PEFT's text when the kind is not supported or the values cannot work. */
    pc_status (*plan)(const pc_config *config, const pc_module *module, pc_slot_plan *plan, pc_error *err);

    /* Fill a slot's fresh tensors (the arena is zero).  For a load, what the
     * file does not bring: `loading` is true, and only what is not read from
     * the file needs a value. */
    pc_status (*init)(pc_runtime *rt, pc_adapter *adapter, const pc_slot *slot, const pc_module *module, pc_rng rng,
                      bool loading, pc_error *err);

    /* Before the base operation: may replace *x by a new buffer from `scratch`. NULL: does nothing. */
    pc_status (*before)(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void **x,
                        pc_pool *scratch, pc_error *err);

    /* After it: y holds the running result and is changed in place; x is what this adapter saw. */
    pc_status (*after)(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x, void *y,
                       pc_pool *scratch, pc_error *err);

    /* Gradients.  Does the way back through `after` need the running result from before it?  NULL: never. */
    bool (*keeps_result)(const pc_adapter *adapter, const pc_slot *slot);
    /* Through `after`: add to the gradients of the adapter's tensors and to way->dx, and turn way->dy. NULL: dy stays. */
    pc_status (*after_back)(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot,
                            const pc_way_back *way, pc_pool *scratch, pc_error *err);
    /* Through `before`, which got x: dx, the gradient of what it gave, becomes that of x in place. NULL: dx stays. */
    pc_status (*before_back)(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x,
                             void *dx, pc_pool *scratch, pc_error *err);

    /* Fold the adapter into a weight and bias of dtype `compute` (bias may be NULL). */
    pc_status (*merge)(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                       pc_dtype compute, void *weight, void *bias, pc_error *err);
} pc_method;

/* The table. */
extern const pc_method *const pc_methods[];
extern const size_t pc_method_count;
const pc_method *pc_method_find(const char *peft_type, size_t len);
/* "LORA, IA3, ADALORA": for messages. */
const char *pc_method_names(void);

/* ------------------------------------------------------------------ targets */

/* Which modules does the config name?  Fills match[module index]: 0 no,
 * 1 target, 2 modules_to_save.  PC_ERR_VALUE "Target modules … not found in the
 * base model. …" when no module matches any target. */
pc_status pc_match_modules(const pc_config *config, const pc_module_table *modules, uint8_t *match, pc_error *err);

/* One key against one selector, PEFT's rule (targets.c). */
pc_status pc_selector_matches(const pc_selector *selector, const char *key, size_t len, bool *matched, pc_error *err);

/* The pattern of `patterns` that governs `key` (first match of "(.*\.)?(p)$"), else `fallback`. */
pc_status pc_pattern_value(const pc_number_patterns *patterns, const char *key, size_t len, double fallback,
                           double *value, pc_error *err);

/* -------------------------------------------------- building and loading */

/* Plan an adapter for the model and allocate it; takes over `config` on
 * success.  The registry is not changed.  `source` is what it will be loaded
 * from, or NULL: its names tell whether base weights come with the adapter. */
pc_status pc_adapter_build(pc_registry *registry, const char *name, size_t name_len, pc_config *config,
                           const pc_weights *source, pc_adapter **out, pc_error *err);

/* What tensors that are alike have in common: role, dtype and shape; equal bytes. They lie side by side in the arena. */
typedef struct pc_likeness {
    int32_t role, dtype, ndim, padding;
    int64_t shape[PC_TENSOR_DIMS];
} pc_likeness;

pc_likeness pc_tensor_likeness(const pc_tensor *tensor);

/* Is the tensor a copy of a base weight or bias that the adapter does not train? */
bool pc_is_base_copy(const pc_tensor *tensor);

/* Initialise every tensor of a built adapter. */
pc_status pc_adapter_init(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, uint64_t seed, pc_error *err);

/* An adapter whose tensors are being filled while the caller does something else. */
typedef struct pc_filling pc_filling;

/* As pc_adapter_init, but what takes long may go on in another thread: *out is NULL if it does not. Until
 * pc_filling_finish the adapter's data is nobody's to read, and the registry and the adapter must live. */
pc_status pc_adapter_init_begin(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, uint64_t seed,
                                pc_filling **out, pc_error *err);
/* Wait for it, help with it, and free it; NULL is allowed and has worked.  `wanted` false: give it up. */
pc_status pc_filling_finish(pc_filling *filling, bool wanted, pc_error *err);

/* What a load found. Names live in `pool`. */
typedef struct pc_load_report {
    pc_pool pool;
    pc_strings missing;    /* state-dict keys that the adapter has and the source does not */
    pc_strings unexpected; /* names in the source that the adapter does not know */
} pc_load_report;

void pc_load_report_free(pc_load_report *report);

/* Read every tensor of the adapter from `source` straight into its arena,
 * converting between float dtypes where needed.  Keys may start with
 * "base_model.model.".  A shape that differs is PC_ERR_VALUE with tensor and
 * both shapes; what the source lacks is initialised and reported, except that
 * a missing modules_to_save tensor is PC_ERR_KEY. */
pc_status pc_adapter_load(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, pc_weights *source, uint64_t seed,
                          pc_load_report *report, pc_error *err);

/* As pc_adapter_load and pc_adapter_init_begin; `source` must live until pc_filling_finish, too. The report is complete. */
pc_status pc_adapter_load_begin(pc_runtime *rt, pc_registry *registry, pc_adapter *adapter, pc_weights *source,
                                uint64_t seed, pc_load_report *report, pc_filling **out, pc_error *err);

/* The name of tensor t: in a state dict of the adapter (with_adapter_name
 * false, e.g. "a.b.lora_A.weight") or of the model ("a.b.lora_A.NAME.weight").
 * Returned text lives in `pool`. */
pc_status pc_tensor_name(const pc_registry *registry, const pc_adapter *adapter, const pc_tensor *tensor,
                         bool with_adapter_name, pc_pool *pool, pc_string *out, pc_error *err);

/* ------------------------------------------------------------------ forward */

/* The base weight and bias that are in effect for a module under an
 * activation.  On entry `module` has its own; weight and bias are replaced by a
 * modules_to_save copy, an adapter's bias or merged ones, and left alone
 * otherwise (always when adapters are disabled or activation is NULL).  The
 * module may have been converted since those were made: module->dtype becomes
 * theirs, and PC_ERR_VALUE is a weight and a bias of different dtypes. */
pc_status pc_effective_weights(const pc_activation *activation, int32_t module_index, pc_module *module, pc_error *err);

/* Run a module with everything that is active on it; applies
 * pc_effective_weights itself.  y is fully written.  With nothing active, or
 * disabled, or activation == NULL it is the base operation alone.  Kinds that
 * adapters cannot wrap (norms, containers) are PC_ERR_RUNTIME: their layers use
 * pc_effective_weights. */
pc_status pc_forward(const pc_call *call, const pc_activation *activation, const void *x, void *y, pc_error *err);

/* What a forward call keeps for the way back: by nested adapter, the running result before its `after`, or NULL. */
typedef struct pc_kept {
    pc_pool pool;
    size_t count;
    void **results;
} pc_kept;

/* The same, keeping in *kept what gradients need; kept->pool is to be freed in any case. */
pc_status pc_forward_keeping(const pc_call *call, const pc_activation *activation, const void *x, void *y,
                             pc_kept *kept, pc_error *err);

/* backward.c.  Is anything trainable here: an active adapter's tensor that the call uses?  *needs_x: its gradient, or
 * that of a weight of the module's own when own_weight, is computed from the input. */
bool pc_learns(const pc_activation *activation, int32_t module_index, bool own_weight, bool *needs_x);

/* The gradients of a call of pc_forward_keeping: dy, of its result, is used up.  Adds to the gradients of the active
 * adapters' tensors (pc_gradients_prepare has been called for each) and to `weight` and `bias`, which are those of the
 * module's own and go unused where an adapter's stand in.  dx NULL: not wanted.  x may be NULL when pc_learns says so. */
pc_status pc_backward(const pc_call *call, const pc_activation *activation, const pc_kept *kept, const void *x,
                      void *dy, pc_sum *dx, pc_target weight, pc_target bias, pc_error *err);

/* Replace the targets of a module's own weight and bias by those of adapters that stand in for them: the counterpart of
 * pc_effective_weights. */
void pc_effective_targets(const pc_activation *activation, int32_t module_index, pc_target *weight, pc_target *bias);

/* target += scale · values (n of dtype compute); nothing when it is not wanted. */
void pc_target_add(pc_runtime *rt, pc_target target, pc_dtype compute, const void *values, int64_t n, double scale);

/* The base operation of call->module (kernels). */
pc_status pc_base_forward(const pc_call *call, const void *x, void *y, pc_pool *scratch, pc_error *err);

/* --------------------------------------------------------------------- merge */

/* New merged weights: base + every adapter in `names` order (all of the
 * activation's when count is 0).  safe_merge refuses NaN/Inf with the module's
 * name ("NaNs detected in the merged weights. The adapter X seems to be broken"). */
pc_status pc_merge(pc_runtime *rt, pc_registry *registry, pc_adapter *const *adapters, size_t count, bool safe_merge,
                   pc_merged **out, pc_error *err);

#endif
