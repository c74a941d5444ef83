#define _DEFAULT_SOURCE
#include "memory.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "background.h"

#ifdef PC_TEST_HOOKS
static _Thread_local long fail_countdown;
static _Thread_local bool fail_happened;
static _Thread_local bool is_spared; /* the thread that armed the failures of others */
static atomic_long elsewhere_countdown;
static atomic_bool elsewhere_happened;
static atomic_long live_allocations;

void pc_test_fail_allocation(long nth)
{
    fail_countdown = nth;
    fail_happened = false;
}

void pc_test_fail_allocation_elsewhere(long nth)
{
    is_spared = nth > 0;
    atomic_store(&elsewhere_happened, false);
    atomic_store(&elsewhere_countdown, nth);
}

bool pc_test_allocation_failed(void) { return fail_happened || (is_spared && atomic_load(&elsewhere_happened)); }
long pc_test_live_allocations(void) { return atomic_load(&live_allocations); }

static bool refuse(void)
{
    if (fail_countdown > 0 && --fail_countdown == 0) {
        fail_happened = true;
        return true;
    }
    if (!is_spared && atomic_load(&elsewhere_countdown) > 0 && atomic_fetch_sub(&elsewhere_countdown, 1) == 1) {
        atomic_store(&elsewhere_happened, true);
        return true;
    }
    return false;
}

static void *count_new(void *piece)
{
    if (piece != NULL)
        atomic_fetch_add(&live_allocations, 1);
    return piece;
}

static void count_free(const void *piece)
{
    if (piece != NULL)
        atomic_fetch_sub(&live_allocations, 1);
}
#else
static inline bool refuse(void) { return false; }
static inline void *count_new(void *piece) { return piece; }
static inline void count_free(const void *piece) { (void)piece; }
#endif

void *pc_malloc(size_t bytes) { return refuse() ? NULL : count_new(malloc(bytes != 0 ? bytes : 1)); }

void *pc_calloc(size_t count, size_t bytes)
{
    size_t total;
    if (!pc_mul_size(count, bytes, &total) || refuse())
        return NULL;
    return count_new(calloc(1, total != 0 ? total : 1));
}

void *pc_realloc(void *old, size_t bytes)
{
    if (old == NULL)
        return pc_malloc(bytes);
    return refuse() ? NULL : realloc(old, bytes != 0 ? bytes : 1);
}

void pc_free(void *piece)
{
    count_free(piece);
    free(piece);
}

/* Before a piece of scratch: how large it is. */
#define HEAD PC_ALIGNMENT

#ifdef PC_TEST_HOOKS
#define MOST_KEPT 0 /* leaks are counted, and sanitizers are to see the end of each piece */
#else
#define MOST_KEPT ((size_t)4 << 20)
#endif
enum { KEPT = 8 };
static _Atomic(size_t *) kept[KEPT];

void *pc_scratch_take(size_t bytes)
{
    for (int i = 0; i < KEPT && bytes <= MOST_KEPT; i++) {
        size_t *piece = atomic_exchange(&kept[i], NULL);
        if (piece != NULL && *piece >= bytes)
            return (char *)piece + HEAD;
        pc_free(piece); /* the larger one that comes instead will do for both */
    }
    size_t whole;
    size_t *made = pc_add_size(bytes, HEAD, &whole) ? pc_malloc(whole) : NULL;
    if (made == NULL)
        return NULL;
    *made = bytes;
    return (char *)made + HEAD;
}

void pc_scratch_leave(void *piece)
{
    if (piece == NULL)
        return;
    size_t *whole = (size_t *)(void *)((char *)piece - HEAD);
    for (int i = 0; i < KEPT && *whole <= MOST_KEPT && MOST_KEPT > 0; i++) {
        size_t *none = NULL;
        if (atomic_compare_exchange_strong(&kept[i], &none, whole))
            return;
    }
    pc_free(whole);
}

char *pc_strndup(const char *text, size_t len)
{
    char *copy = pc_malloc(len + 1);
    if (copy == NULL)
        return NULL;
    memcpy(copy, text, len);
    copy[len] = '\0';
    return copy;
}

/* From this size on a block is its own mapping, so that freeing it returns the
 * memory at once and never leaves a hole in the heap: glibc raises its own
 * threshold as mappings are freed, which would keep deleted adapters resident.
 * Below it the page rounding would cost more than it saves. */
#define BLOCK_MMAP_BYTES ((size_t)32 * 1024)

/* From this size on a mapping asks for huge pages where the system has them: its first
 * writes then cost a fault per 2 MB, not per 4 KB, which is half of reading a file into it.
 * Smaller ones do better without: what is never written (the zeros of fresh adapters) stays
 * without pages, and in virtual machines that give free memory back to their host, small
 * pages are the ones still at hand. */
#define BLOCK_HUGE_BYTES ((size_t)64 << 20)

/* Mappings of these sizes are given back by another thread. Larger ones might be missed by who asks for as much next. */
#define BLOCK_ELSEWHERE_BYTES ((size_t)1 << 20)
#define BLOCK_ELSEWHERE_MOST ((size_t)32 << 20)

static void *map_block(size_t bytes)
{
    void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    if (bytes >= BLOCK_HUGE_BYTES)
        (void)madvise(map, bytes, MADV_HUGEPAGE); /* a hint: refused, the pages are small ones */
#endif
    return map;
}

void *pc_block_alloc(size_t bytes)
{
    if (refuse())
        return NULL;
    if (bytes > (size_t)PTRDIFF_MAX - PC_ALIGNMENT)
        return NULL;
    if (bytes >= BLOCK_MMAP_BYTES)
        return count_new(map_block(bytes));
    size_t rounded = pc_align_up(bytes != 0 ? bytes : 1);
    void *block = aligned_alloc(PC_ALIGNMENT, rounded);
    if (block != NULL)
        memset(block, 0, rounded);
    return count_new(block);
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; headers may be older than the kernel */
#endif

void pc_block_populate(void *part, size_t bytes)
{
#ifdef __linux__
    const uintptr_t page = 4096, begin = ((uintptr_t)part + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)part + bytes) & ~(page - 1);
    if (end > begin)
        (void)madvise((void *)begin, end - begin, MADV_POPULATE_WRITE); /* a hint: refused, writing brings the pages */
#else
    (void)part;
    (void)bytes;
#endif
}

void pc_block_free(void *block, size_t bytes)
{
    if (block == NULL)
        return;
    count_free(block);
    if (bytes < BLOCK_MMAP_BYTES)
        free(block);
    else if (bytes < BLOCK_ELSEWHERE_BYTES || bytes > BLOCK_ELSEWHERE_MOST || !pc_background_unmap(block, bytes))
        munmap(block, bytes);
}

struct pc_pool_chunk {
    struct pc_pool_chunk *next;
    size_t size; /* of this chunk, header included */
    size_t used;
};

#define POOL_ALIGN ((size_t)16)
#define POOL_FIRST_CHUNK ((size_t)1024)
#define POOL_LARGEST_CHUNK ((size_t)256 * 1024)

static size_t pool_round(size_t n) { return (n + (POOL_ALIGN - 1)) & ~(POOL_ALIGN - 1); }

void pc_pool_init(pc_pool *pool)
{
    pool->chunks = NULL;
    pool->chunk_bytes = POOL_FIRST_CHUNK;
    pool->scratch = false;
}

void pc_pool_init_scratch(pc_pool *pool)
{
    pc_pool_init(pool);
    pool->scratch = true;
}

/* After the first small chunk come mappings: many adapters' tables would else
 * be strewn over the heap, and deleting them would leave it full of holes. */
static size_t next_chunk(size_t bytes)
{
    if (bytes < BLOCK_MMAP_BYTES)
        return BLOCK_MMAP_BYTES;
    return bytes < POOL_LARGEST_CHUNK ? bytes * 2 : bytes;
}

void *pc_pool_alloc(pc_pool *pool, size_t bytes)
{
    const size_t header = pool_round(sizeof(struct pc_pool_chunk));
    if (bytes > (size_t)PTRDIFF_MAX - header - POOL_ALIGN)
        return NULL;
    size_t need = pool_round(bytes != 0 ? bytes : 1);
    struct pc_pool_chunk *chunk = pool->chunks;
    if (chunk == NULL || chunk->size - chunk->used < need) {
        size_t size = pool->chunk_bytes;
        if (size < header + need)
            size = header + need;
        chunk = pool->scratch ? pc_malloc(size) : pc_block_alloc(size);
        if (chunk == NULL)
            return NULL;
        chunk->size = size;
        chunk->used = header;
        chunk->next = pool->chunks;
        pool->chunks = chunk;
        pool->chunk_bytes = next_chunk(pool->chunk_bytes);
    }
    void *piece = (char *)chunk + chunk->used;
    chunk->used += need;
    return piece;
}

void *pc_pool_array(pc_pool *pool, size_t count, size_t item)
{
    size_t total;
    return pc_mul_size(count, item, &total) ? pc_pool_alloc(pool, total) : NULL;
}

char *pc_pool_strndup(pc_pool *pool, const char *text, size_t len)
{
    char *copy = len < SIZE_MAX ? pc_pool_alloc(pool, len + 1) : NULL;
    if (copy != NULL)
        memcpy(copy, text, len);
    if (copy != NULL)
        copy[len] = '\0';
    return copy;
}

void pc_pool_free(pc_pool *pool)
{
    struct pc_pool_chunk *chunk = pool->chunks;
    while (chunk != NULL) {
        struct pc_pool_chunk *next = chunk->next;
        if (pool->scratch)
            pc_free(chunk);
        else
            pc_block_free(chunk, chunk->size);
        chunk = next;
    }
    pool->chunks = NULL;
    pool->chunk_bytes = POOL_FIRST_CHUNK;
}
