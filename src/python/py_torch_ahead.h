/* Reading modules ahead: in a large tree, or one with many adapters, nothing is in the cache, and each module is several
 * reads that depend on each other. Those of the modules that wait on a stack are begun before it is their turn. */
#ifndef PEFTC_PYTHON_PY_TORCH_AHEAD_H
#define PEFTC_PYTHON_PY_TORCH_AHEAD_H

#include "binding.h"

/* So many modules before a module's turn its __dict__ is fetched, and then the keys of that. */
#define AHEAD_DICT 8
#define AHEAD_KEYS 4

/* *own ← the module's __dict__, a new reference, unless it is there; NULL without an exception if it cannot be had. */
static inline void ahead_dict(PyObject *module, PyObject **own)
{
    if (*own == NULL && (*own = PyObject_GenericGetDict(module, NULL)) == NULL)
        PyErr_Clear(); /* asked again when it is its turn */
    if (*own != NULL)
        __builtin_prefetch(*own);
}

/* own may be NULL. */
static inline void ahead_keys(const PyObject *own)
{
    if (own != NULL && PyDict_Check(own))
        for (int line = 0; line < 4; line++)
            __builtin_prefetch((const char *)((const PyDictObject *)own)->ma_keys + 64 * line);
}

#endif
