#include "gradients.h"

#include <string.h>

#include "memory.h"

struct pc_gradients {
    pc_arena *arena;
    size_t *offset; /* by tensor */
    bool *present;
};

static size_t gradient_bytes(const pc_tensor *tensor)
{
    return (size_t)pc_tensor_count(tensor) * pc_dtype_size(pc_gradient_dtype(tensor));
}

void pc_gradients_free(pc_gradients *gradients)
{
    if (gradients == NULL)
        return;
    pc_arena_release(gradients->arena);
    pc_free(gradients->offset);
    pc_free(gradients->present);
    pc_free(gradients);
}

pc_status pc_gradients_prepare(pc_adapter *adapter, pc_error *err)
{
    if (adapter->gradients != NULL)
        return PC_OK;
    pc_gradients *made = pc_calloc(1, sizeof *made);
    size_t bytes = 0;
    pc_status status = PC_ERR_NOMEM;
    if (made != NULL) {
        made->offset = pc_calloc(adapter->tensor_count + 1, sizeof *made->offset);
        made->present = pc_calloc(adapter->tensor_count + 1, sizeof *made->present);
    }
    if (made == NULL || made->offset == NULL || made->present == NULL) {
        pc_fail_nomem(err, "the list of an adapter's gradients");
    } else {
        /* In the arena's order, so that whoever walks over both walks straight through memory. */
        for (size_t i = 0; i < adapter->tensor_count; i++) {
            const pc_tensor *tensor = &adapter->tensors[i];
            made->offset[i] = bytes;
            if (tensor->trainable)
                bytes += pc_align_up(gradient_bytes(tensor)); /* at most four times the arena, which exists */
        }
        status = pc_arena_new(bytes, &made->arena, err);
    }
    if (status != PC_OK) {
        pc_gradients_free(made);
        return status;
    }
    adapter->gradients = made;
    return PC_OK;
}

void *pc_gradient_now(const pc_adapter *adapter, const pc_tensor *tensor)
{
    const pc_gradients *g = adapter->gradients;
    const size_t i = (size_t)(tensor - adapter->tensors);
    return g != NULL && g->present[i] ? (char *)pc_arena_data(g->arena) + g->offset[i] : NULL;
}

void *pc_gradient_sum(const pc_adapter *adapter, const pc_tensor *tensor)
{
    const pc_gradients *g = adapter->gradients;
    if (g == NULL || !pc_gradient_wanted(adapter, tensor))
        return NULL;
    const size_t i = (size_t)(tensor - adapter->tensors);
    void *sum = (char *)pc_arena_data(g->arena) + g->offset[i];
    if (!g->present[i])
        memset(sum, 0, gradient_bytes(tensor));
    g->present[i] = true;
    return sum;
}

void pc_gradient_clear(const pc_adapter *adapter, const pc_tensor *tensor)
{
    if (adapter->gradients != NULL)
        adapter->gradients->present[tensor - adapter->tensors] = false;
}

pc_arena *pc_gradients_arena(const pc_adapter *adapter)
{
    return adapter->gradients != NULL ? adapter->gradients->arena : NULL;
}
