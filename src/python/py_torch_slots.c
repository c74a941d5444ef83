/* Where in torch's module tree an adapter's slots are.
 *
 * A slot is known by its module's name; a module is an object whose __dict__ has `_modules`, the dict of its children. */
#include "py_torch_dicts.h"

/* "a.b.c" → the module "a.b" and "c"; borrowed and a new reference. */
static PyObject *split(PyObject *modules, PyObject *path, PyObject **key)
{
    const Py_ssize_t len = PyUnicode_Check(path) ? PyUnicode_GET_LENGTH(path) : 0;
    const Py_ssize_t dot = PyUnicode_Check(path) ? PyUnicode_FindChar(path, '.', 0, len, -1) : -2;
    *key = NULL;
    if (dot == -2) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "a module's name must be a string, not %.200s", Py_TYPE(path)->tp_name);
        return NULL;
    }
    PyObject *above = PyUnicode_Substring(path, 0, dot > 0 ? dot : 0);
    PyObject *parent = above != NULL ? PyDict_GetItemWithError(modules, above) : NULL;
    if (parent != NULL)
        *key = PyUnicode_Substring(path, dot + 1, len);
    else if (!PyErr_Occurred())
        PyErr_Format(PyExc_KeyError, "module %R: there is no %R", path, above);
    Py_XDECREF(above);
    return parent;
}

PyDoc_STRVAR(find_places_doc,
             "find_places(modules, paths, /)\n--\n\n"
             "Where the modules with the dotted names in a list are: three lists (parents, keys, tops) such that\n"
             "parent._modules[key] is top. modules is a dict: name -> module, of which the parents are found.\n\n"
             "Raises KeyError that names the path if there is no such place.");

static PyObject *find_places(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 2 || !PyDict_Check(args[0]) || !PyList_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "find_places() takes a dict of modules, and a list of names");
        return NULL;
    }
    PyObject *parents = PyList_New(0), *keys = PyList_New(0), *tops = PyList_New(0), *result = NULL;
    PyObject *modules_name = PyUnicode_InternFromString("_modules");
    bool good = parents != NULL && keys != NULL && tops != NULL && modules_name != NULL;
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(args[1]); i++) {
        PyObject *path = Py_NewRef(PyList_GET_ITEM(args[1], i)), *key = NULL, *top = NULL;
        PyObject *parent = Py_XNewRef(split(args[0], path, &key));
        PyObject *children = key != NULL ? torch_dict_in(parent, modules_name) : NULL;
        if (children != NULL)
            top = Py_XNewRef(PyDict_GetItemWithError(children, key));
        if (top == NULL && !PyErr_Occurred())
            PyErr_Format(PyExc_KeyError, "module %R is not in its parent", path);
        good = top != NULL && PyList_Append(parents, parent) == 0 && PyList_Append(keys, key) == 0 &&
               PyList_Append(tops, top) == 0;
        Py_XDECREF(top);
        Py_XDECREF(children);
        Py_XDECREF(key);
        Py_XDECREF(parent);
        Py_DECREF(path);
    }
    if (good)
        result = PyTuple_Pack(3, parents, keys, tops);
    Py_XDECREF(modules_name);
    Py_XDECREF(tops);
    Py_XDECREF(keys);
    Py_XDECREF(parents);
    return result;
}

static PyMethodDef functions[] = {
    {"find_places", (PyCFunction)(void (*)(void))find_places, METH_FASTCALL, find_places_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_slots(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
