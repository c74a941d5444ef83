/* torch's module tree: listing it, and reading and writing the same place of hundreds of modules in one call.
 *
 * Nothing here knows torch: a module is an object with a __dict__, in which `_modules` and `_parameters` are the dicts of
 * its children and its parameters.  A *path* is a tuple of names, each the key of a dict or, where the thing reached is
 * an object, of its __dict__: ("_modules", "lora_A", "_modules", "default"). */
#include "binding.h"

#include <stdbool.h>

/* ------------------------------------------------------------------- listing */

typedef struct walk {
    PyObject *leads; /* class → the names that lead to what a wrapper is around, or () */
    PyObject *find;  /* … asked of classes that it lacks */
    PyObject *list, *seen, *modules_name, *dot;
} walk;

/* The module's dict of children, a new reference. */
static PyObject *children_of(const walk *w, PyObject *module, PyObject *name)
{
    PyObject *children = PyObject_GetAttr(module, w->modules_name);
    if (children == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Format(PyExc_TypeError, "%R is no torch module: %.200s has no _modules", name, Py_TYPE(module)->tp_name);
    if (children != NULL && !PyDict_Check(children)) {
        PyErr_Format(PyExc_TypeError, "module %R: _modules must be a dict, not %.200s", name,
                     Py_TYPE(children)->tp_name);
        Py_CLEAR(children);
    }
    return children;
}

/* The names that lead from a module to what it is around: a tuple, a new reference. */
static PyObject *leads_of(const walk *w, PyObject *module, PyObject *name)
{
    PyObject *cls = (PyObject *)Py_TYPE(module), *leads = PyDict_GetItemWithError(w->leads, cls);
    if (leads != NULL)
        Py_INCREF(leads);
    else if (!PyErr_Occurred())
        leads = PyObject_CallOneArg(w->find, cls);
    if (leads != NULL && !PyTuple_Check(leads)) {
        PyErr_Format(PyExc_TypeError, "module %R: what leads from a %.200s must be a tuple, not %.200s", name,
                     Py_TYPE(module)->tp_name, Py_TYPE(leads)->tp_name);
        Py_CLEAR(leads);
    }
    return leads;
}

/* The module's child called `key`, a new reference. */
static PyObject *child_of(const walk *w, PyObject *module, PyObject *key, PyObject *name)
{
    PyObject *children = children_of(w, module, name), *child = NULL;
    if (children != NULL && (child = PyDict_GetItemWithError(children, key)) == NULL && !PyErr_Occurred())
        PyErr_Format(PyExc_KeyError, "module %R: %.200s has lost its %S", name, Py_TYPE(module)->tp_name, key);
    Py_XINCREF(child);
    Py_XDECREF(children);
    return child;
}

/* The module without its wrappers, a new reference. */
static PyObject *unwrapped(const walk *w, PyObject *module, PyObject *name)
{
    PyObject *inner = Py_NewRef(module), *leads;
    for (int depth = 0; inner != NULL; depth++) {
        leads = leads_of(w, inner, name);
        if (leads == NULL || PyTuple_GET_SIZE(leads) == 0) {
            if (leads == NULL)
                Py_CLEAR(inner);
            Py_XDECREF(leads);
            break;
        }
        for (Py_ssize_t i = 0; inner != NULL && i < PyTuple_GET_SIZE(leads); i++)
            Py_SETREF(inner, child_of(w, inner, PyTuple_GET_ITEM(leads, i), name));
        Py_DECREF(leads);
        if (depth == 1000) {
            PyErr_Format(PyExc_RecursionError, "module %R: its wrappers contain each other", name);
            Py_CLEAR(inner);
        }
    }
    return inner;
}

/* "name.key", or "key" at the top. */
static PyObject *child_name(const walk *w, PyObject *name, PyObject *key)
{
    if (!PyUnicode_Check(key)) {
        PyErr_Format(PyExc_TypeError, "module %R: the names of its children must be strings, not %.200s", name,
                     Py_TYPE(key)->tp_name);
        return NULL;
    }
    if (PyUnicode_GET_LENGTH(name) == 0)
        return Py_NewRef(key);
    PyObject *stem = PyUnicode_Concat(name, w->dot), *whole = stem != NULL ? PyUnicode_Concat(stem, key) : NULL;
    Py_XDECREF(stem);
    return whole;
}

/* 1 the first time that it is called with a module, 0 after that, -1 with an exception. */
static int is_new(const walk *w, PyObject *module)
{
    PyObject *address = PyLong_FromVoidPtr(module);
    int seen = address != NULL ? PySet_Contains(w->seen, address) : -1;
    if (seen == 0 && PySet_Add(w->seen, address) < 0)
        seen = -1;
    Py_XDECREF(address);
    return seen < 0 ? -1 : !seen;
}

static int walk_one(const walk *w, PyObject *wrapped, PyObject *name);

static int walk_child(const walk *w, PyObject *key, PyObject *child, PyObject *name)
{
    if (child == Py_None)
        return 0;
    PyObject *whole = child_name(w, name, key);
    int result = whole != NULL ? walk_one(w, child, whole) : -1;
    Py_XDECREF(whole);
    return result;
}

static int walk_below(const walk *w, PyObject *module, PyObject *name)
{
    PyObject *children = children_of(w, module, name), *items = NULL;
    int result = -1;
    if (children != NULL && (PyDict_CheckExact(children) ? PyDict_GET_SIZE(children) == 0 : false))
        result = 0;
    else if (children != NULL && (items = PyMapping_Items(children)) != NULL) /* an OrderedDict has an order of its own */
        result = 0;
    for (Py_ssize_t i = 0; items != NULL && result == 0 && i < PyList_GET_SIZE(items); i++) {
        PyObject *pair = PyList_GET_ITEM(items, i);
        if (PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) == 2)
            result = walk_child(w, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), name);
    }
    Py_XDECREF(items);
    Py_XDECREF(children);
    return result;
}

/* List a module under its name, and what is below it. */
static int walk_one(const walk *w, PyObject *wrapped, PyObject *name)
{
    PyObject *module = unwrapped(w, wrapped, name);
    int fresh = module != NULL ? is_new(w, module) : -1, result = fresh == 0 ? 0 : -1;
    if (fresh == 1) {
        PyObject *pair = PyTuple_Pack(2, name, module);
        bool listed = pair != NULL && PyList_Append(w->list, pair) == 0;
        Py_XDECREF(pair);
        if (listed && !Py_EnterRecursiveCall(" while listing modules")) {
            result = walk_below(w, module, name);
            Py_LeaveRecursiveCall();
        }
    }
    Py_XDECREF(module);
    return result;
}

PyDoc_STRVAR(walk_modules_doc,
             "walk_modules(root, leads, find, /)\n--\n\n"
             "A list of (dotted name, module) of root and of everything below it, each module once.\n\n"
             "leads is a dict: class -> names of children that lead from a wrapper to what it is around, () for a class\n"
             "that is none; find(class) says it of a class that the dict lacks. Wrappers, root too, are looked through: what\n"
             "they are around stands in their place under their name, and nothing else in them is listed. Order and names\n"
             "are otherwise those of torch's named_modules.\n\n"
             "Raises TypeError if something is no torch module, KeyError if a wrapper lacks its child.");

static PyObject *walk_modules(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 3 || !PyDict_Check(args[1]) || !PyCallable_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "walk_modules() takes a module, a dict of leads, and a function");
        return NULL;
    }
    walk w = {.leads = args[1], .find = args[2]};
    w.list = PyList_New(0);
    w.seen = PySet_New(NULL);
    w.modules_name = PyUnicode_InternFromString("_modules");
    w.dot = PyUnicode_InternFromString(".");
    PyObject *empty = PyUnicode_New(0, 0);
    bool bad = w.list == NULL || w.seen == NULL || w.modules_name == NULL || w.dot == NULL || empty == NULL;
    int collecting = PyGC_Disable(); /* thousands of tuples that are all alive */
    bad = bad || walk_one(&w, args[0], empty) < 0;
    if (collecting)
        PyGC_Enable();
    if (bad)
        Py_CLEAR(w.list);
    Py_XDECREF(w.seen);
    Py_XDECREF(w.modules_name);
    Py_XDECREF(w.dot);
    Py_XDECREF(empty);
    return w.list;
}

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

PyDoc_STRVAR(items_at_doc,
             "items_at(objects, path, /)\n--\n\n"
             "A list of what is at the end of a path from each of a list of objects; None where there is nothing.");

static PyObject *items_at(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (!check_call("items_at", nargs == 2 && PyList_Check(args[0]) && PyTuple_Check(args[1]),
                    "a list of objects, and a path"))
        return NULL;
    PyObject *list = PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < PyList_GET_SIZE(args[0]); i++) {
        PyObject *item = follow(PyList_GET_ITEM(args[0], i), args[1]);
        if (item == NULL && !PyErr_Occurred())
            item = Py_NewRef(Py_None);
        if (item == NULL || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

PyDoc_STRVAR(put_items_doc,
             "put_items(objects, path, key, values, /)\n--\n\n"
             "Of each of a list of objects, set the item `key` of what is at the end of the path to its value of a list as\n"
             "long.\n\n"
             "Raises KeyError if there is nothing at the end of the path; the objects before have their values then.");

static PyObject *put_items(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (!check_call("put_items",
                    nargs == 4 && PyList_Check(args[0]) && PyTuple_Check(args[1]) && PyList_Check(args[3]) &&
                        PyList_GET_SIZE(args[0]) == PyList_GET_SIZE(args[3]),
                    "a list of objects, a path, a key, and a list of as many values"))
        return NULL;
    bool good = true;
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(args[0]) && i < PyList_GET_SIZE(args[3]); i++) {
        PyObject *holder = follow(PyList_GET_ITEM(args[0], i), args[1]), *dict = NULL;
        if (holder != NULL)
            dict = dict_of(holder);
        else if (!PyErr_Occurred())
            PyErr_Format(PyExc_KeyError, "%.200s has nothing at %R", Py_TYPE(PyList_GET_ITEM(args[0], i))->tp_name,
                         args[1]);
        PyObject *value = Py_NewRef(PyList_GET_ITEM(args[3], i));
        good = dict != NULL && (PyDict_CheckExact(dict) ? PyDict_SetItem(dict, args[2], value)
                                                        : PyObject_SetItem(dict, args[2], value)) == 0;
        Py_DECREF(value);
        Py_XDECREF(dict);
        Py_XDECREF(holder);
    }
    if (!good)
        return NULL;
    Py_RETURN_NONE;
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

PyDoc_STRVAR(pop_items_doc,
             "pop_items(objects, paths, key, /)\n--\n\n"
             "Delete the item `key` of what is at the end of each of a tuple of paths from each of a list of objects, where\n"
             "there is one. Returns the items.");

static PyObject *pop_items(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (!check_call("pop_items", nargs == 3 && PyList_Check(args[0]) && PyTuple_Check(args[1]),
                    "a list of objects, a tuple of paths, and a key"))
        return NULL;
    PyObject *kept = PyList_New(0);
    bool good = kept != NULL;
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(args[0]); i++) {
        for (Py_ssize_t p = 0; good && p < PyTuple_GET_SIZE(args[1]); p++) {
            PyObject *path = PyTuple_GET_ITEM(args[1], p);
            if (!check_call("pop_items", PyTuple_Check(path), "paths that are tuples")) {
                good = false;
                break;
            }
            PyObject *holder = follow(PyList_GET_ITEM(args[0], i), path);
            PyObject *dict = holder != NULL ? dict_of(holder) : NULL;
            good = dict != NULL ? pop_item(dict, args[2], kept) == 0 : !PyErr_Occurred();
            Py_XDECREF(dict);
            Py_XDECREF(holder);
        }
    }
    if (!good)
        Py_CLEAR(kept);
    return kept;
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

/* Of a container (ModuleDict or ParameterDict), append the parameters that belong to one adapter. */
static bool append_of(PyObject *list, PyObject *container, PyObject *name, const names *n)
{
    PyObject *own = dict_in(container, n->modules), *child = own != NULL ? PyDict_GetItemWithError(own, name) : NULL;
    Py_XINCREF(child);
    Py_XDECREF(own);
    bool good = !PyErr_Occurred();
    if (good && child != NULL && child != Py_None) {
        good = append_own(list, child, n);
    } else if (good) {
        own = dict_in(container, n->parameters);
        PyObject *parameter = own != NULL ? PyDict_GetItemWithError(own, name) : NULL;
        good = parameter != NULL && parameter != Py_None ? PyList_Append(list, parameter) == 0 : !PyErr_Occurred();
        Py_XDECREF(own);
    }
    Py_XDECREF(child);
    return good;
}

PyDoc_STRVAR(parameters_of_doc,
             "parameters_of(layers, fields, name, /)\n--\n\n"
             "A list of one adapter's parameters in each of a list of layers: in each of its children that a tuple of fields\n"
             "names, the parameter called `name` or those of the child called `name`.");

static PyObject *parameters_of(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    names n;
    PyObject *list = NULL;
    if (!check_call("parameters_of", nargs == 3 && PyList_Check(args[0]) && PyTuple_Check(args[1]),
                    "a list of layers, a tuple of fields, and a name"))
        return NULL;
    if (intern_names(&n))
        list = PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < PyList_GET_SIZE(args[0]); i++) {
        PyObject *children = dict_in(PyList_GET_ITEM(args[0], i), n.modules);
        bool good = children != NULL || !PyErr_Occurred();
        for (Py_ssize_t f = 0; good && children != NULL && f < PyTuple_GET_SIZE(args[1]); f++) {
            PyObject *container = PyDict_GetItemWithError(children, PyTuple_GET_ITEM(args[1], f));
            Py_XINCREF(container);
            good = container != NULL && container != Py_None ? append_of(list, container, args[2], &n)
                                                             : !PyErr_Occurred();
            Py_XDECREF(container);
        }
        Py_XDECREF(children);
        if (!good)
            Py_CLEAR(list);
    }
    forget_names(&n);
    return list;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"walk_modules", FASTCALL(walk_modules), METH_FASTCALL, walk_modules_doc},
    {"items_at", FASTCALL(items_at), METH_FASTCALL, items_at_doc},
    {"put_items", FASTCALL(put_items), METH_FASTCALL, put_items_doc},
    {"pop_items", FASTCALL(pop_items), METH_FASTCALL, pop_items_doc},
    {"own_parameters", own_parameters, METH_O, own_parameters_doc},
    {"parameters_of", FASTCALL(parameters_of), METH_FASTCALL, parameters_of_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_tree(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
