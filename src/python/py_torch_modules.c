/* torch's modules by the hundred: making them from templates.
 *
 * Nothing here knows torch: a module is an object with a __dict__. */
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

static PyObject *items_of(PyObject *template);
static PyObject *stamp(PyObject *template, PyObject *items, PyObject *no_args, PyObject *modules);

/* A dict of children, each a new one like that of the template. */
static PyObject *own_children(PyObject *children, PyObject *no_args, PyObject *modules)
{
    PyObject *own = own_value(children), *key, *child;
    Py_ssize_t at = 0;
    while (own != NULL && PyDict_Next(children, &at, &key, &child)) {
        if (child == Py_None)
            continue;
        PyObject *items = items_of(child);
        PyObject *made = items != NULL ? stamp(child, items, no_args, modules) : NULL;
        if (made == NULL || (PyDict_CheckExact(own) ? PyDict_SetItem(own, key, made)
                                                    : PyObject_SetItem(own, key, made)) < 0)
            Py_CLEAR(own);
        Py_XDECREF(made);
        Py_XDECREF(items);
    }
    return own;
}

/* An object of the template's type whose __dict__ is made from `items`, the template's.  What the key `modules` has are
 * children, which are made anew too; NULL: they are shared. */
static PyObject *stamp(PyObject *template, PyObject *items, PyObject *no_args, PyObject *modules)
{
    PyTypeObject *type = Py_TYPE(template);
    if (Py_EnterRecursiveCall(" while making modules"))
        return NULL;
    PyObject *dict = PyDict_Copy(items), *made = NULL, *key, *value;
    Py_ssize_t at = 0;
    while (dict != NULL && PyDict_Next(items, &at, &key, &value)) {
        const bool tree = modules != NULL && PyDict_Check(value) && PyDict_GET_SIZE(value) > 0 &&
                          (key == modules || (PyUnicode_Check(key) && PyUnicode_Compare(key, modules) == 0));
        PyObject *own = tree ? own_children(value, no_args, modules) : own_value(value);
        if (own == NULL || (own != value && PyDict_SetItem(dict, key, own) < 0))
            Py_CLEAR(dict);
        Py_XDECREF(own);
    }
    Py_LeaveRecursiveCall();
    if (dict != NULL)
        made = type->tp_new(type, no_args, NULL);
    if (made != NULL && PyObject_GenericSetDict(made, dict, NULL) < 0)
        Py_CLEAR(made);
    Py_XDECREF(dict);
    return made;
}

/* The template's __dict__, a new reference; AttributeError if it has none, TypeError if that is not of the ordinary kind. */
static PyObject *items_of(PyObject *template)
{
    PyObject *items = PyObject_GenericGetDict(template, NULL);
    if (items != NULL && (PyType_Check(template) || !PyDict_CheckExact(items) || Py_TYPE(template)->tp_new == NULL)) {
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
             "everything else shared. Raises AttributeError if the template has no __dict__.");

static PyObject *module_like(PyObject *module, PyObject *template)
{
    (void)module;
    PyObject *items = items_of(template), *no_args = PyTuple_New(0), *made = NULL;
    if (items != NULL && no_args != NULL)
        made = stamp(template, items, no_args, NULL);
    Py_XDECREF(items);
    Py_XDECREF(no_args);
    return made;
}

PyDoc_STRVAR(modules_like_doc,
             "modules_like(templates, /)\n--\n\n"
             "A list of new objects, one for each of a list of templates, each as module_like(template) makes it.\n\n"
             "Raises AttributeError if a template has no __dict__.");

static PyObject *stamp_all(const char *function, PyObject *templates, PyObject *modules)
{
    if (!PyList_Check(templates)) {
        PyErr_Format(PyExc_TypeError, "%s() takes a list of templates, not %.200s", function,
                     Py_TYPE(templates)->tp_name);
        return NULL;
    }
    PyObject *no_args = PyTuple_New(0), *list = PyList_New(0), *template = NULL, *items = NULL;
    bool good = no_args != NULL && list != NULL;
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(templates); i++) {
        PyObject *next = PyList_GET_ITEM(templates, i);
        if (next != template) { /* neighbours are often alike */
            Py_XSETREF(template, Py_NewRef(next));
            Py_XSETREF(items, items_of(template));
        }
        PyObject *made = items != NULL ? stamp(template, items, no_args, modules) : NULL;
        good = made != NULL && PyList_Append(list, made) == 0;
        Py_XDECREF(made);
    }
    if (!good)
        Py_CLEAR(list);
    Py_XDECREF(template);
    Py_XDECREF(items);
    Py_XDECREF(no_args);
    return list;
}

static PyObject *modules_like(PyObject *module, PyObject *templates)
{
    (void)module;
    return stamp_all("modules_like", templates, NULL);
}

PyDoc_STRVAR(trees_like_doc,
             "trees_like(templates, /)\n--\n\n"
             "A list of new objects as modules_like makes them, but what is in `_modules` is made anew too, and so on below.\n\n"
             "Raises AttributeError if a template has no __dict__, RecursionError if templates contain each other.");

static PyObject *trees_like(PyObject *module, PyObject *templates)
{
    (void)module;
    PyObject *modules = PyUnicode_InternFromString("_modules");
    PyObject *made = modules != NULL ? stamp_all("trees_like", templates, modules) : NULL;
    Py_XDECREF(modules);
    return made;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"module_like", module_like, METH_O, module_like_doc},
    {"modules_like", modules_like, METH_O, modules_like_doc},
    {"trees_like", trees_like, METH_O, trees_like_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_modules(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
