#include "arena.h"

#include <stdatomic.h>

#include "memory.h"

struct pc_arena {
    atomic_size_t references;
    size_t bytes;
    void *data;
};

pc_status pc_arena_new(size_t bytes, pc_arena **out, pc_error *err)
{
    pc_arena *arena = pc_malloc(sizeof *arena);
    if (arena == NULL)
        return pc_fail_nomem(err, "an arena");
    arena->bytes = bytes;
    arena->data = pc_block_alloc(bytes);
    if (arena->data == NULL) {
        pc_free(arena);
        return pc_fail(err, PC_ERR_NOMEM, "out of memory while allocating an arena of %zu bytes for adapter tensors",
                       bytes);
    }
    atomic_init(&arena->references, 1);
    *out = arena;
    return PC_OK;
}

pc_arena *pc_arena_retain(pc_arena *arena)
{
    atomic_fetch_add_explicit(&arena->references, 1, memory_order_relaxed);
    return arena;
}

void pc_arena_release(pc_arena *arena)
{
    if (arena == NULL || atomic_fetch_sub_explicit(&arena->references, 1, memory_order_acq_rel) != 1)
        return;
    pc_block_free(arena->data, arena->bytes);
    pc_free(arena);
}

void *pc_arena_data(const pc_arena *arena) { return arena->data; }
size_t pc_arena_size(const pc_arena *arena) { return arena->bytes; }
