/* Reading and writing the same place of hundreds of torch's modules in one call.
 *
 * Nothing here knows torch: a module is an object with a __dict__, in which `_modules` and `_parameters` are the dicts of
 * its children and its parameters.  A *path* is a tuple of names, each the key of a dict or, where the thing reached is
 * an object, of its __dict__: ("_modules", "lora_A", "_modules", "default"). */
#include "binding.h"

#include <stdbool.h>

/* -------------------------------------------------------------------- places */

/* The dict that is `thing`, or that it keeps its attributes in; a new reference, NULL with an exception. */
static PyObject *dict_of(PyObject *thing)
{
    if (PyDict_Check(thing))
        return Py_NewRef(thing);
    PyObject *dict = PyObject_GenericGetDict(thing, NULL);
    if (dict == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Format(PyExc_TypeError, "%.200s is neither a dict nor an object with a __dict__", Py_TYPE(thing)->tp_name);
    return dict;
}

/* What is at the end of the path; a new reference. NULL without an exception if there is nothing. */
static PyObject *follow(PyObject *start, PyObject *path)
{
    PyObject *here = Py_NewRef(start);
    for (Py_ssize_t i = 0; here != NULL && i < PyTuple_GET_SIZE(path); i++) {
        PyObject *dict = dict_of(here);
        PyObject *next = dict != NULL ? PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(path, i)) : NULL;
        Py_XINCREF(next);
        Py_XDECREF(dict);
        Py_SETREF(here, next);
    }
    return here;
}

static bool check_call(const char *name, bool good, const char *takes)
{
    if (!good)
        PyErr_Format(PyExc_TypeError, "%s() takes %s", name, takes);
    return good;
}

/* One of put_items' puts, checked: (path, key, values). */
static bool check_put(PyObject *put, Py_ssize_t count)
{
    const bool good = PyTuple_Check(put) && PyTuple_GET_SIZE(put) == 3 && PyTuple_Check(PyTuple_GET_ITEM(put, 0)) &&
                      (!PyList_Check(PyTuple_GET_ITEM(put, 2)) || PyList_GET_SIZE(PyTuple_GET_ITEM(put, 2)) == count);
    return check_call("put_items", good, "puts (path, key, values), where values are a list as long as the objects', or one value");
}

static bool put_item(PyObject *object, PyObject *path, PyObject *key, PyObject *value)
{
    PyObject *holder = follow(object, path), *dict = NULL;
    if (holder != NULL)
        dict = dict_of(holder);
    else if (!PyErr_Occurred())
        PyErr_Format(PyExc_KeyError, "%.200s has nothing at %R", Py_TYPE(object)->tp_name, path);
    const bool good = dict != NULL &&
                      (PyDict_CheckExact(dict) ? PyDict_SetItem(dict, key, value) : PyObject_SetItem(dict, key, value)) == 0;
    Py_XDECREF(dict);
    Py_XDECREF(holder);
    return good;
}

PyDoc_STRVAR(put_items_doc,
             "put_items(objects, puts, /)\n--\n\n"
             "Set items in each of a list of objects. puts is a tuple of (path, key, values): the item `key` of what is at the\n"
             "end of the path becomes the object's value of a list as long, or, if values is no list, that.\n\n"
             "Raises KeyError if there is nothing at the end of a path; what came before is done then.");

static PyObject *put_items(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (!check_call("put_items", nargs == 2 && PyList_Check(args[0]) && PyTuple_Check(args[1]),
                    "a list of objects, and a tuple of puts"))
        return NULL;
    const Py_ssize_t count = PyList_GET_SIZE(args[0]), puts = PyTuple_GET_SIZE(args[1]);
    for (Py_ssize_t p = 0; p < puts; p++)
        if (!check_put(PyTuple_GET_ITEM(args[1], p), count))
            return NULL;
    bool good = true;
    for (Py_ssize_t i = 0; good && i < count && i < PyList_GET_SIZE(args[0]); i++) {
        PyObject *object = Py_NewRef(PyList_GET_ITEM(args[0], i));
        for (Py_ssize_t p = 0; good && p < puts; p++) {
            PyObject *put = PyTuple_GET_ITEM(args[1], p), *value = PyTuple_GET_ITEM(put, 2);
            if (PyList_Check(value) && i >= PyList_GET_SIZE(value)) /* a finalizer has changed it */
                break;
            value = Py_NewRef(PyList_Check(value) ? PyList_GET_ITEM(value, i) : value);
            good = put_item(object, PyTuple_GET_ITEM(put, 0), PyTuple_GET_ITEM(put, 1), value);
            Py_DECREF(value);
        }
        Py_DECREF(object);
    }
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- parameters */

typedef struct names {
    PyObject *modules, *parameters;
} names;

static bool intern_names(names *n)
{
    n->modules = PyUnicode_InternFromString("_modules");
    n->parameters = PyUnicode_InternFromString("_parameters");
    return n->modules != NULL && n->parameters != NULL;
}

static void forget_names(names *n)
{
    Py_XDECREF(n->modules);
    Py_XDECREF(n->parameters);
}

/* The item of an object's __dict__ if it is a dict; a new reference. NULL without an exception if there is none. */
static PyObject *dict_in(PyObject *thing, PyObject *key)
{
    PyObject *dict = dict_of(thing), *found = dict != NULL ? PyDict_GetItemWithError(dict, key) : NULL;
    found = found != NULL && PyDict_Check(found) ? Py_NewRef(found) : NULL;
    Py_XDECREF(dict);
    return found;
}

/* Append a module's own parameters. */
static bool append_own(PyObject *list, PyObject *thing, const names *n)
{
    PyObject *own = dict_in(thing, n->parameters), *key, *value;
    bool good = own != NULL || !PyErr_Occurred();
    Py_ssize_t at = 0;
    while (good && own != NULL && PyDict_Next(own, &at, &key, &value))
        good = value == Py_None || PyList_Append(list, value) == 0;
    Py_XDECREF(own);
    return good;
}

PyDoc_STRVAR(own_parameters_doc,
             "own_parameters(modules, /)\n--\n\n"
             "A list of the parameters of each of a list of modules, without those of their children.");

static PyObject *own_parameters(PyObject *module, PyObject *modules)
{
    (void)module;
    names n;
    PyObject *list = NULL;
    if (!check_call("own_parameters", PyList_Check(modules), "a list of modules"))
        return NULL;
    if (intern_names(&n))
        list = PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < PyList_GET_SIZE(modules); i++)
        if (!append_own(list, PyList_GET_ITEM(modules, i), &n))
            Py_CLEAR(list);
    forget_names(&n);
    return list;
}

/* ------------------------------------------------------------------- adapters */

/* What several loops over all layers leave for the next one; strong references. */
typedef struct shelf {
    PyObject **items;
    size_t count;
} shelf;

static bool make_shelf(shelf *s, size_t rows, size_t columns)
{
    size_t count, bytes;
    s->count = 0;
    s->items = NULL;
    if (__builtin_mul_overflow(rows, columns, &count) || __builtin_mul_overflow(count, sizeof *s->items, &bytes)) {
        PyErr_NoMemory();
        return false;
    }
    s->items = PyMem_Calloc(count != 0 ? count : 1, sizeof *s->items);
    if (s->items == NULL)
        PyErr_NoMemory();
    else
        s->count = count;
    return s->items != NULL;
}

static void clear_shelf(shelf *s)
{
    for (size_t i = 0; i < s->count; i++)
        Py_XDECREF(s->items[i]);
    PyMem_Free(s->items);
}

/* Each object → the dict called `key` in its __dict__, NULL for none. */
static bool step_into(shelf *s, PyObject *key)
{
    for (size_t i = 0; i < s->count; i++) {
        if (s->items[i] == NULL)
            continue;
        PyObject *found = dict_in(s->items[i], key);
        if (found == NULL && PyErr_Occurred())
            return false;
        Py_SETREF(s->items[i], found);
    }
    return true;
}

/* The dict's item, a new reference; NULL for None, and without an exception for nothing. */
static PyObject *item_of(PyObject *dict, PyObject *key)
{
    PyObject *found = PyDict_GetItemWithError(dict, key);
    return found != NULL && found != Py_None ? Py_NewRef(found) : NULL;
}

/* containers ← each layer's children that the fields name. */
static bool find_containers(PyObject *layers, PyObject *fields, const names *n, shelf *containers)
{
    const size_t rows = (size_t)PyList_GET_SIZE(layers), columns = (size_t)PyTuple_GET_SIZE(fields);
    shelf children;
    bool good = make_shelf(&children, rows, 1);
    for (size_t i = 0; good && i < rows && i < (size_t)PyList_GET_SIZE(layers); i++)
        children.items[i] = Py_NewRef(PyList_GET_ITEM(layers, (Py_ssize_t)i));
    good = good && step_into(&children, n->modules);
    for (size_t i = 0; good && i < rows; i++) {
        for (size_t f = 0; good && children.items[i] != NULL && f < columns; f++) {
            containers->items[i * columns + f] = item_of(children.items[i], PyTuple_GET_ITEM(fields, (Py_ssize_t)f));
            good = containers->items[i * columns + f] != NULL || !PyErr_Occurred();
        }
    }
    clear_shelf(&children);
    return good;
}

/* Each container (ModuleDict or ParameterDict) → its child called `name`, or else its parameter of that name, which
 * `whole` says. */
static bool find_named(shelf *containers, PyObject *name, const names *n, bool *whole)
{
    shelf children;
    bool good = make_shelf(&children, containers->count, 1);
    for (size_t i = 0; good && i < containers->count; i++)
        children.items[i] = Py_XNewRef(containers->items[i]);
    good = good && step_into(&children, n->modules);
    for (size_t i = 0; good && i < containers->count; i++) {
        if (containers->items[i] == NULL)
            continue;
        PyObject *found = children.items[i] != NULL ? item_of(children.items[i], name) : NULL;
        if (found == NULL && !PyErr_Occurred()) {
            PyObject *own = dict_in(containers->items[i], n->parameters);
            found = own != NULL ? item_of(own, name) : NULL;
            whole[i] = found != NULL;
            Py_XDECREF(own);
        }
        good = found != NULL || !PyErr_Occurred();
        Py_SETREF(containers->items[i], found);
    }
    clear_shelf(&children);
    return good;
}

PyDoc_STRVAR(parameters_of_doc,
             "parameters_of(layers, fields, name, /)\n--\n\n"
             "A list of one adapter's parameters in each of a list of layers: in each of its children that a tuple of fields\n"
             "names, the parameter called `name` or those of the child called `name`.");

/* Not layer by layer, but one step of the way for all of them after the other: with many adapters nothing of this is in the
 * cache, and look-ups that do not depend on each other wait for memory together. */
static PyObject *parameters_of(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    names n;
    PyObject *list = NULL;
    if (!check_call("parameters_of", nargs == 3 && PyList_Check(args[0]) && PyTuple_Check(args[1]),
                    "a list of layers, a tuple of fields, and a name"))
        return NULL;
    shelf found = {NULL, 0};
    bool *whole = NULL;
    bool good = intern_names(&n) &&
                make_shelf(&found, (size_t)PyList_GET_SIZE(args[0]), (size_t)PyTuple_GET_SIZE(args[1]));
    if (good && (whole = PyMem_Calloc(found.count + 1, sizeof *whole)) == NULL) {
        PyErr_NoMemory();
        good = false;
    }
    if (good && find_containers(args[0], args[1], &n, &found) && find_named(&found, args[2], &n, whole))
        list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < found.count; i++) {
        if (found.items[i] == NULL)
            continue;
        if (!(whole[i] ? PyList_Append(list, found.items[i]) == 0 : append_own(list, found.items[i], &n)))
            Py_CLEAR(list);
    }
    PyMem_Free(whole);
    clear_shelf(&found);
    forget_names(&n);
    return list;
}

/* Take `key` out of the dict, if it is there; what it was is kept until after the caller's loop. */
static int pop_item(PyObject *dict, PyObject *key, PyObject *kept)
{
    PyObject *value = PyDict_GetItemWithError(dict, key);
    if (value == NULL)
        return PyErr_Occurred() ? -1 : 0;
    if (PyList_Append(kept, value) < 0)
        return -1;
    return PyDict_CheckExact(dict) ? PyDict_DelItem(dict, key) : PyObject_DelItem(dict, key);
}

/* What drop_adapter is about. */
typedef struct dropping {
    PyObject *name;
    PyObject *kept; /* a list of what was taken out */
    PyObject *modules, *parameters, *keys;
} dropping;

/* Take the adapter out of a container; `empty` tells whether nothing is left in it. */
static bool drop_from(const dropping *d, PyObject *container, bool *empty)
{
    PyObject *own = dict_of(container);
    PyObject *const fields[] = {d->modules, d->parameters, d->keys};
    bool good = own != NULL;
    *empty = true;
    for (int k = 0; good && k < 3; k++) {
        PyObject *dict = PyDict_GetItemWithError(own, fields[k]);
        good = dict != NULL || !PyErr_Occurred();
        if (!good || dict == NULL || !PyDict_Check(dict))
            continue;
        Py_INCREF(dict);
        good = pop_item(dict, d->name, d->kept) == 0;
        *empty = *empty && (k == 2 || PyDict_GET_SIZE(dict) == 0);
        Py_DECREF(dict);
    }
    Py_XDECREF(own);
    return good;
}

/* Take the adapter out of the layer's fields; `bare` tells whether the first `first` of them are empty now. */
static bool drop_from_layer(const dropping *d, PyObject *layer, PyObject *fields, Py_ssize_t first, PyObject *later,
                            bool *bare)
{
    PyObject *own = dict_of(layer), *children = own != NULL ? dict_in(layer, d->modules) : NULL;
    bool good = own != NULL && (children != NULL || !PyErr_Occurred());
    *bare = true;
    for (Py_ssize_t f = 0; good && f < PyTuple_GET_SIZE(fields); f++) {
        PyObject *field = PyTuple_GET_ITEM(fields, f), *values = PyDict_GetItemWithError(own, field);
        if (values != NULL && PyDict_Check(values)) {
            Py_INCREF(values);
            good = pop_item(values, d->name, d->kept) == 0;
            Py_DECREF(values);
        }
        good = good && !PyErr_Occurred();
        PyObject *container = good && children != NULL ? item_of(children, field) : NULL;
        good = good && !PyErr_Occurred();
        if (container == NULL)
            continue;
        bool empty = true;
        good = drop_from(d, container, &empty);
        *bare = *bare && (f >= first || empty);
        const int goes = good && empty ? PySequence_Contains(later, field) : 0;
        if (goes < 0 || (goes > 0 && pop_item(children, field, d->kept) < 0))
            good = false;
        Py_DECREF(container);
    }
    Py_XDECREF(children);
    Py_XDECREF(own);
    return good;
}

PyDoc_STRVAR(drop_adapter_doc,
             "drop_adapter(layers, holding, other, later, name, /)\n--\n\n"
             "Take one adapter out of each of a list of layers: out of what the tuples of fields `holding` and `other` name,\n"
             "which are dicts in the layer's __dict__, or children with the dicts _modules, _parameters and _keys. Children\n"
             "that the tuple `later` names go when they are empty.\n\n"
             "Returns (what was taken out, indices of the layers that have nothing left in `holding`).");

static PyObject *drop_adapter(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (!check_call("drop_adapter",
                    nargs == 5 && PyList_Check(args[0]) && PyTuple_Check(args[1]) && PyTuple_Check(args[2]) &&
                        PyTuple_Check(args[3]),
                    "a list of layers, three tuples of fields, and a name"))
        return NULL;
    dropping d = {.name = args[4],
                  .kept = PyList_New(0),
                  .modules = PyUnicode_InternFromString("_modules"),
                  .parameters = PyUnicode_InternFromString("_parameters"),
                  .keys = PyUnicode_InternFromString("_keys")};
    PyObject *fields = PySequence_Concat(args[1], args[2]), *bare_ones = PyList_New(0), *result = NULL;
    bool good = d.kept != NULL && d.modules != NULL && d.parameters != NULL && d.keys != NULL && fields != NULL &&
                bare_ones != NULL;
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(args[0]); i++) {
        bool bare;
        PyObject *layer = Py_NewRef(PyList_GET_ITEM(args[0], i)), *index = NULL;
        good = drop_from_layer(&d, layer, fields, PyTuple_GET_SIZE(args[1]), args[3], &bare);
        if (good && bare)
            good = (index = PyLong_FromSsize_t(i)) != NULL && PyList_Append(bare_ones, index) == 0;
        Py_XDECREF(index);
        Py_DECREF(layer);
    }
    if (good)
        result = PyTuple_Pack(2, d.kept, bare_ones);
    Py_XDECREF(bare_ones);
    Py_XDECREF(fields);
    Py_XDECREF(d.keys);
    Py_XDECREF(d.parameters);
    Py_XDECREF(d.modules);
    Py_XDECREF(d.kept);
    return result;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"put_items", FASTCALL(put_items), METH_FASTCALL, put_items_doc},
    {"own_parameters", own_parameters, METH_O, own_parameters_doc},
    {"parameters_of", FASTCALL(parameters_of), METH_FASTCALL, parameters_of_doc},
    {"drop_adapter", FASTCALL(drop_adapter), METH_FASTCALL, drop_adapter_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_places(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
