/* The module table: what the core knows about a model.
 *
 * The host fills it once by walking the model; names are dotted and equal to
 * torch's.  Index 0 is the model itself (name "").
 */
#ifndef PEFTC_CORE_MODULE_H
#define PEFTC_CORE_MODULE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "memory.h"
#include "status.h"
#include "strmap.h"

typedef enum pc_kind {
    PC_CONTAINER = 0, /* has children or nothing that an adapter can use */
    PC_LINEAR,        /* weight (out, in), bias (out) */
    PC_CONV1D,        /* GPT-2's: weight (in, out), bias (out) */
    PC_CONV2D,        /* weight (out, in/groups, kh, kw), bias (out) */
    PC_CONV_ALONG_1,  /* torch's Conv1d: weight (out, in/groups, k); hosts with layers of their own have it */
    PC_CONV_ALONG_3,  /* torch's Conv3d: weight (out, in/groups, kd, kh, kw); likewise */
    PC_ATTENTION,     /* torch's MultiheadAttention: in_proj_weight (out, in) with out = 3 · in; likewise */
    PC_EMBEDDING,     /* weight (num, dim); in = num, out = dim */
    PC_LAYERNORM,     /* weight (out), bias (out) */
    PC_RMSNORM        /* weight (out) */
} pc_kind;

/* The most dimensions that a weight or an adapter's tensor has. */
#define PC_TENSOR_DIMS 5

/* "Linear", "Conv1D", …: torch's class name of a kind. */
const char *pc_kind_name(pc_kind kind);
/* Dimensions of a convolution's kernel, 0 for other kinds. */
int pc_kind_kernel_dims(pc_kind kind);

typedef struct pc_module {
    const char *name; /* dotted, NUL-terminated, owned by the table */
    size_t name_len;
    const char *class_name; /* as the host calls it, for messages; owned by the table */
    pc_kind kind;
    pc_dtype dtype; /* of weight and bias */
    int64_t in_features, out_features; /* channels for conv */
    int64_t kernel[3];                          /* conv: (depth, height,) width */
    int64_t stride[2], padding[2], dilation[2]; /* Conv2d: height, width */
    int64_t groups;
    bool has_weight, has_bias;
    bool opaque; /* the host copies it itself for modules_to_save: the core plans no tensors for that */
    bool output_embedding; /* the model's head over the vocabulary: all-linear skips it */
    bool input_embedding;  /* the model's table of words */
    int32_t alias_of; /* index of the first module that is the same object, else -1 */
    /* Current buffers, borrowed from the host; NULL when it has none in memory. */
    const void *weight, *bias;
} pc_module;

/* weight's shape; returns the number of dimensions, 0 for a container. */
int pc_module_weight_shape(const pc_module *module, int64_t shape[PC_TENSOR_DIMS]);
/* Elements of weight; the host has checked that the product fits. */
int64_t pc_module_weight_count(const pc_module *module);

typedef struct pc_module_table {
    pc_module *items;
    size_t count, capacity;
    pc_strmap by_name;
    pc_pool names; /* and names of classes */
} pc_module_table;

void pc_module_table_init(pc_module_table *table);
void pc_module_table_free(pc_module_table *table);
/* Have room for `more` modules, which saves moving the table as it grows. */
pc_status pc_module_table_reserve(pc_module_table *table, size_t more, pc_error *err);
/* Append a copy of *module (name and class_name are copied too).  A name that
 * is already there is PC_ERR_VALUE. */
pc_status pc_module_table_add(pc_module_table *table, const pc_module *module, size_t *index, pc_error *err);
/* NULL if there is no such module. */
pc_module *pc_module_table_find(const pc_module_table *table, const char *name, size_t len);

#endif
