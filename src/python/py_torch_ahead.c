#include "py_torch_ahead.h"

#include "dlpack.h"

/* So many items before its turn an item is fetched. */
#define DISTANCE 8

/* So many of a stack's items are begun with. */
#define ROOTS 8

void ahead_clear(ahead *a)
{
    address_set_clear(&a->fetched);
    PyMem_Free(a->room);
    a->room = NULL;
}

static bool make_room(ahead *a)
{
    if (a->room == NULL)
        a->room = PyMem_Malloc(3 * AHEAD_MOST * sizeof *a->room);
    return a->room != NULL;
}

/* Else asking for it is an exception. */
static bool has_dict(const PyObject *object)
{
#ifdef Py_TPFLAGS_MANAGED_DICT
    if (PyType_HasFeature(Py_TYPE(object), Py_TPFLAGS_MANAGED_DICT))
        return true;
#endif
    return Py_TYPE(object)->tp_dictoffset != 0;
}

/* dicts ← the modules' __dict__s, borrowed; their keys are on the way. */
static void fetch_dicts(PyObject *const *modules, PyObject **dicts, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (i + DISTANCE < count)
            ahead_object(modules[i + DISTANCE]);
        dicts[i] = has_dict(modules[i]) ? PyObject_GenericGetDict(modules[i], NULL) : NULL;
        if (dicts[i] == NULL)
            PyErr_Clear(); /* it may have run out of memory */
        else
            __builtin_prefetch(dicts[i]);
        Py_XDECREF(dicts[i]); /* the module keeps it */
    }
    for (size_t i = 0; i < count; i++)
        ahead_table(dicts[i], 6);
}

/* items ← each dict's dict called `key`, borrowed; its keys are on the way. */
static void fetch_items(PyObject *const *dicts, PyObject **items, size_t count, PyObject *key, torch_place *place)
{
    for (size_t i = 0; i < count; i++) {
        items[i] = dicts[i] != NULL ? torch_peek(dicts[i], key, place) : NULL;
        __builtin_prefetch(items[i]);
    }
    for (size_t i = 0; i < count; i++) {
        if (items[i] != NULL && !PyDict_CheckExact(items[i]))
            items[i] = NULL;
        ahead_table(items[i], 2);
    }
}

PyObject *ahead_of_class(PyObject *dict, PyObject *module)
{
    PyObject *cls = (PyObject *)Py_TYPE(module);
    if (Py_TYPE(cls)->tp_hash != PyType_Type.tp_hash || Py_TYPE(cls)->tp_richcompare != PyType_Type.tp_richcompare)
        return NULL;
    PyObject *found = PyDict_GetItemWithError(dict, cls);
    if (found == NULL)
        PyErr_Clear();
    return found;
}

static bool is_among(PyObject *name, PyObject *names)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++)
        if (PyTuple_GET_ITEM(names, i) == name)
            return true;
    return false;
}

/* Let the children that will be walked be the next ones. */
static void add_children(ahead *a, PyObject *children, PyObject *only, size_t *count)
{
    PyObject *name, *child;
    Py_ssize_t at = 0;
    while (*count < AHEAD_MOST && PyDict_Next(children, &at, &name, &child)) {
        if (child == Py_None || (PyTuple_GET_SIZE(only) > 0 && !is_among(name, only)) || address_set_add(&a->fetched, child) != 1)
            continue;
        ahead_object(child);
        a->room[(*count)++] = child;
    }
}

static void walk_ahead(ahead *a, const void *stack, size_t count, size_t step, ahead_way way, const void *ctx)
{
    size_t begin = 0, end = 0;
    for (size_t i = 0; i < ROOTS && i < count; i++) {
        PyObject *module;
        memcpy(&module, (const char *)stack + (count - 1 - i) * step, sizeof module);
        const bool fetched = address_set_has(&a->fetched, module);
        if ((fetched && i == 0) || !make_room(a))
            return;
        if (!fetched && address_set_add(&a->fetched, module) == 1)
            a->room[end++] = module;
    }
    PyObject **modules = a->room, **dicts = modules + AHEAD_MOST, **children = dicts + AHEAD_MOST;
    while (begin < end) { /* one level of the tree */
        const size_t level = end - begin;
        size_t next = end;
        fetch_dicts(modules + begin, dicts, level);
        fetch_items(dicts, children, level, a->modules_name, &a->modules);
        for (size_t i = 0; i < level; i++) {
            PyObject *only = children[i] != NULL ? way(ctx, modules[begin + i]) : NULL;
            if (only != NULL)
                add_children(a, children[i], only, &next);
        }
        begin = end;
        end = next;
    }
}

/* A __dict__ that is made when it is asked for may begin a collection, whose finalizers could change what is borrowed here. */
void ahead_of_walk(ahead *a, const void *stack, size_t count, size_t step, ahead_way way, const void *ctx)
{
    const int collecting = PyGC_Disable();
    walk_ahead(a, stack, count, step, way, ctx);
    if (collecting)
        PyGC_Enable();
}

static void fetch_parameters(ahead *a, PyObject *const *modules, size_t count)
{
    if (count > AHEAD_MOST || !make_room(a))
        return;
    PyObject **dicts = a->room + AHEAD_MOST, **items = dicts + AHEAD_MOST;
    fetch_dicts(modules, dicts, count);
    fetch_items(dicts, items, count, a->parameters_name, &a->parameters);
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        PyObject *name, *value;
        Py_ssize_t at = 0;
        while (items[i] != NULL && found < AHEAD_MOST && PyDict_Next(items[i], &at, &name, &value))
            if (value != Py_None) {
                __builtin_prefetch(value);
                dicts[found++] = value; /* those dicts are done with */
            }
    }
    for (size_t i = 0; i < found; i++)
        ahead_tensor(dicts[i]);
    for (size_t i = 0; i < found; i++)
        peftc_ahead_of_storage(a->state, dicts[i]);
}

void ahead_of_parameters(ahead *a, PyObject *const *modules, size_t count)
{
    const int collecting = PyGC_Disable();
    fetch_parameters(a, modules, count);
    if (collecting)
        PyGC_Enable();
}
