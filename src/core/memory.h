/* Allocation: the only way the core gets memory.
 *
 * pc_malloc and friends are malloc and friends; a build with PC_TEST_HOOKS
 * (the sanitizer build and the C tests) can make the n-th allocation of a
 * thread fail, which is how the tests show that every failure is clean.
 *
 * A pc_block is one large buffer, 64-byte aligned, zeroed, and given straight
 * back to the system when freed (one of megabytes by another thread, a
 * millisecond later).  A pc_pool hands out many small pieces that die together
 * (a parsed config, the tables of one adapter).
 */
#ifndef PEFTC_CORE_MEMORY_H
#define PEFTC_CORE_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *pc_malloc(size_t bytes);                /* NULL on failure; bytes == 0 gives a unique pointer */
void *pc_calloc(size_t count, size_t bytes);  /* zeroed; checks the product */
void *pc_realloc(void *old, size_t bytes);    /* on failure the old piece stays valid */
void pc_free(void *piece);                    /* NULL is allowed */
char *pc_strndup(const char *text, size_t len);

/* For what one call needs while it runs: as pc_malloc and pc_free, but a few pieces, of 4 MB each at most, stay for the calls
 * to come.  Given back to the heap each time, they would go back to the system from its end, and have their pages zeroed
 * again by the next call.  Any thread may use them. */
void *pc_scratch_take(size_t bytes);
void pc_scratch_leave(void *piece);

/* Overflow-checked arithmetic: false and *out untouched when it does not fit. */
static inline bool pc_mul_size(size_t a, size_t b, size_t *out)
{
    size_t product;
    if (__builtin_mul_overflow(a, b, &product))
        return false;
    *out = product;
    return true;
}

static inline bool pc_add_size(size_t a, size_t b, size_t *out)
{
    size_t sum;
    if (__builtin_add_overflow(a, b, &sum))
        return false;
    *out = sum;
    return true;
}

#define PC_ALIGNMENT 64 /* one cache line, one AVX-512 register */

static inline size_t pc_align_up(size_t n) { return (n + (PC_ALIGNMENT - 1)) & ~(size_t)(PC_ALIGNMENT - 1); }

void *pc_block_alloc(size_t bytes); /* zeroed, PC_ALIGNMENT aligned; NULL on failure */
/* Have the pages of (part of) a block there before it is written: together they cost half of what they do one by one. */
void pc_block_populate(void *part, size_t bytes);
void pc_block_free(void *block, size_t bytes);

typedef struct pc_pool {
    struct pc_pool_chunk *chunks;
    size_t chunk_bytes; /* size of the next chunk; grows */
    bool scratch;
} pc_pool;

void pc_pool_init(pc_pool *pool);
/* A pool for the intermediate results of one call: large pieces come from the
 * heap, which has them ready for the next call, and nothing is zeroed. */
void pc_pool_init_scratch(pc_pool *pool);
void *pc_pool_alloc(pc_pool *pool, size_t bytes);          /* zeroed, 16-byte aligned; NULL on failure */
void *pc_pool_array(pc_pool *pool, size_t count, size_t item); /* checks the product */
char *pc_pool_strndup(pc_pool *pool, const char *text, size_t len);
void pc_pool_free(pc_pool *pool);                          /* frees everything; the pool is empty again */

#ifdef PC_TEST_HOOKS
/* Make the n-th allocation from now on this thread (1 = the next) fail, once; 0 turns it off. */
void pc_test_fail_allocation(long nth);
/* The same for the n-th allocation on any other thread. */
void pc_test_fail_allocation_elsewhere(long nth);
/* True if the failure that this thread armed last has happened. */
bool pc_test_allocation_failed(void);
/* Pieces allocated and not yet freed, all threads. */
long pc_test_live_allocations(void);
#endif

#endif
