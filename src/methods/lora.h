/* What the files of LoRA share.
 *
 * y += s · B·A·x with A (r, in) and B (out, r); s = alpha / r, or alpha / √r with rsLoRA.
 * Convolutions: A is one of the base's kernel to r channels, B a 1×1 one (grouped like the base).
 * Attention: a pair for the projections of query, key and value together, and one for the output's.
 * Embedding: A (r, num) is looked up by column, B (dim, r). */
#ifndef PEFTC_METHODS_LORA_H
#define PEFTC_METHODS_LORA_H

#include "support.h"

typedef struct lora_params {
    int64_t r;
    double alpha, dropout;
    bool use_rslora, use_dora, use_qalora, lora_bias;
    pc_bool_or_text init;
    pc_number_patterns rank_pattern, alpha_pattern;
    pc_strings target_parameters;
} lora_params;

enum {
    LORA_A,
    LORA_B,
    LORA_B_BIAS,
    LORA_EMBEDDING_A,
    LORA_EMBEDDING_B,
    LORA_MAGNITUDE,
    /* pissa and olora: A and B as they were initialised.  PEFT subtracts their
     * product from the base weight once and for all; here the base weight stays
     * as it is, and the product is subtracted while the adapter is active. */
    LORA_INITIAL_A,
    LORA_INITIAL_B,
    /* attention: those of out_proj; A and B are those of in_proj_weight */
    LORA_OUT_A,
    LORA_OUT_B
};

typedef enum lora_init {
    LORA_INIT_DEFAULT, /* A as torch.nn.Linear, B = 0 */
    LORA_INIT_RANDOM,  /* A and B as torch.nn.Linear */
    LORA_INIT_GAUSSIAN,
    LORA_INIT_ORTHOGONAL,
    LORA_INIT_OLORA,
    LORA_INIT_PISSA,
    LORA_INIT_UNKNOWN
} lora_init;

static inline const lora_params *lora_params_of(const pc_config *config) { return config->params; }

/* How the config's init_lora_weights initialises; *niter receives pissa_niter_N's N, or -1. */
lora_init lora_init_kind(const pc_bool_or_text *init, int *niter);
/* Does this way of initialising work on a part of the base weight? */
static inline bool lora_init_subtracts(lora_init kind) { return kind == LORA_INIT_OLORA || kind == LORA_INIT_PISSA; }

/* lora_init.c */
pc_status lora_init_slot(pc_runtime *rt, pc_adapter *adapter, const pc_slot *slot, const pc_module *module, pc_rng rng,
                         bool loading, pc_error *err);

/* The slot's two factors as matrices A (r, a_columns) and B (b_rows, r), in dtype `compute`. */
typedef struct lora_factors {
    int64_t r, a_columns, b_rows;
    const void *a, *b;
} lora_factors;

/* With initial = true: those that pissa or olora started from; a == NULL when there are none. */
pc_status lora_get_factors(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, pc_dtype compute,
                           bool initial, pc_pool *scratch, lora_factors *out, pc_error *err);
/* weight += scale · (B·A, laid out like the module's weight). */
pc_status lora_add_product(pc_runtime *rt, const pc_module *module, pc_dtype compute, const lora_factors *factors,
                           double scale, void *weight, pc_error *err);
/* weight += s · (B·A − initial B·A). */
pc_status lora_add_delta(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                         pc_dtype compute, void *weight, pc_error *err);

/* Add s · B·A·x (not what is beside it) to y; x may be the dropped-out input. */
pc_status lora_add_output(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, bool initial,
                          const void *x, double scale, void *y, pc_pool *scratch, pc_error *err);

/* lora_backward.c.  The way back through lora_add_output with this scale: dy is its gradient and only looked at;
 * `frozen` when the factors get no gradients. */
pc_status lora_output_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, bool initial,
                           bool dropped, double scale, const pc_way_back *way, const void *dy, pc_pool *scratch,
                           pc_error *err);
pc_status lora_after_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const pc_way_back *way,
                          pc_pool *scratch, pc_error *err);
/* The dropout that counts for a module: an embedding's input are indices. */
static inline double lora_dropout(const pc_adapter *adapter, const pc_module *module)
{
    return module->kind != PC_EMBEDDING ? lora_params_of(adapter->config)->dropout : 0.0;
}
/* lora.c: the slot's tensors A and B, or those that pissa or olora started from. */
void lora_factor_tensors(const pc_adapter *adapter, const pc_slot *slot, bool initial, const pc_tensor **a,
                         const pc_tensor **b);
/* lora.c: the two convolutions of A and B. */
void lora_conv_shapes(const pc_call *call, const pc_slot *slot, pc_conv_shape *first, pc_conv_shape *second);
/* lora.c: out (rows, r) ← the columns of A that the ids name. */
void lora_look_up(const pc_call *call, const pc_adapter *adapter, const pc_tensor *a, int64_t r, const int64_t *ids,
                  void *out);

/* dora.c.  norms (out) ← length of each output's row of the module's weight + delta (embedding: of each column). */
pc_status dora_norms(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                     pc_dtype compute, void *norms, pc_error *err);
pc_status dora_after(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const void *x,
                     const void *dropped, void *y, pc_pool *scratch, pc_error *err);
bool dora_keeps_result(const pc_adapter *adapter, const pc_slot *slot);
/* dora_backward.c */
pc_status dora_after_back(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, const pc_way_back *way,
                          pc_pool *scratch, pc_error *err);
/* factors (out) ← magnitude / norm; norms (out) too when it is not NULL. */
pc_status dora_factors(const pc_call *call, const pc_adapter *adapter, const pc_slot *slot, pc_pool *scratch,
                       void **factors, void **norms, pc_error *err);
/* weight (delta added already) ← magnitude / norm · weight. */
pc_status dora_merge(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                     pc_dtype compute, void *weight, pc_error *err);

#endif
