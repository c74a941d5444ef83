/* The gradients of an adapter's tensors: one block beside the arena, in f32 (f64 for tensors of f64).
 *
 * Only tensors that can be trained have room in it.  A gradient is absent until something is added to it, and absent
 * again after pc_gradient_clear; the memory stays for the next step.  One thread trains an adapter at a time: nothing
 * here locks.
 */
#ifndef PEFTC_CORE_GRADIENTS_H
#define PEFTC_CORE_GRADIENTS_H

#include "adapter.h"
#include "status.h"

typedef struct pc_gradients pc_gradients;

/* Make room for the gradients of all trainable tensors, once; later calls find it there. */
pc_status pc_gradients_prepare(pc_adapter *adapter, pc_error *err);
void pc_gradients_free(pc_gradients *gradients); /* NULL is allowed */

/* The dtype that gradients of a tensor are summed in. */
static inline pc_dtype pc_gradient_dtype(const pc_tensor *tensor) { return pc_compute_dtype(tensor->dtype); }

/* Where to add to the gradient of a tensor: zeros the first time since it was cleared.  NULL when the adapter or the
 * tensor is not to be trained. */
void *pc_gradient_sum(const pc_adapter *adapter, const pc_tensor *tensor);

/* Will pc_gradient_sum give memory? (After pc_gradients_prepare.) */
static inline bool pc_gradient_wanted(const pc_adapter *adapter, const pc_tensor *tensor)
{
    return tensor != NULL && adapter->trainable && tensor->trainable;
}

/* The gradient as it is now, or NULL when it is absent. */
void *pc_gradient_now(const pc_adapter *adapter, const pc_tensor *tensor);
void pc_gradient_clear(const pc_adapter *adapter, const pc_tensor *tensor);

/* The block, which views of it keep alive; NULL before pc_gradients_prepare. */
pc_arena *pc_gradients_arena(const pc_adapter *adapter);

#endif
