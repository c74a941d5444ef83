#include "adapter.h"

#include "gradients.h"

const pc_tensor *pc_slot_tensor(const pc_adapter *adapter, const pc_slot *slot, int role)
{
    const pc_tensor *tensor = adapter->tensors + slot->first_tensor;
    for (int32_t i = 0; i < slot->tensor_count; i++, tensor++)
        if (tensor->role == role)
            return tensor;
    return NULL;
}

int64_t pc_tensor_count(const pc_tensor *tensor)
{
    int64_t count = 1; /* checked when the tensor was laid out */
    for (int d = 0; d < tensor->ndim; d++)
        count *= tensor->shape[d];
    return count;
}

pc_adapter *pc_adapter_retain(pc_adapter *adapter)
{
    atomic_fetch_add_explicit(&adapter->references, 1, memory_order_relaxed);
    return adapter;
}

void pc_adapter_release(pc_adapter *adapter)
{
    if (adapter == NULL || atomic_fetch_sub_explicit(&adapter->references, 1, memory_order_acq_rel) != 1)
        return;
    pc_arena_release(adapter->arena);
    pc_gradients_free(adapter->gradients);
    pc_config_free(adapter->config);
    pc_pool_free(&adapter->pool);
    pc_free(adapter);
}
