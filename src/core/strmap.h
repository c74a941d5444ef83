/* A hash map from byte strings to indices.  Keys are borrowed: they must
 * outlive the map.  Hostile keys are expected (tensor names from a file), so
 * the hash is seeded and never trusted to be collision free. */
#ifndef PEFTC_CORE_STRMAP_H
#define PEFTC_CORE_STRMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct pc_strmap {
    struct pc_strmap_entry *entries;
    size_t capacity; /* a power of two, or 0 */
    size_t count;
    uint64_t seed;
} pc_strmap;

void pc_strmap_init(pc_strmap *map);
void pc_strmap_free(pc_strmap *map);

/* Have room for this many keys in all; false when out of memory (map unchanged). */
bool pc_strmap_reserve(pc_strmap *map, size_t count);
/* Map key to value, replacing an earlier value; false when out of memory (map unchanged). */
bool pc_strmap_put(pc_strmap *map, const char *key, size_t len, size_t value);
/* True and *value if the key is there. */
bool pc_strmap_get(const pc_strmap *map, const char *key, size_t len, size_t *value);
/* Forget a key; false if it was not there. */
bool pc_strmap_remove(pc_strmap *map, const char *key, size_t len);

#endif
