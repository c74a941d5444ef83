/* A set of addresses: of objects that somebody else keeps alive. */
#ifndef PEFTC_PYTHON_PY_TORCH_SET_H
#define PEFTC_PYTHON_PY_TORCH_SET_H

#include "binding.h"

#include <stdbool.h>

/* Open addressing, a power of two of places, at most half of them taken. All zero is the empty set. */
typedef struct address_set {
    uintptr_t *places; /* 0: free */
    size_t room, count;
} address_set;

static inline uintptr_t *address_place(const address_set *set, uintptr_t address)
{
    size_t at = (size_t)((uint64_t)(address >> 4) * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (set->room - 1);
    while (set->places[at] != 0 && set->places[at] != address)
        at = (at + 1) & (set->room - 1);
    return &set->places[at];
}

static inline bool address_set_grow(address_set *set)
{
    address_set larger = {.room = set->room != 0 ? 2 * set->room : 1024, .count = set->count};
    larger.places = PyMem_Calloc(larger.room, sizeof *larger.places);
    if (larger.places == NULL)
        return false;
    for (size_t i = 0; i < set->room; i++)
        if (set->places[i] != 0)
            *address_place(&larger, set->places[i]) = set->places[i];
    PyMem_Free(set->places);
    *set = larger;
    return true;
}

/* 1 the first time that it is called with an object, 0 after that, -1 without memory (no exception is set). */
static inline int address_set_add(address_set *set, const PyObject *object)
{
    if (2 * set->count >= set->room && !address_set_grow(set))
        return -1;
    uintptr_t *place = address_place(set, (uintptr_t)object);
    if (*place != 0)
        return 0;
    *place = (uintptr_t)object;
    set->count++;
    return 1;
}

static inline bool address_set_has(const address_set *set, const PyObject *object)
{
    return set->room != 0 && *address_place(set, (uintptr_t)object) != 0;
}

static inline void address_set_clear(address_set *set)
{
    PyMem_Free(set->places);
    *set = (address_set){.places = NULL};
}

#endif
