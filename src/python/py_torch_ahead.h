/* Fetching torch's modules into the cache before they are looked at, many at a time.
 *
 * Each is a dozen reads that depend on each other, and walking a model waits for every one of them; of many modules, they
 * come in together. Nothing is changed, and no Python code runs. The caller holds the GIL. */
#ifndef PEFTC_PYTHON_PY_TORCH_AHEAD_H
#define PEFTC_PYTHON_PY_TORCH_AHEAD_H

#include "py_torch_dicts.h"
#include "py_torch_set.h"

#define AHEAD_MOST 1024 /* modules at a time: what they are fits the cache */

/* All zero to begin with, but for the state and the names that a function needs. */
typedef struct ahead {
    peftc_state *state;
    PyObject *modules_name, *parameters_name; /* "_modules", "_parameters", interned */
    address_set fetched;
    torch_place modules, parameters;
    PyObject **room; /* for what is under way */
} ahead;

void ahead_clear(ahead *a);

/* The names of the children of a module that will be walked, () for all of them, borrowed; NULL where nobody knows. It runs
 * no Python code. */
typedef PyObject *(*ahead_way)(const void *ctx, PyObject *module);

/* What a dict has of the module's class, borrowed; NULL for nothing, and for a class that may have a hash of its own. */
PyObject *ahead_of_class(PyObject *dict, PyObject *module);

/* The next modules of a walk, which are the last of a stack's `count` items of `step` bytes that begin with them, and what is
 * below; nothing if the last one has been fetched. */
void ahead_of_walk(ahead *a, const void *stack, size_t count, size_t step, ahead_way way, const void *ctx);

/* Modules' own parameters, with what torch computes with. At most AHEAD_MOST modules. */
void ahead_of_parameters(ahead *a, PyObject *const *modules, size_t count);

#endif
