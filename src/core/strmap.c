#include "strmap.h"

#include <string.h>

#include "memory.h"

struct pc_strmap_entry {
    const char *key; /* NULL: free */
    size_t len;
    size_t value;
    uint64_t hash;
};

static inline uint64_t mix(uint64_t a, uint64_t b)
{
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Multiply-and-fold over 8-byte words, seeded with an address that the loader
 * randomises, so that a file cannot be written to make every name collide. */
static uint64_t hash_bytes(uint64_t seed, const char *key, size_t len)
{
    uint64_t h = seed ^ mix(len + 0x9E3779B97F4A7C15u, 0xD6E8FEB86659FD93u);
    while (len >= 8) {
        uint64_t word;
        memcpy(&word, key, 8);
        h = mix(h ^ word, 0xA0761D6478BD642Fu ^ seed);
        key += 8;
        len -= 8;
    }
    uint64_t tail = 0;
    memcpy(&tail, key, len);
    return mix(h ^ tail, 0xE7037ED1A0B428DBu ^ seed);
}

void pc_strmap_init(pc_strmap *map)
{
    memset(map, 0, sizeof *map);
    map->seed = (uint64_t)(uintptr_t)&map * 0x9E3779B97F4A7C15u ^ (uint64_t)(uintptr_t)&pc_strmap_init;
}

void pc_strmap_free(pc_strmap *map)
{
    pc_free(map->entries);
    pc_strmap_init(map);
}

/* The entry that holds the key, or the free one where it belongs. */
static struct pc_strmap_entry *find(const pc_strmap *map, uint64_t hash, const char *key, size_t len)
{
    size_t mask = map->capacity - 1;
    for (size_t i = (size_t)hash & mask;; i = (i + 1) & mask) {
        struct pc_strmap_entry *e = &map->entries[i];
        if (e->key == NULL || (e->hash == hash && e->len == len && memcmp(e->key, key, len) == 0))
            return e;
    }
}

static bool grow(pc_strmap *map, size_t capacity)
{
    pc_strmap bigger = *map;
    bigger.entries = pc_calloc(capacity, sizeof *bigger.entries);
    if (bigger.entries == NULL)
        return false;
    bigger.capacity = capacity;
    for (size_t i = 0; i < map->capacity; i++) {
        const struct pc_strmap_entry *e = &map->entries[i];
        if (e->key != NULL)
            *find(&bigger, e->hash, e->key, e->len) = *e;
    }
    pc_free(map->entries);
    *map = bigger;
    return true;
}

bool pc_strmap_reserve(pc_strmap *map, size_t count)
{
    size_t capacity = map->capacity != 0 ? map->capacity : 16;
    while (count >= capacity / 4 * 3)
        if (!pc_mul_size(capacity, 2, &capacity))
            return false;
    return capacity == map->capacity || grow(map, capacity);
}

bool pc_strmap_put(pc_strmap *map, const char *key, size_t len, size_t value)
{
    if (map->count * 4 >= map->capacity * 3 && !grow(map, map->capacity != 0 ? map->capacity * 2 : 16))
        return false;
    uint64_t hash = hash_bytes(map->seed, key, len);
    struct pc_strmap_entry *e = find(map, hash, key, len);
    if (e->key == NULL) {
        map->count++;
        e->key = key;
        e->len = len;
        e->hash = hash;
    }
    e->value = value;
    return true;
}

bool pc_strmap_get(const pc_strmap *map, const char *key, size_t len, size_t *value)
{
    if (map->count == 0)
        return false;
    const struct pc_strmap_entry *e = find(map, hash_bytes(map->seed, key, len), key, len);
    if (e->key == NULL)
        return false;
    *value = e->value;
    return true;
}

bool pc_strmap_remove(pc_strmap *map, const char *key, size_t len)
{
    if (map->count == 0)
        return false;
    struct pc_strmap_entry *e = find(map, hash_bytes(map->seed, key, len), key, len);
    if (e->key == NULL)
        return false;
    /* Close the gap: an entry further along whose home lies at or before the hole moves into it. */
    size_t mask = map->capacity - 1;
    size_t hole = (size_t)(e - map->entries);
    for (size_t i = (hole + 1) & mask; map->entries[i].key != NULL; i = (i + 1) & mask) {
        size_t home = (size_t)map->entries[i].hash & mask;
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            map->entries[hole] = map->entries[i];
            hole = i;
        }
    }
    memset(&map->entries[hole], 0, sizeof map->entries[hole]);
    map->count--;
    return true;
}
