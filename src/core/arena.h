/* Arena: one block that holds every tensor of an adapter.
 *
 * Reference counted, because views of it are handed out: the block lives until
 * the adapter is deleted *and* the last view is gone.
 */
#ifndef PEFTC_CORE_ARENA_H
#define PEFTC_CORE_ARENA_H

#include <stddef.h>

#include "status.h"

typedef struct pc_arena pc_arena;

/* A zeroed, 64-byte aligned arena of `bytes` bytes with one reference. */
pc_status pc_arena_new(size_t bytes, pc_arena **out, pc_error *err);
pc_arena *pc_arena_retain(pc_arena *arena); /* returns its argument; safe from any thread */
void pc_arena_release(pc_arena *arena);     /* NULL is allowed; safe from any thread */
void *pc_arena_data(const pc_arena *arena);
size_t pc_arena_size(const pc_arena *arena);

#endif
