/* What the files of this folder share and nobody else needs. */
#ifndef PEFTC_METHODS_SUPPORT_H
#define PEFTC_METHODS_SUPPORT_H

#include "../core/background.h"
#include "../core/gradients.h"
#include "../kernels/gradients.h"
#include "../kernels/kernels.h"
#include "methods.h"

/* targets.c: the length of the shortest dotted prefix of `name` that modules_to_save names; 0 when none. */
size_t pc_saved_root(const pc_config *config, const char *name, size_t len);

/* names.c: without PEFT's "base_model.model.", if the name has it. */
void pc_strip_peft_prefix(const char **name, size_t *len);

/* base_copies.c: which base weights and biases an adapter has copies of besides those that it trains. */
typedef struct pc_base_copies {
    bool embeddings;    /* target_modules names the embeddings: those are saved with the adapter */
    pc_strmap in_source; /* "<module>.base_layer.weight" and ".bias" that the weights bring */
} pc_base_copies;

/* `source` is NULL for a fresh adapter.  To be freed in any case. */
pc_status pc_base_copies_init(pc_base_copies *copies, const pc_config *config, const pc_module_table *modules,
                              const pc_weights *source, pc_error *err);
void pc_base_copies_free(pc_base_copies *copies);
/* Append the copies for one adapted module to its plan. */
void pc_base_copies_plan(const pc_base_copies *copies, const pc_module *module, pc_slot_plan *plan);

/* build.c: give the generic tensors of a slot (bias, base weight, saved module) the model's current values. */
pc_status pc_init_generic(const pc_adapter *adapter, const pc_slot *slot, const pc_module *module, pc_error *err);
/* build.c: the stream that a slot's draws start at; a method adds its role to it. */
pc_rng pc_slot_rng(const pc_slot *slot, uint64_t seed);

/* forward.c: the active adapters that change what the module computes, in order, to `list`, which has room for all
 * active ones; how many. */
size_t pc_list_nested(const pc_activation *activation, int32_t module, const pc_adapter **list);

/* support.c: PC_ERR_VALUE in PEFT's words; `kinds` lists what the method can do. */
pc_status pc_fail_kind(const pc_module *module, const char *kinds, pc_error *err);

/* support.c: the module's base weight, or PC_ERR_VALUE when the host has none in memory. */
pc_status pc_need_weight(const pc_module *module, pc_error *err);

/* support.c: n numbers of `src` in dtype `compute`: src itself when it has that dtype, else a copy in `scratch`. */
pc_status pc_as_compute(pc_runtime *rt, pc_dtype compute, pc_dtype dtype, const void *src, int64_t n, pc_pool *scratch,
                        const void **out, pc_error *err);
/* The same for an adapter's tensor. */
pc_status pc_tensor_as(pc_runtime *rt, pc_dtype compute, const pc_adapter *adapter, const pc_tensor *tensor,
                       pc_pool *scratch, const void **out, pc_error *err);

/* support.c: room for a × b numbers in `scratch` (not zeroed); the product is checked. */
pc_status pc_scratch(pc_pool *scratch, pc_dtype dtype, int64_t a, int64_t b, void **out, pc_error *err);

/* support.c: whether LoRA's alpha and dropout, which AdaLoRA has too, can be computed with. */
pc_status pc_check_lora_numbers(const pc_config *config, double alpha, double dropout, pc_error *err);

/* support.c: the input that an adapter of a linear-like or Conv2d call sees: x itself, or in training with p > 0 a copy
 * of it after dropout. */
pc_status pc_drop_input(const pc_call *call, const pc_adapter *adapter, double p, const void *x, pc_pool *scratch,
                        const void **out, pc_error *err);

/* support.c: the shape of a Conv2d call. */
pc_conv_shape pc_call_conv(const pc_call *call);

/* support.c: numbers in the input of a linear-like or Conv2d call; pixels of its output (1 unless Conv2d). */
int64_t pc_input_count(const pc_call *call);
int64_t pc_output_pixels(const pc_call *call);
/* support.c: y ← y ⊙ factors, one factor per output feature (Conv2d: channel). */
void pc_scale_output(const pc_call *call, pc_dtype dtype, const void *factors, void *y);
/* support.c: y ← y + scale · values, one value per output feature (Conv2d: channel). */
void pc_add_output(const pc_call *call, pc_dtype dtype, const void *values, double scale, void *y);

/* gradient_support.c.  sums (out) += scale · Σ of a (⊙ b, may be NULL) over rows and pixels, one per output feature. */
void pc_sum_output(const pc_call *call, const void *a, const void *b, double scale, void *sums);
/* gradient_support.c: where a tensor's gradient goes. */
pc_target pc_tensor_target(const pc_adapter *adapter, const pc_tensor *tensor);
/* gradient_support.c: dx += values (n). */
void pc_sum_add(pc_runtime *rt, pc_dtype compute, pc_sum *dx, const void *values, int64_t n, double scale);

/* gradient_support.c: the way back through y += scale · B·diag(e)·A·x of a linear-like call, into the tensors' targets
 * and way->dx.  dy is looked at only.  dropped is the input that the product saw, p the dropout that made it. */
typedef struct pc_lowrank_back {
    const pc_tensor *a, *b, *e; /* e may be NULL */
    double scale, dropout;
    bool frozen; /* the tensors get no gradients */
} pc_lowrank_back;
pc_status pc_lowrank_way_back(const pc_call *call, const pc_adapter *adapter, const pc_lowrank_back *what,
                              const pc_way_back *way, const void *dy, pc_pool *scratch, pc_error *err);

/* support.c: the same, and dx through the same dropout in place; either may be NULL. */
pc_status pc_drop_both(const pc_call *call, const pc_adapter *adapter, double p, const void *x, void *dx,
                       pc_pool *scratch, const void **out, pc_error *err);
/* support.c: dx (n) through the dropout of pc_drop_input, in place. */
void pc_drop_back(const pc_call *call, const pc_adapter *adapter, double p, void *dx);

/* backward.c: the way back through the base operation; dx, weight and bias as for pc_backward. */
pc_status pc_base_backward(const pc_call *call, const void *x, const void *dy, pc_sum *dx, pc_target weight,
                           pc_target bias, pc_pool *scratch, pc_error *err);

static inline void *pc_at(pc_dtype dtype, void *buffer, int64_t index)
{
    return (char *)buffer + (size_t)index * pc_dtype_size(dtype);
}

static inline const void *pc_at_const(pc_dtype dtype, const void *buffer, int64_t index)
{
    return (const char *)buffer + (size_t)index * pc_dtype_size(dtype);
}

/* ------------------------------------------------------------------- filling */

struct pc_filling {
    pc_background *job;
    pc_status (*finish)(pc_filling *self, bool wanted, pc_error *err); /* frees it */
    pc_error err;                                                       /* what went wrong in the other thread */
};

/* Adapters between these sizes are filled in another thread: smaller ones are done before it has woken up, and for larger
 * ones all threads together are faster. */
#define PC_BACKGROUND_LEAST ((size_t)256 << 10)
#define PC_BACKGROUND_MOST ((size_t)16 << 20)

bool pc_fills_in_background(const pc_runtime *rt, const pc_adapter *adapter);

#endif
