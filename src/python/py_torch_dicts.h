/* What torch's modules keep: objects with a __dict__, in which `_modules` is the dict of children and `_parameters` that of
 * parameters.
 *
 * In a large model, or one with many adapters, nothing of this is in the cache, and each module is several reads that depend
 * on each other. Those of later modules are begun before it is their turn, so that they wait for memory together: the
 * functions called ahead_… do that, and change nothing. */
#ifndef PEFTC_PYTHON_PY_TORCH_DICTS_H
#define PEFTC_PYTHON_PY_TORCH_DICTS_H

#include "binding.h"

#include <stdbool.h>

/* The dict that is `thing`, or that it keeps its attributes in; a new reference, NULL with an exception. */
static inline PyObject *torch_dict_of(PyObject *thing)
{
    if (PyDict_Check(thing))
        return Py_NewRef(thing);
    PyObject *dict = PyObject_GenericGetDict(thing, NULL);
    if (dict == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Format(PyExc_TypeError, "%.200s is neither a dict nor an object with a __dict__", Py_TYPE(thing)->tp_name);
    return dict;
}

/* The dict called `key` in the object's __dict__; a new reference. NULL without an exception if there is none, or no
 * __dict__. */
static inline PyObject *torch_dict_in(PyObject *object, PyObject *key)
{
    PyObject *own = PyObject_GenericGetDict(object, NULL), *found = NULL;
    if (own != NULL && PyDict_Check(own))
        found = PyDict_GetItemWithError(own, key);
    else if (own == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    found = found != NULL && PyDict_Check(found) ? Py_NewRef(found) : NULL;
    Py_XDECREF(own);
    return found;
}

/* Append what a dict of parameters has to the list. */
static inline bool torch_append_values(PyObject *list, PyObject *parameters)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    bool good = true;
    while (good && PyDict_Next(parameters, &at, &key, &value))
        good = value == Py_None || PyList_Append(list, value) == 0;
    return good;
}

/* Append a module's own parameters to the list. name: "_parameters" */
static inline bool torch_append_own(PyObject *list, PyObject *module, PyObject *name)
{
    PyObject *own = torch_dict_in(module, name);
    const bool good = own != NULL ? torch_append_values(list, own) : !PyErr_Occurred();
    Py_XDECREF(own);
    return good;
}

/* -------------------------------------------------------------------- places */

/* Where in dicts that have grown alike a key's entry is: with PyDict_Next one read less than with its hash, and no code of
 * anybody's runs. */
typedef struct torch_place {
    bool known;
    Py_ssize_t at;
} torch_place;

/* The item at the place, borrowed, if it is there. */
static inline PyObject *torch_item_at(PyObject *dict, const PyObject *key, const torch_place *place)
{
    PyObject *other, *found;
    Py_ssize_t at = place->at;
    return place->known && PyDict_CheckExact(dict) && PyDict_Next(dict, &at, &other, &found) && other == key ? found : NULL;
}

/* Look for the key (the very object) from the first item on. */
static inline PyObject *torch_find_place(PyObject *dict, const PyObject *key, torch_place *place)
{
    PyObject *other, *found;
    Py_ssize_t at = 0;
    for (Py_ssize_t here = 0; PyDict_Next(dict, &at, &other, &found); here = at)
        if (other == key) {
            *place = (torch_place){true, here};
            return found;
        }
    return NULL;
}

/* The item of an exact dict whose key is this object, borrowed; NULL if it is not found. */
static inline PyObject *torch_peek(PyObject *dict, const PyObject *key, torch_place *place)
{
    PyObject *found = torch_item_at(dict, key, place);
    return found == NULL && PyDict_CheckExact(dict) ? torch_find_place(dict, key, place) : found;
}

/* ------------------------------------------------------------- reading ahead */

/* The object, and where its __dict__ is kept: in front of it. */
static inline void ahead_object(const PyObject *object)
{
    __builtin_prefetch((const char *)object - 4 * sizeof(PyObject *));
    __builtin_prefetch(object);
}

/* The first lines of what a dict (or NULL) keeps its items in. */
static inline void ahead_table(const PyObject *dict, int lines)
{
    if (dict == NULL || !PyDict_Check(dict))
        return;
    const PyDictObject *d = (const PyDictObject *)dict;
    for (int line = 0; line < lines; line++)
        __builtin_prefetch((const char *)d->ma_keys + 64 * line);
    for (int line = 0; line < lines && d->ma_values != NULL; line++)
        __builtin_prefetch((const char *)d->ma_values + 64 * line);
}

/* Behind a tensor that has come in: torch keeps the address of what it computes with after the head of the object. */
static inline void ahead_tensor(const PyObject *tensor)
{
    const char *address = NULL;
    if (Py_TYPE(tensor)->tp_basicsize >= (Py_ssize_t)sizeof(PyObject[2]))
        memcpy(&address, tensor + 1, sizeof address);
    for (int line = 0; line < 4 && address != NULL; line++)
        __builtin_prefetch(address + 64 * line);
}

#endif
