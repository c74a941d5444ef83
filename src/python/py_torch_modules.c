/* torch's modules by the hundred: making them from a template, listing them, setting flags of their parameters.
 *
 * Nothing here knows torch: a module is an object with a __dict__, in which `_modules` is the dict of its children. */
#include "binding.h"

#include <stdbool.h>

/* -------------------------------------------------------------------- making */

/* A container of its own for the new module; anything else is shared. New reference. */
static PyObject *own_value(PyObject *value)
{
    if (PyDict_CheckExact(value))
        return PyDict_GET_SIZE(value) > 0 ? PyDict_Copy(value) : PyDict_New();
    if (PyODict_CheckExact(value)) /* the functions for dicts would leave its order out */
        return PyODict_SIZE(value) > 0 ? PyObject_CallMethod(value, "copy", NULL) : PyODict_New();
    if (PyList_CheckExact(value))
        return PyList_GetSlice(value, 0, PyList_GET_SIZE(value));
    if (PySet_CheckExact(value))
        return PySet_New(value);
    return Py_NewRef(value);
}

/* An object of the template's type whose __dict__ is made from `items`, the template's. */
static PyObject *stamp(PyObject *template, PyObject *items, PyObject *no_args)
{
    PyTypeObject *type = Py_TYPE(template);
    PyObject *dict = PyDict_Copy(items), *made = NULL, *key, *value;
    Py_ssize_t at = 0;
    while (dict != NULL && PyDict_Next(items, &at, &key, &value)) {
        PyObject *own = own_value(value);
        if (own == NULL || (own != value && PyDict_SetItem(dict, key, own) < 0))
            Py_CLEAR(dict);
        Py_XDECREF(own);
    }
    if (dict != NULL)
        made = type->tp_new(type, no_args, NULL);
    if (made != NULL && PyObject_GenericSetDict(made, dict, NULL) < 0)
        Py_CLEAR(made);
    Py_XDECREF(dict);
    return made;
}

/* The template's __dict__, a new reference; TypeError if it has none of the ordinary kind. */
static PyObject *items_of(PyObject *template)
{
    PyObject *items = PyObject_GetAttrString(template, "__dict__");
    if (items != NULL && (!PyDict_CheckExact(items) || Py_TYPE(template)->tp_new == NULL)) {
        PyErr_Format(PyExc_TypeError, "the template must be an object with a __dict__, not %.200s",
                     Py_TYPE(template)->tp_name);
        Py_CLEAR(items);
    }
    return items;
}

PyDoc_STRVAR(module_like_doc,
             "module_like(template, /)\n--\n\n"
             "A new object of the template's type, made without calling its __init__.\n\n"
             "Its __dict__ has the template's items: dicts, OrderedDicts, lists and sets copied (not what is in them),\n"
             "everything else shared. Raises TypeError if the template has no __dict__.");

static PyObject *module_like(PyObject *module, PyObject *template)
{
    (void)module;
    PyObject *items = items_of(template), *no_args = PyTuple_New(0), *made = NULL;
    if (items != NULL && no_args != NULL)
        made = stamp(template, items, no_args);
    Py_XDECREF(items);
    Py_XDECREF(no_args);
    return made;
}

PyDoc_STRVAR(modules_like_doc,
             "modules_like(template, n, /)\n--\n\n"
             "A list of n objects, each as module_like(template) makes it.\n\n"
             "Python's garbage collector rests meanwhile: it would look at all of them again and again. Raises\n"
             "TypeError if the template has no __dict__, ValueError if n is negative.");

static PyObject *modules_like(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 2) {
        PyErr_Format(PyExc_TypeError, "modules_like() takes 2 positional arguments, got %zd", nargs);
        return NULL;
    }
    Py_ssize_t n = PyNumber_AsSsize_t(args[1], PyExc_OverflowError);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (n < 0) {
        PyErr_Format(PyExc_ValueError, "n must not be negative, got %zd", n);
        return NULL;
    }
    PyObject *items = items_of(args[0]), *no_args = PyTuple_New(0), *list = PyList_New(0);
    bool good = items != NULL && no_args != NULL && list != NULL;
    int collecting = PyGC_Disable();
    for (Py_ssize_t i = 0; i < n && good; i++) {
        PyObject *made = stamp(args[0], items, no_args);
        good = made != NULL && PyList_Append(list, made) == 0;
        Py_XDECREF(made);
    }
    if (collecting)
        PyGC_Enable();
    if (!good)
        Py_CLEAR(list);
    Py_XDECREF(items);
    Py_XDECREF(no_args);
    return list;
}

/* --------------------------------------------------------------------- flags */

PyDoc_STRVAR(set_requires_grad_doc,
             "set_requires_grad(parameters, flag, /)\n--\n\n"
             "parameter.requires_grad = flag for each of a list or tuple.\n\n"
             "Raises what setting the attribute raises; those before have their new value then.");

/* The attribute's getset descriptor in a type that sets attributes the ordinary way; NULL without an exception
 * otherwise. */
static PyObject *descriptor_of(PyTypeObject *type, PyObject *name)
{
    if (type->tp_setattro != PyObject_GenericSetAttr)
        return NULL;
    PyObject *descriptor = PyObject_GetAttr((PyObject *)type, name);
    if (descriptor == NULL)
        PyErr_Clear();
    else if (!Py_IS_TYPE(descriptor, &PyGetSetDescr_Type))
        Py_CLEAR(descriptor);
    return descriptor;
}

static PyObject *set_requires_grad(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 2 || !(PyList_Check(args[0]) || PyTuple_Check(args[0]))) {
        PyErr_SetString(PyExc_TypeError, "set_requires_grad() takes a list or tuple of parameters, and a flag");
        return NULL;
    }
    int flag = PyObject_IsTrue(args[1]);
    if (flag < 0)
        return NULL;
    PyObject *name = PyUnicode_InternFromString("requires_grad"), *descriptor = NULL;
    PyObject *value = flag ? Py_True : Py_False;
    PyTypeObject *type = NULL; /* whose descriptor that is; a strong reference */
    bool good = name != NULL;
    for (Py_ssize_t i = 0; good && i < PySequence_Fast_GET_SIZE(args[0]); i++) {
        PyObject *parameter = Py_NewRef(PySequence_Fast_GET_ITEM(args[0], i));
        if (Py_TYPE(parameter) != type) {
            Py_XSETREF(type, (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(parameter)));
            Py_XSETREF(descriptor, descriptor_of(type, name));
        }
        good = (descriptor != NULL ? Py_TYPE(descriptor)->tp_descr_set(descriptor, parameter, value)
                                   : PyObject_SetAttr(parameter, name, value)) == 0;
        Py_DECREF(parameter);
    }
    Py_XDECREF(name);
    Py_XDECREF(descriptor);
    Py_XDECREF(type);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------- listing */

typedef struct ancestor {
    PyObject *module;
    const struct ancestor *above;
} ancestor;

typedef struct walk {
    PyTypeObject *stop;
    PyObject *list, *modules_name, *base_name, *dot;
} walk;

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
    PyObject *stem = PyUnicode_Concat(name, w->dot), *whole = NULL;
    if (stem != NULL)
        whole = PyUnicode_Concat(stem, key);
    Py_XDECREF(stem);
    return whole;
}

/* The module's dict of children, a new reference. */
static PyObject *children_of(const walk *w, PyObject *module, PyObject *name)
{
    PyObject *children = PyObject_GetAttr(module, w->modules_name);
    if (children == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Format(PyExc_TypeError, "%R is no torch module: %.200s has no _modules", name,
                     Py_TYPE(module)->tp_name);
    if (children != NULL && !PyDict_Check(children)) {
        PyErr_Format(PyExc_TypeError, "module %R: _modules must be a dict, not %.200s", name,
                     Py_TYPE(children)->tp_name);
        Py_CLEAR(children);
    }
    return children;
}

static bool is_above(const ancestor *above, PyObject *module, PyObject *name)
{
    for (; above != NULL; above = above->above)
        if (above->module == module) {
            PyErr_Format(PyExc_RecursionError, "module %R contains itself: the modules of a model must form a tree",
                         name);
            return true;
        }
    return false;
}

static int walk_below(const walk *w, PyObject *module, PyObject *name, const ancestor *above);

/* List a module under its name, and what is below it. */
static int walk_one(const walk *w, PyObject *module, PyObject *name, const ancestor *above)
{
    PyObject *pair = PyTuple_Pack(2, name, module);
    int bad = pair == NULL || PyList_Append(w->list, pair) < 0;
    Py_XDECREF(pair);
    if (bad || is_above(above, module, name) || Py_EnterRecursiveCall(" while listing modules"))
        return -1;
    int result = -1;
    ancestor here = {module, above};
    PyObject *base = NULL;
    if (w->stop == NULL || !PyType_IsSubtype(Py_TYPE(module), w->stop)) {
        result = walk_below(w, module, name, &here);
    } else { /* a wrapper: what is below its innermost base has the names it had without it */
        PyObject *children = children_of(w, module, name);
        if (children != NULL) {
            base = Py_XNewRef(PyDict_GetItemWithError(children, w->base_name));
            Py_DECREF(children);
        }
        if (base != NULL && base != Py_None) {
            PyObject *inner = NULL;
            for (int steps = 0;; steps++) {
                if (is_above(&here, base, name) || steps == 1000) {
                    if (!PyErr_Occurred())
                        PyErr_Format(PyExc_RecursionError, "module %R: its base layers contain each other", name);
                    break;
                }
                children = children_of(w, base, name);
                if (children == NULL)
                    break;
                inner = Py_XNewRef(PyDict_GetItemWithError(children, w->base_name));
                Py_DECREF(children);
                if (inner == NULL || inner == Py_None) {
                    Py_XDECREF(inner);
                    ancestor innermost = {base, &here};
                    if (!PyErr_Occurred())
                        result = walk_below(w, base, name, &innermost);
                    break;
                }
                Py_SETREF(base, inner);
            }
        } else if (!PyErr_Occurred()) {
            result = 0;
        }
    }
    Py_XDECREF(base);
    Py_LeaveRecursiveCall();
    return result;
}

static int walk_child(const walk *w, PyObject *key, PyObject *child, PyObject *name, const ancestor *above)
{
    if (child == Py_None)
        return 0;
    PyObject *whole = child_name(w, name, key);
    int result = whole != NULL ? walk_one(w, child, whole, above) : -1;
    Py_XDECREF(whole);
    return result;
}

static int walk_below(const walk *w, PyObject *module, PyObject *name, const ancestor *above)
{
    PyObject *children = children_of(w, module, name), *items;
    if (children == NULL)
        return -1;
    int result = 0;
    if (PyDict_CheckExact(children)) {
        PyObject *key, *child;
        Py_ssize_t at = 0;
        while (result == 0 && PyDict_Next(children, &at, &key, &child)) {
            Py_INCREF(key);
            Py_INCREF(child);
            result = walk_child(w, key, child, name, above);
            Py_DECREF(key);
            Py_DECREF(child);
        }
    } else if ((items = PyMapping_Items(children)) != NULL) { /* an OrderedDict has an order of its own */
        for (Py_ssize_t i = 0; result == 0 && i < PyList_GET_SIZE(items); i++) {
            PyObject *pair = PyList_GET_ITEM(items, i);
            if (PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) == 2)
                result = walk_child(w, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), name, above);
        }
        Py_DECREF(items);
    } else {
        result = -1;
    }
    Py_DECREF(children);
    return result;
}

PyDoc_STRVAR(walk_modules_doc,
             "walk_modules(root, stop, /)\n--\n\n"
             "A list of (dotted name, module) of root and of everything below it.\n\n"
             "Order and names are those of torch's named_modules(remove_duplicate=False), except for modules of the type\n"
             "`stop` (None: no type): such a wrapper is listed, of its children none; the children of the innermost\n"
             "module in its chain of `base_layer` children follow under the names they had without the wrapper.\n\n"
             "Raises RecursionError if a module contains itself, TypeError if something is no torch module.");

static PyObject *walk_modules(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 2 || !(args[1] == Py_None || PyType_Check(args[1]))) {
        PyErr_SetString(PyExc_TypeError, "walk_modules() takes a module, and a type or None");
        return NULL;
    }
    walk w = {.stop = args[1] == Py_None ? NULL : (PyTypeObject *)args[1]};
    w.list = PyList_New(0);
    w.modules_name = PyUnicode_InternFromString("_modules");
    w.base_name = PyUnicode_InternFromString("base_layer");
    w.dot = PyUnicode_InternFromString(".");
    PyObject *empty = PyUnicode_New(0, 0);
    int bad = w.list == NULL || w.modules_name == NULL || w.base_name == NULL || w.dot == NULL || empty == NULL;
    int collecting = PyGC_Disable(); /* thousands of tuples that are all alive */
    bad = bad || walk_one(&w, args[0], empty, NULL) < 0;
    if (collecting)
        PyGC_Enable();
    if (bad)
        Py_CLEAR(w.list);
    Py_XDECREF(w.modules_name);
    Py_XDECREF(w.base_name);
    Py_XDECREF(w.dot);
    Py_XDECREF(empty);
    return w.list;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"module_like", module_like, METH_O, module_like_doc},
    {"modules_like", FASTCALL(modules_like), METH_FASTCALL, modules_like_doc},
    {"set_requires_grad", FASTCALL(set_requires_grad), METH_FASTCALL, set_requires_grad_doc},
    {"walk_modules", FASTCALL(walk_modules), METH_FASTCALL, walk_modules_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_modules(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
