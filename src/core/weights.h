/* Where adapter tensors come from: one interface over a safetensors file, a
 * .bin file, and arrays that a caller passes in. */
#ifndef PEFTC_CORE_WEIGHTS_H
#define PEFTC_CORE_WEIGHTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "status.h"

#define PC_MAX_DIMS 64

typedef struct pc_tensor_info {
    const char *name; /* UTF-8, not NUL-terminated by contract: use name_len */
    size_t name_len;
    pc_dtype dtype;
    int ndim; /* 0 … PC_MAX_DIMS */
    const uint64_t *shape;
    uint64_t nbytes; /* of the tensor stored contiguously */
} pc_tensor_info;

typedef struct pc_weights pc_weights;

/* A source embeds this struct as its first member. */
struct pc_weights {
    const char *label; /* for messages: the file's path, or "state_dict" */
    size_t count;
    const pc_tensor_info *tensors; /* valid until close */
    bool concurrent; /* read may run on several threads at once */
    /* Write tensor i, row-major and contiguous, in its own dtype, to dst
     * (tensors[i].nbytes bytes).  May be called from any thread, without the GIL. */
    pc_status (*read)(pc_weights *self, size_t i, void *dst, pc_error *err);
    void (*close)(pc_weights *self); /* frees the source itself; NULL is not allowed */
};

#endif
